"""Final scores of finished runs, and the pictures that go with them."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from rae_jax import config as configs
from rae_jax.data import loader
from rae_jax.evaluation import features, frechet, generate, pictures, reconstruction
from rae_jax.trainers import frozen, generation, inputs, rae_decoder, registry
from rae_jax.training import checkpoints, sharding

COLUMNS = 8
STRIP_POINTS = 9
STRIP_ROWS = 5


def run_scores(workdir: Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run on its validation images.

    Decoders are scored with the LPIPS of both networks.

    Raises:
        ConfigError: If the run's trainer has no scores.
    """
    workdir = Path(workdir).absolute()
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    mesh = sharding.make_mesh(config.mesh.data)
    with jax.set_mesh(mesh):
        program = registry.trainer(config).build(config, workdir, mesh)
        if program.evaluate is None:
            raise configs.ConfigError(
                f"Runs of {config.trainer!r} have nothing to evaluate."
            )
        state = registry.restore(program, config, workdir, mesh)
        found = program.evaluate(state, program.frozen, workdir)
        if config.trainer == "rae_decoder":
            for backbone in ("alex", "vgg"):
                if f"lpips_{backbone}" not in found:
                    found |= _lpips(backbone, config, state, program.frozen, mesh)
    return found


def _lpips(backbone, config, state, networks, mesh) -> dict[str, float]:
    """Scores with an LPIPS that the decoder was not trained with."""
    config = config.copy_and_resolve_references()
    config.loss.perceptual = backbone
    reconstruct = rae_decoder.make_reconstruct(config)
    score = rae_decoder.make_scores(config)
    params = sharding.place(frozen.load_lpips(config.loss.perceptual), mesh)
    means = reconstruction.ReconstructionScores()
    rows = sharding.batch_sharding(mesh)
    with inputs.validation_batches(config.data) as batches:
        for batch in batches:
            images = loader.to_global(batch, rows)["image"]
            recon = reconstruct(state.ema_params, networks["encoder"], images)
            values = jax.device_get(score(params, images, recon))
            means = means.add(values, batch["mask"])
    return means.means() | {"num_images": means.count}


def generation_scores(
    workdir: Path,
    *,
    num_samples: int,
    num_reference: int,
    batch_size: int,
    seed: int,
    scale: float | None = None,
    folder: Path | None = None,
) -> dict[str, float]:
    """Returns Frechet distances of samples and of real images to training images.

    All sets that are compared have `num_samples` images, because the distance grows
    as a set shrinks. Real training images that are not in the reference and
    validation images are the floor, an untrained network is the ceiling. Without
    enough validation images, their distance is left out.

    Args:
        workdir: Folder of a `latent_diffusion` run.
        num_samples: Images per compared set.
        num_reference: Training images to compare with.
        batch_size: Samples at a time.
        seed: Of the samples.
        scale: Guidance scale compared with none; the config's if None.
        folder: Where pictures go; the workdir if None.

    Raises:
        ValueError: If there are too few training images.
    """
    generator = generation.load(Path(workdir))
    data = generator.config.data
    scale = generator.config.sampling.guidance_scale if scale is None else scale
    labels = generate.balanced_labels(num_samples, generator.num_classes, seed)
    net = features.EfficientNetFeatures(batch_size)
    reference, held_out = _real_moments(net, data, num_reference, num_samples)
    options = dict(seed=seed, batch_size=batch_size)
    sets = {
        "samples": generator.images(labels, scale=1.0, **options),
        "guided": generator.images(labels, scale=scale, **options),
        "untrained": generator.untrained().images(labels, scale=1.0, **options),
    }
    if _has(data, "validation", num_samples):
        sets["real_validation"] = _real(data, "validation", num_samples)
    moments = {"real_train": held_out}
    kept = {}
    for name, batches in sets.items():
        images = np.concatenate(list(batches))[:num_samples]
        kept[name] = images
        moments[name] = net.moments([images])
    save_pictures(generator, labels, kept, scale, seed, folder or Path(workdir))
    found = {
        f"fd_efflite0_{name}": frechet.frechet_distance(m, reference)
        for name, m in moments.items()
    }
    counts = {"num_samples": num_samples, "num_reference": reference.count}
    return found | counts | {"guidance_scale": scale}


def save_pictures(
    generator: generation.Generator,
    labels: np.ndarray,
    images: dict[str, np.ndarray],
    scale: float,
    seed: int,
    folder: Path,
) -> None:
    """Writes samples class by class and the way from noise to image."""
    order = np.argsort(labels, kind="stable")
    classes = range(min(generator.num_classes, 10))
    rows = [order[labels[order] == y][:COLUMNS] for y in classes]
    for name, file in (("samples", "samples"), ("guided", "samples_guided")):
        parts = [images[name][row] for row in rows if len(row)]
        pictures.save_rows(folder / f"{file}.png", parts)
    sampling = generator.config.sampling
    points = sampling.num_points + sampling.final_zero
    keep = tuple(np.linspace(0, points - 1, STRIP_POINTS).astype(int).tolist())
    chosen = np.arange(STRIP_ROWS) * generator.num_classes // STRIP_ROWS
    states = generator.states(chosen, keep, scale=scale, seed=seed)
    pictures.save_rows(folder / "strip.png", list(states.swapaxes(0, 1)))


def save_real(data, num_classes: int, folder: Path) -> None:
    """Writes training images class by class, in the layout of the samples."""
    source = inputs.open_source(data, data.split)
    found: dict[int, list[np.ndarray]] = {y: [] for y in range(min(num_classes, 10))}
    with inputs.eval_batches(data, data.split, limit=min(len(source), 2048)) as batches:
        for batch in batches:
            for image, y in zip(batch["image"], batch["label"], strict=True):
                if y in found and len(found[y]) < COLUMNS:
                    found[y].append(image)
    rows = [np.stack(images) for images in found.values() if images]
    pictures.save_rows(folder / "real.png", rows)


def _real_moments(net, data, num_reference: int, num_held_out: int):
    """Splits training images into a reference and as many others as samples."""
    images = np.concatenate(list(_real(data, data.split, num_reference + num_held_out)))
    if len(images) < 2 * num_held_out:
        raise ValueError(
            f"{len(images)} training images are too few to compare {num_held_out} "
            f"samples with; lower --num-samples to at most {len(images) // 2}."
        )
    order = np.random.default_rng(0).permutation(len(images))
    held_out, reference = order[:num_held_out], order[num_held_out:]
    return net.moments([images[reference]]), net.moments([images[held_out]])


def _has(data, split: str, count: int) -> bool:
    """Returns whether a split exists and has at least `count` images."""
    try:
        return len(inputs.open_source(data, split)) >= count
    except ValueError:
        return False


def _real(data, split: str, limit: int) -> Iterator[np.ndarray]:
    with inputs.eval_batches(data, split, limit=limit) as batches:
        for batch in batches:
            yield batch["image"][batch["mask"] > 0]
