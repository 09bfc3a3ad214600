"""Scores of a trained autoencoder: reconstructions, noise curves, given latents."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import copies, storage
from rae_jax.evaluation import (
    autoencoding,
    extractors,
    pictures,
    quality,
    reconstruction,
    robustness,
    streaming,
)
from rae_jax.models import rae
from rae_jax.trainers import autoencoder, frozen, inputs
from rae_jax.trainers import judges as judging
from rae_jax.training import distributed, sharding

BACKBONES = ("alex", "vgg")
_PICTURES = 16
_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured and how; none of it but `images` and `limit` changes scores.

    Attributes:
        batch_size: Images at a time, raised to a multiple of the devices; the
            config's if None.
        limit: Number of validation images, chosen at random but always the same; the
            config's if None.
        images: Folder or .npz of images to use instead of the validation split.
        judges: Networks and reference of Frechet distances.
        mesh: Devices; all there are if None.
        progress: Called with the number of images just done.
    """

    batch_size: int | None = None
    limit: int | None = None
    images: Path | None = None
    judges: judging.Judges = dataclasses.field(default_factory=judging.Judges)
    mesh: Mesh | None = None
    progress: quality.Progress = lambda count: None


class _Run:
    """A loaded autoencoder on its devices, with its images."""

    def __init__(self, workdir: Path, options: Options):
        self.options = options
        self.mesh = options.mesh or sharding.make_mesh(-1)
        self.loaded = autoencoder.find(str(workdir), storage.path("."))
        self.params = sharding.place(self.loaded.params, self.mesh)
        self.data = self.loaded.config.data.copy_and_resolve_references()
        asked = options.batch_size or self.data.batch_size
        if asked < 1 or (options.limit is not None and options.limit < 1):
            raise ValueError("A batch size or limit must be at least 1.")
        self.data.batch_size = math.ceil(asked / self.mesh.size) * self.mesh.size
        self.data.validation_size = options.limit or self.data.validation_size
        self.rows = sharding.batch_sharding(self.mesh)
        small = min(options.judges.batch_size, self.data.batch_size)
        self.judges = dataclasses.replace(options.judges, batch_size=small)

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[autoencoding.Batch]]:
        if self.options.images is None:
            with inputs.validation_batches(self.data) as batches:
                yield batches
            return
        found = streaming.open_images(self.options.images, self.options.limit)
        side = self.data.image_size
        if found.size != (side, side):
            raise ValueError(
                f"{found.origin} holds images of {found.size[1]} x {found.size[0]} "
                f"pixels, the run was made for {side} x {side}. Crop them: rae-jax "
                f"prepare IMAGES --pack OUT.npz --size {side}"
            )
        size = self.data.batch_size
        parts = streaming.rebatch(found.batches(), size)
        yield autoencoding.array_batches(parts, size)

    def score(
        self, versions: autoencoding.Versions, backbones: Sequence[str]
    ) -> dict[object, quality.Result]:
        networks = self.judges.networks(self.mesh)
        with jax.set_mesh(self.mesh), self.batches() as batches:
            return autoencoding.score_versions(
                batches,
                self.rows,
                versions,
                make_score(backbones, self.mesh),
                networks=networks,
                references=self.judges.references(networks),
                progress=self.options.progress,
            )

    def encoder(self) -> Callable[[jax.Array], jax.Array]:
        encode = jax.jit(
            lambda params, images: self.loaded.encode(params, inputs.to_float(images))
        )
        return lambda images: encode(self.params, images)


def decoder_scores(workdir: Path, options: Options = Options()) -> quality.Result:
    """Returns PSNR, SSIM, LPIPS of both networks, and distances of reconstructions.

    Reconstructions are those of the EMA weights, without noise on the latents, and
    are compared as 8-bit images. The reference of rFID is the images themselves
    unless the judges name another.

    Args:
        workdir: Folder of a `rae_decoder` run, or what `autoencoder.find` takes.
        options: See `Options`.
    """
    run = _Run(workdir, options)
    encode = run.encoder()
    decode = jax.jit(run.loaded.decode)

    def versions(arrays):
        yield "", decode(run.params, encode(arrays["image"]))

    return run.score(versions, BACKBONES)[""]


def robustness_curves(
    workdir: Path,
    sigmas: Sequence[float] = robustness.SIGMAS,
    *,
    seed: int = 0,
    options: Options = Options(),
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Returns scores of reconstructions from latents with noise of growing strength.

    Args:
        workdir: Folder of a `rae_decoder` run, or what `autoencoder.find` takes.
        sigmas: Deviations of the noise, in units of raw latents, as the tau of the
            decoder's training.
        seed: With the index of an image, determines its noise.
        options: See `Options`.

    Returns:
        Lists over sigma by score, with "sigma" itself, and notes on the scores.
    """
    sigmas = robustness.check_sigmas(sigmas)
    run = _Run(workdir, options)
    encode = run.encoder()

    @jax.jit
    def decode(params, z, sigma, index):
        z = robustness.disturbed(z, sigma, seed, index)
        return run.loaded.decode(params, z)

    def versions(arrays):
        z = encode(arrays["image"])
        for sigma in sigmas:
            yield sigma, decode(run.params, z, jnp.float32(sigma), arrays["index"])

    found = run.score(versions, (run.loaded.config.loss.perceptual,))
    names = found[sigmas[0]].scores
    curves = {"sigma": list(sigmas)}
    curves |= {name: [found[s].scores[name] for s in sigmas] for name in names}
    return curves, found[sigmas[0]].notes


def latent_scores(
    workdir: Path,
    latents: Path,
    *,
    stats: str = "",
    options: Options = Options(),
    picture: Path | None = None,
) -> quality.Result:
    """Returns the scores of images decoded from given latents, "gfid_50k" and others.

    With the same latents, decoders can be compared by what they make of generated
    latents, which is not told by their reconstructions.

    Args:
        workdir: Folder of a `rae_decoder` run, or what `autoencoder.find` takes.
        latents: An .npz with the array "latents" or "arr_0" (n, h, w, c); if it has
            "mean" and "var" (h, w, c), too, latents were normalised by them.
        stats: Statistics that latents were normalised by: a workdir of
            `latent_stats` or an .npz; empty for raw latents or those of the file.
        options: See `Options`; the reference is the judges', or the run's images.
        picture: Where to write the first images.

    Raises:
        ValueError: There are no networks, or latents have another shape.
    """
    run = _Run(workdir, options)
    networks = run.judges.networks(run.mesh)
    if not networks:
        raise ValueError(
            "Decoded latents have no originals: give --inception FILE or --efflite0 "
            "to measure their distance to real images."
        )
    rows = _open_latents(latents, run.loaded.config)
    normalised = _latent_stats(latents, stats, run.loaded.config, storage.path(workdir))
    references = run.judges.references(networks, keep=True)
    with jax.set_mesh(run.mesh):
        if not references:
            references = {net.name: _measure_real(run, net) for net in networks}
        sets = {
            net.name: quality.Collector(
                net, str(latents), keep=judging.is_inception(net)
            )
            for net in networks
        }
        shown = 0
        for images in _decoded(run, rows, normalised):
            if picture is not None and not shown:
                pictures.save_grid(picture, images[:_PICTURES], _COLUMNS)
            shown += len(images)
            for collector in sets.values():
                collector.add(images)
            options.progress(len(images))
    scores: dict[str, float] = {"num_latents": shown}
    notes: list[str] = []
    for name, collector in sets.items():
        result = quality.compare(collector.finish(), references[name], prefix="g")
        scores |= result.scores
        notes += [note for note in result.notes if note not in notes]
    return quality.Result(scores, tuple(notes))


def make_score(backbones: Sequence[str], mesh: Mesh) -> autoencoding.Score:
    """Returns (uint8 images, reconstructions) -> psnr, ssim and LPIPS by backbone."""
    graphs = {name: frozen.lpips(name)[0] for name in backbones}
    params = {name: frozen.load_lpips(name) for name in backbones}
    params = sharding.place(params, mesh)

    @jax.jit
    def score(params, images, recon):
        values = reconstruction.image_scores(images, recon)
        a = inputs.to_float(images)
        b = inputs.to_float(reconstruction.to_uint8(recon))
        for name, graph in graphs.items():
            values |= {f"lpips_{name}": nnx.merge(graph, params[name])(a, b)}
        return values

    return lambda images, recon: score(params, images, recon)


def _measure_real(run: _Run, network: extractors.Extractor) -> quality.Measured:
    with run.batches() as batches:
        images = (b["image"][np.asarray(b["mask"]) > 0] for b in batches)
        keep = judging.is_inception(network)
        return quality.measure(network, images, "the run's images", keep=keep)


def _open_latents(path: Path, config: ConfigDict) -> streaming.ArrayRows:
    names = streaming.array_names(path)
    name = "latents" if "latents" in names else streaming.ARRAY
    rows = streaming.ArrayRows(path, name)
    expected = frozen.latent_shape(config.encoder.sizes)
    if rows.dtype.kind != "f" or rows.shape[1:] != expected:
        raise ValueError(
            f"{path}: {name!r} must hold floating-point latents (n, h, w, c) = (n, "
            f"{', '.join(map(str, expected))}) as this run's encoder gives, not "
            f"{rows.dtype} {rows.shape}."
        )
    return rows


def _latent_stats(path: Path, stats: str, config: ConfigDict, workdir: Path):
    """Returns what undoes the normalisation of latents, or None for raw ones."""
    if stats:
        return frozen.load_stats(stats, config.encoder.sizes, workdir)
    names = set(streaming.array_names(path))
    if not {"mean", "var"} <= names:
        return None
    with np.load(copies.local(path), allow_pickle=False) as file:
        found = {name: file[name].astype(np.float32) for name in ("mean", "var")}
    expected = frozen.latent_shape(config.encoder.sizes)
    if any(x.shape != expected for x in found.values()):
        raise configs.ConfigError(
            f"{path}: mean and var must be {expected}, not "
            f"{found['mean'].shape} and {found['var'].shape}."
        )
    return found


def _decoded(run: _Run, latents: streaming.ArrayRows, stats) -> Iterator[np.ndarray]:
    """Yields uint8 images of latents, in order."""

    @jax.jit
    def decode(params, z):
        z = z.astype(jnp.float32)
        z = z if stats is None else rae.denormalize(z, stats)
        return reconstruction.to_uint8(run.loaded.decode(params, z))

    size = run.data.batch_size
    for z in streaming.rebatch(latents.batches(), size):
        row = np.minimum(np.arange(size), len(z) - 1)
        images = decode(run.params, jax.device_put(z[row], run.rows))
        yield distributed.to_host(images)[: len(z)]
