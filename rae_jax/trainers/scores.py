"""Final scores of finished runs, and the pictures that go with them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.evaluation import (
    extractors,
    features,
    generate,
    inception_features,
    pictures,
    quality,
)
from rae_jax.trainers import (
    decoder_scores,
    denoising_chain,
    generation,
    inputs,
    online_samples,
    registry,
)
from rae_jax.trainers import judges as judging
from rae_jax.training import checkpoints, sharding

COLUMNS = 8
STRIP_POINTS = 9
STRIP_ROWS = 5
Generator = generation.Generator | denoising_chain.Generator
_GENERATED = ("samples", "guided", "untrained")


def run_scores(workdir: Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run on its validation images.

    Decoders are scored with the LPIPS of both networks; see `decoder_scores` for more
    than that.

    Raises:
        ConfigError: If the run's trainer has no scores.
    """
    workdir = storage.absolute(workdir)
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if config.trainer == "rae_decoder":
        return decoder_scores.decoder_scores(workdir).scores
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = registry.trainer(config).build(config, workdir, mesh)
        if program.evaluate is None:
            raise configs.ConfigError(
                f"Runs of {config.trainer!r} have nothing to evaluate."
            )
        state = registry.restore(program, config, workdir, mesh)
        return program.evaluate(state, program.frozen, workdir)


def generation_scores(
    workdir: Path,
    *,
    num_samples: int,
    num_reference: int,
    batch_size: int,
    seed: int,
    scale: float | None = None,
    folder: Path | None = None,
    progress: quality.Progress = lambda count: None,
) -> quality.Result:
    """Returns Frechet distances of samples and of real images to training images.

    All sets that are compared have `num_samples` images, because the distance grows
    as a set shrinks. Real training images that are not in the reference and
    validation images are the floor, an untrained network is the ceiling. Without
    enough validation images, their distance is left out.

    Args:
        workdir: Folder of a run of `latent_diffusion`, or of an `ldae` that generates.
        num_samples: Images per compared set.
        num_reference: Training images to compare with.
        batch_size: Samples at a time.
        seed: Of the samples.
        scale: Guidance scale compared with none; the config's if None.
        folder: Where pictures go; the workdir if None.
        progress: Called with the number of samples just done.

    Raises:
        ValueError: If there are too few training images.
    """
    generator = generation.load(storage.path(workdir))
    data = generator.config.data
    scale = generator.config.sampling.guidance_scale if scale is None else scale
    labels = generate.balanced_labels(num_samples, generator.num_classes, seed)
    net = features.make_efflite0(batch_size)
    reference, held_out = _measure_real(net, data, num_reference, num_samples)
    sets = _generated(generator, labels, scale, seed=seed, batch_size=batch_size)
    if _has(data, "validation", num_samples):
        sets["real_validation"] = _real(data, "validation", num_samples)
    measured = {"real_train": held_out}
    shown = _shown(labels, generator.num_classes)
    kept = {}
    for name, batches in sets.items():
        picker = _Picker(batches, shown)
        counted = dict(progress=progress) if name in _GENERATED else {}
        measured[name] = quality.measure(net, picker, name, **counted)
        kept[name] = picker.chosen
    for by_name in (measured, kept):
        by_name.setdefault("guided", by_name["samples"])
    save_pictures(generator, shown, kept, scale, seed, folder or storage.path(workdir))
    results = {name: quality.compare(m, reference) for name, m in measured.items()}
    found = {f"{net.name}_{name}": r.scores[net.name] for name, r in results.items()}
    counts = {"num_samples": num_samples, "num_reference": reference.count}
    found |= counts | {"guidance_scale": scale}
    return quality.Result(found, results["samples"].notes)


def _generated(
    generator: Generator, labels: np.ndarray, scale: float, **options: int
) -> dict[str, Iterator[np.ndarray]]:
    """Returns the sets of samples; unguided ones alone where the scale is 1."""
    sets = {
        "samples": generator.images(labels, scale=1.0, **options),
        "untrained": generator.untrained().images(labels, scale=1.0, **options),
    }
    if scale != 1:
        sets["guided"] = generator.images(labels, scale=scale, **options)
    return sets


def generation_quality(
    workdir: Path,
    judges: judging.Judges,
    *,
    num_samples: int,
    seed: int,
    scale: float | None = None,
    progress: quality.Progress = lambda count: None,
) -> quality.Result:
    """Returns the scores of samples by the standard protocol, "gfid_50k" and others.

    Samples are generated and measured batch by batch, one per label of a balanced
    set, in random order.

    Args:
        workdir: Folder of a run of `latent_diffusion`, or of an `ldae` that generates.
        judges: Networks and reference.
        num_samples: 50,000 in papers.
        seed: Of the samples.
        scale: Guidance scale; the config's if None.
        progress: Called with the number of images just done.

    Raises:
        ValueError: There are no networks or there is no reference.
    """
    networks = judges.networks()
    if not networks:
        raise ValueError(inception_features.HOW_TO_GET)
    if not judges.reference:
        raise ValueError(
            "FID compares samples with --reference REF.npz: ADM's "
            "VIRTUAL_imagenet256_labeled.npz for ImageNet at 256 pixels, or your own "
            "training images, a folder or packed by `rae-jax prepare --pack`."
        )
    generator = generation.load(storage.path(workdir))
    scale = generator.config.sampling.guidance_scale if scale is None else scale
    labels = generate.balanced_labels(num_samples, generator.num_classes, seed)
    references = judges.references(networks, keep=True)
    found = online_samples.measure(
        generator,
        networks,
        references,
        labels,
        scale=scale,
        seed=seed,
        batch_size=judges.batch_size,
        progress=progress,
    )
    scores = {"num_samples": num_samples, "guidance_scale": scale}
    return quality.Result(scores | found.scores, found.notes)


def save_pictures(
    generator: Generator,
    shown: list[np.ndarray],
    images: dict[str, dict[int, np.ndarray]],
    scale: float,
    seed: int,
    folder: Path,
) -> None:
    """Writes samples class by class and the way from noise to image.

    Args:
        generator: What made the samples.
        shown: Indices of samples, row by row.
        images: Those samples by index, unguided as "samples" and "guided".
        scale: Guidance scale of the way.
        seed: Of the samples.
        folder: Where pictures go.
    """
    for name, file in (("samples", "samples"), ("guided", "samples_guided")):
        parts = [np.stack([images[name][i] for i in row.tolist()]) for row in shown]
        pictures.save_rows(folder / f"{file}.png", parts)
    last = generator.plan.num_states - 1
    points = min(STRIP_POINTS, last + 1)
    keep = tuple(np.linspace(0, last, points).astype(int).tolist())
    chosen = np.arange(STRIP_ROWS) * generator.num_classes // STRIP_ROWS
    states = generator.states(chosen, keep, scale=scale, seed=seed)
    pictures.save_rows(folder / "strip.png", list(states.swapaxes(0, 1)))


def _shown(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Returns the indices of the samples in the picture, one row per class."""
    order = np.argsort(labels, kind="stable")
    classes = range(min(num_classes, 10))
    rows = [order[labels[order] == y][:COLUMNS] for y in classes]
    return [row for row in rows if len(row)]


class _Picker:
    """Passes batches of images on and keeps those with given indices."""

    def __init__(self, batches: Iterable[np.ndarray], rows: list[np.ndarray]):
        self.chosen: dict[int, np.ndarray] = {}
        self._batches, self._wanted = batches, set(np.concatenate(rows).tolist())

    def __iter__(self) -> Iterator[np.ndarray]:
        start = 0
        for batch in self._batches:
            for i in self._wanted & set(range(start, start + len(batch))):
                self.chosen[i] = batch[i - start].copy()
            start += len(batch)
            yield batch


def save_real(data, num_classes: int, folder: Path) -> None:
    """Writes training images class by class, in the layout of the samples."""
    source = inputs.open_source(data, data.split)
    found: dict[int, list[np.ndarray]] = {y: [] for y in range(min(num_classes, 10))}
    options = dict(limit=min(len(source), 2048), shared=False)
    with inputs.eval_batches(data, data.split, **options) as batches:
        for batch in batches:
            for image, y in zip(batch["image"], batch["label"], strict=True):
                if y in found and len(found[y]) < COLUMNS:
                    found[y].append(image)
    rows = [np.stack(images) for images in found.values() if images]
    pictures.save_rows(folder / "real.png", rows)


def _measure_real(
    net: extractors.Extractor, data: ConfigDict, num_reference: int, num_held_out: int
) -> tuple[quality.Measured, quality.Measured]:
    """Splits training images into a reference and as many others as samples."""
    total = min(len(inputs.open_source(data, data.split)), num_reference + num_held_out)
    if total < 2 * num_held_out:
        raise ValueError(
            f"{total} training images are too few to compare {num_held_out} "
            f"samples with; lower --num-samples to at most {total // 2}."
        )
    is_held_out = np.zeros(total, bool)
    is_held_out[np.random.default_rng(0).permutation(total)[:num_held_out]] = True
    reference = quality.Collector(net, "the training images")
    held_out = quality.Collector(net, "the held-out training images")
    start = 0
    for batch in _real(data, data.split, total):
        out = is_held_out[start : start + len(batch)]
        for collector, part in ((held_out, batch[out]), (reference, batch[~out])):
            collector.add(part)
        start += len(batch)
    return reference.finish(), held_out.finish()


def _has(data, split: str, count: int) -> bool:
    """Returns whether a split exists and has at least `count` images."""
    try:
        return len(inputs.open_source(data, split)) >= count
    except ValueError:
        return False


def _real(data, split: str, limit: int) -> Iterator[np.ndarray]:
    with inputs.eval_batches(data, split, limit=limit, shared=False) as batches:
        for batch in batches:
            yield batch["image"][batch["mask"] > 0]
