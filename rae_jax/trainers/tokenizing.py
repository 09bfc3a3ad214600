"""Tokenizers of l-DAE runs: described by shapes, made once, stored in the workdir.

Patch PCA is fitted on the training images; pixels are as they are; the others are read
from a run of `tokenizer` or, for "sd_vae", from diffusers' files. The scale of latents
that are not components is measured on training images, too.
"""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import copies, storage
from rae_jax.data import loader
from rae_jax.layers import patches
from rae_jax.models import tokenizers
from rae_jax.trainers import inputs, places
from rae_jax.trainers import tokenizer_networks as networks
from rae_jax.training import checkpoints, distributed, logs, sharding

MOMENTS_NAME = "latents.npz"
_BATCH = 16  # Images per device of which latents are measured at a time.

Tokenizer = tokenizers.Tokenizer


def name(config: ConfigDict) -> str:
    """Returns the name of a run's tokenizer; the configs of older runs have none."""
    return config.tokenizer.get("name", "pca")


def check(config: ConfigDict) -> None:
    """Raises a ConfigError for a tokenizer that cannot be, before files are read."""
    block, kind = config.tokenizer, name(config)
    networks.check_sizes(block, config.data.image_size)
    if block.norm not in tokenizers.NORMS:
        raise configs.ConfigError(
            configs.suggest(block.norm, tokenizers.NORMS, "tokenizer.norm")
        )
    if block.num_images < 1:
        raise configs.ConfigError(
            f"tokenizer.num_images must be positive, got {block.num_images}."
        )
    if kind not in tokenizers.LINEAR and not block.get("weights", ""):
        where = (
            "a hub id such as stabilityai/sd-vae-ft-ema, or a folder of diffusers"
            if kind == "sd_vae"
            else "the workdir of a run of configs/tokenizer.py"
        )
        raise configs.ConfigError(
            f"tokenizer.weights is empty, but {kind!r} is a trained tokenizer: give "
            f"{where}, or {networks.RANDOM!r} if an untrained one is what you want."
        )


def abstract(config: ConfigDict) -> Tokenizer:
    """Returns a run's tokenizer by shapes; no file is read.

    Raises:
        ConfigError: See `check`.
    """
    check(config)
    block = config.tokenizer
    scale = jax.ShapeDtypeStruct((block.latent_dim,), jnp.float32)
    if name(config) in tokenizers.LINEAR:
        dim = 3 * block.patch_size**2
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((dim,), (dim, dim))]
        return tokenizers.PatchPCA(*arrays, scale, block.latent_dim, block.patch_size)
    make = partial(networks.make_network, block, config.data.image_size)
    return networks.wrap(block, nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), scale)


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> Tokenizer:
    """Returns the tokenizer of a new or resumed run, on the mesh.

    It is made and stored unless there is a checkpoint that it was made for.

    Raises:
        ConfigError: See `check`, or `tokenizer.weights` are of another tokenizer.
        FileNotFoundError: They are not there.
    """
    check(config)
    workdir = storage.path(workdir)
    # Without a checkpoint the files may be those of another config, tried before.
    is_missing = checkpoints.finished_step(workdir) is None or not _file(
        workdir, config
    )
    # One answer for all, who may look before or after the first one has written.
    if distributed.from_main(np.asarray(int(is_missing))):
        if name(config) == "pca":
            _store_components(config, workdir)
        else:
            _store_network(config, workdir, mesh)
    distributed.barrier("the tokenizer")
    return sharding.place(load(workdir, config), mesh)


def load(workdir: Path, config: ConfigDict) -> Tokenizer:
    """Returns the tokenizer that a run has made.

    Args:
        workdir: Folder of the run.
        config: Its config.

    Raises:
        ConfigError: There is none yet.
    """
    block, path = config.tokenizer, _file(storage.path(workdir), config)
    if path is None:
        raise configs.ConfigError(
            f"{workdir} holds no fitted tokenizer ({name(config)!r}): it is made "
            "before the first step of a run of 'ldae'. Train there first, or give the "
            "workdir of a run that was."
        )
    if name(config) == "pca":
        components = tokenizers.load_components(path)
        _check_components(path, components, block)
        return tokenizers.make_pca(components, block.latent_dim, block.norm)
    with np.load(copies.local(path)) as file:
        scale = tokenizers.latent_scale(block.norm, file["mean"], file["var"])
    if name(config) == "pixels":
        return tokenizers.make_pixels(block.patch_size, scale)
    network = networks.network_class(block).from_pretrained(path.parent)
    return networks.wrap(block, network, jnp.asarray(scale, jnp.float32))


def fit_pca(config: ConfigDict) -> dict[str, np.ndarray]:
    """Fits the patch PCA on training images, in one streaming pass."""
    size = config.tokenizer.patch_size
    moments = tokenizers.PatchMoments(3 * size**2)
    data, limit = config.data, config.tokenizer.num_images
    with inputs.eval_batches(data, data.split, limit=limit, shared=False) as batches:
        for batch in batches:
            images = batch["image"][batch["mask"] > 0]
            tokens = patches.patchify(images, size).reshape(-1, 3 * size**2)
            moments.add(tokens)
    return moments.components()


def measure(
    tokenizer: Tokenizer, config: ConfigDict, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Returns mean and variance of latents that are not scaled, float64 (d,).

    One pass over `tokenizer.num_images` training images. Where latents are random,
    none is drawn: the mean of their variances is added to the variance of their means.
    """
    data = config.data.copy_and_resolve_references()
    with data.unlocked():
        data.batch_size = _BATCH * sharding.batch_parts(mesh)
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def moments(tokenizer, images, mask):
        mean, variance = tokenizer.moments(2 * inputs.to_float(images) - 1)
        weights = mask[:, None, None]
        count = jnp.sum(mask) * mean.shape[1]
        center = jnp.sum(weights * mean, axis=(0, 1)) / jnp.maximum(count, 1.0)
        squares = (mean - tokenizers.row(center)) ** 2 + variance
        return count, center, jnp.sum(weights * squares, axis=(0, 1))

    tokenizer = sharding.place(tokenizer, mesh)
    total, center, scatter = 0.0, 0.0, 0.0
    limit = config.tokenizer.num_images
    with inputs.eval_batches(data, data.split, limit=limit) as batches:
        for batch in batches:
            arrays = loader.to_global(batch, rows)
            found = moments(tokenizer, arrays["image"], arrays["mask"])
            count, mean, squares = (
                np.asarray(x, np.float64) for x in distributed.to_host(found)
            )
            # Chan, Golub and LeVeque 1983.
            share = count / max(total + count, 1.0)
            scatter = scatter + squares + (mean - center) ** 2 * total * share
            center, total = center + (mean - center) * share, total + count
    return {"mean": center, "var": scatter / total}


def _file(workdir: Path, config: ConfigDict) -> Path | None:
    """Returns the file that tells that a run's tokenizer is there, if it is."""
    last = (places.TOKENIZER_FOLDER, MOMENTS_NAME)
    wanted = (places.TOKENIZER_NAME,) if name(config) == "pca" else last
    found = (folder.joinpath(*wanted) for folder in places.folders(workdir))
    return next((path for path in found if path.is_file()), None)


def _store_components(config: ConfigDict, workdir: Path) -> None:
    """Fits patch PCA, or takes the components of another run; one process does."""
    if not distributed.is_main():
        return
    if config.tokenizer.get("weights", ""):
        path = places.resolve(config.tokenizer.weights, workdir)
        path = path / places.TOKENIZER_NAME if path.is_dir() else path
        if not path.is_file():
            raise configs.ConfigError(
                f"tokenizer.weights: {str(path)!r} does not exist. Give the workdir of "
                "a run whose components to use, or '' to fit them."
            )
        components = tokenizers.load_components(path)
        _check_components(path, components, config.tokenizer)
    else:
        components = fit_pca(config)
    tokenizers.save_components(workdir / places.TOKENIZER_NAME, components)


def _check_components(
    path: Path, components: dict[str, np.ndarray], block: ConfigDict
) -> None:
    size = math.isqrt(len(components["mean"]) // 3)
    if size != block.patch_size:
        raise configs.ConfigError(
            f"{path} holds components of patches of {size} pixels, not of "
            f"tokenizer.patch_size = {block.patch_size}."
        )


def _store_network(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Copies a tokenizer's network into the workdir and measures its latents."""
    block = config.tokenizer
    network = None if block.name == "pixels" else networks.load_network(config, workdir)
    ones = np.ones(block.latent_dim)
    found = {"mean": 0.0 * ones, "var": ones}
    if block.norm != "none":
        tokenizer = (
            tokenizers.make_pixels(block.patch_size)
            if network is None
            else networks.wrap(block, network, jnp.asarray(ones, jnp.float32))
        )
        found = measure(tokenizer, config, mesh)
        tokenizers.latent_scale(block.norm, **_moments(found))  # Raises if it has none.
        deviation = math.sqrt(np.mean(found["var"]))
        logs.note(f"Tokenizer {block.name}: latents deviate by {deviation:.4g}.")
    if not distributed.is_main():
        return
    folder = workdir / places.TOKENIZER_FOLDER
    with storage.writing_folder(folder, MOMENTS_NAME) as partial_folder:
        if network is not None:
            network.save_pretrained(partial_folder)
        np.savez(partial_folder / MOMENTS_NAME, **found)


def _moments(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"mean": found["mean"], "variance": found["var"]}
