"""What a diffusion model is trained on: an encoder's latents, made here or cached.

`config.data.latents` says which: "" encodes the images inside the step; a folder holds
latents that `rae-jax prepare --latents` wrote, and then no encoder is loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.data import latents
from rae_jax.models import rae
from rae_jax.trainers import frozen as networks_of
from rae_jax.trainers import inputs, latent_cache, latent_network
from rae_jax.training import checkpoints

# (networks, batch, key) -> normalised latents (b, h, w, c).
OfBatch = Callable[[Any, dict[str, jax.Array], jax.Array | None], jax.Array]
Reader = Callable[[Any, dict[str, jax.Array]], tuple[nnx.Module, jax.Array]]


def frozen(config: ConfigDict) -> dict[str, Any]:
    """Returns the shapes of what the step reads: "stats" and perhaps "encoder"."""
    stats = networks_of.abstract_stats(config.encoder.sizes)
    return {"stats": stats} | encoder(config)


def load(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Reads what `frozen` describes, for a run in `workdir`.

    Raises:
        ConfigError: Weights or statistics are missing, or the cached latents are
            not those that the config describes.
    """
    networks, sizes = load_encoder(config, workdir), config.encoder.sizes
    stats = networks_of.load_stats(config.latent_stats, sizes, workdir)
    return {"stats": stats} | networks


def encoder(config: ConfigDict) -> dict[str, Any]:
    """Returns the shapes of "encoder", or nothing where latents are cached."""
    if inputs.cache(config.data):
        return {}
    return {"encoder": networks_of.encoder(config.encoder)[1]}


def load_encoder(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Reads "encoder", or checks the cached latents that stand in for it."""
    if inputs.cache(config.data):
        check(config, workdir)
        return {}
    return {"encoder": networks_of.load_encoder(config.encoder, workdir)}


def abstract_batch(config: ConfigDict, *, both: bool = False) -> inputs.Shapes:
    """Returns the shapes of a global batch: with "image", or with "latent".

    Args:
        config: The run.
        both: Whether a cached latent (h, w, m) comes with that of its mirror image,
            as (2, h, w, m).

    Raises:
        ConfigError: Cached latents are to be aligned with features of images.
    """
    if not inputs.cache(config.data):
        return inputs.abstract_batch(config.data)
    if latent_network.aligns(config) and config.repa.target == "encoder":
        raise configs.ConfigError(
            "repa.target = 'encoder' needs the images, which data.latents replaces: "
            "set repa.target to 'latent', or data.latents to ''."
        )
    shape = latent_cache.raw_shape(config)
    return inputs.abstract_batch(config.data, (2, *shape) if both else shape)


def reader(config: ConfigDict, *, both: bool = False) -> Reader:
    """Returns (networks, batch) -> the encoder and what `rae.encode_raw` made.

    Args:
        config: The run.
        both: Whether mirror images follow the images, as further rows.
    """
    graphdef, shapes = networks_of.encoder(config.encoder)

    def encode(networks, batch):
        encoder = nnx.merge(graphdef, networks["encoder"])
        images = inputs.to_float(batch["image"])
        if both:
            images = jnp.concatenate([images, images[:, :, ::-1]])
        return encoder, rae.encode_raw(encoder, images)

    def read(networks, batch):
        raw = batch["latent"].astype(jnp.float32)
        if both:
            raw = jnp.concatenate([raw[:, 0], raw[:, 1]])
        # Without weights: its constants are all that is needed of it.
        return nnx.merge(graphdef, shapes), raw

    return read if inputs.cache(config.data) else encode


def of_batch(config: ConfigDict) -> OfBatch:
    """Returns what makes normalised latents (b, h, w, c) of a batch.

    It is called as of_batch(networks, batch, key) inside the step, with the arrays of
    `frozen`; the key is for latents that are drawn, as a VAE's are.
    """
    read = reader(config)

    def normalised(networks, batch, key=None):
        encoder, raw = read(networks, batch)
        z = rae.to_latents(encoder, raw, key)
        return rae.normalize(z, networks["stats"])

    return normalised


def check(config: ConfigDict, workdir: Path) -> None:
    """Compares the cached latents that a config names with its encoder and data.

    The encoder's weights are compared by their checksum where they are at hand; on a
    machine without them it must be the same name that the latents were made with.

    Raises:
        ConfigError: They are others; the message names both.
    """
    folder = inputs.cache(config.data)
    source = latents.Latents(folder)
    stored, asked = source.metadata, latent_cache.encoder_of(config.encoder)
    pairs = [("encoder.name", asked["name"], stored["encoder"]["name"])]
    keys = sorted(asked["sizes"].keys() | stored["encoder"]["sizes"].keys())
    for key in keys:
        sizes = (part["sizes"].get(key) for part in (asked, stored["encoder"]))
        pairs.append((f"encoder.sizes.{key}", *sizes))
    pairs += [
        (f"data.{key}", config.data[key], stored[key]) for key in latent_cache.SAME
    ]
    if config.data.flip and not source.flip:
        pairs.append(("data.flip", True, False))
    wrong = [f"{k} = {a!r}, the cache has {b!r}" for k, a, b in pairs if a != b]
    wrong = wrong or _wrong_weights(config, workdir, stored)
    if wrong:
        raise configs.ConfigError(
            f"The latents in {folder} are not those of this config: "
            f"{'; '.join(wrong)}. Change the config, or prepare the latents again: "
            "rae-jax prepare --latents FOLDER --config FILE.py:VARIANT."
        )


def _wrong_weights(
    config: ConfigDict, workdir: Path, stored: dict[str, Any]
) -> list[str]:
    given, cached = config.encoder.weights, stored["weights"]
    here = networks_of.resolve(given, workdir).exists() if given else False
    if given == cached and not here:
        return []
    try:
        params = networks_of.load_encoder(config.encoder, workdir)
    except (OSError, configs.ConfigError, checkpoints.CheckpointError) as error:
        why = str(error).splitlines()[0]
        return [f"encoder.weights = {given!r} ({why}), the cache has {cached!r}"]
    found = latent_cache.checksum(params)
    if found == stored["checksum"]:
        return []
    return [
        f"encoder.weights = {given!r} with checksum {found[:12]}, the cache has "
        f"{cached!r} with {stored['checksum'][:12]}"
    ]
