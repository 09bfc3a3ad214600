"""Networks of trained tokenizers: checked, made, read and wrapped."""

from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.convert import hub, kl_names
from rae_jax.models import (
    autoencoder_kl,
    learned_tokenizers,
    patch_autoencoder,
    pretrained,
    tokenizers,
)
from rae_jax.trainers import places
from rae_jax.training import checkpoints

RANDOM = "random"
_TRAINER = "tokenizer"


def check_sizes(block: ConfigDict, image_size: int) -> None:
    """Raises a ConfigError for a tokenizer block whose sizes do not fit together."""
    kind = block.get("name", "pca")
    if kind not in tokenizers.NAMES:
        raise configs.ConfigError(
            configs.suggest(kind, tokenizers.NAMES, "tokenizer.name")
        )
    size, latent_dim = block.patch_size, block.latent_dim
    if size < 1 or image_size % size:
        raise configs.ConfigError(
            f"data.image_size = {image_size} is not a multiple of tokenizer.patch_size "
            f"= {size}."
        )
    patch_dim = 3 * size**2
    try:
        tokenizers.check_latent_dim(latent_dim, patch_dim)
    except ValueError as error:
        raise configs.ConfigError(str(error)) from error
    if kind == "pixels" and latent_dim != patch_dim:
        raise configs.ConfigError(
            f"tokenizer.latent_dim = {latent_dim}, but a patch of {size} pixels has "
            f"{patch_dim} values, and pixels keep them all: set it to {patch_dim}."
        )
    if kind in tokenizers.CONVOLUTIONAL:
        _check_convolutional(block)


def _check_convolutional(block: ConfigDict) -> None:
    group = learned_tokenizers.GROUP
    if block.latent_dim % group**2:
        raise configs.ConfigError(
            f"tokenizer.latent_dim = {block.latent_dim} is not a multiple of "
            f"{group**2}: a token of {block.name!r} is {group} x {group} latents."
        )
    levels = len(_sizes(block)["block_out_channels"])
    if group * 2 ** (levels - 1) != block.patch_size:
        raise configs.ConfigError(
            f"tokenizer.patch_size = {block.patch_size}, but the {levels} levels of "
            "tokenizer.sizes.block_out_channels make tokens of "
            f"{group * 2 ** (levels - 1)} pixels."
        )


def make_network(block: ConfigDict, image_size: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the network of a trained tokenizer, with random parameters."""
    if block.name in tokenizers.PATCHWISE:
        return patch_autoencoder.PatchAutoencoder(
            block.patch_size, block.latent_dim, block.name == "patch_vae", rngs=rngs
        )
    arguments = kl_arguments(block, image_size)
    return autoencoder_kl.AutoencoderKL(**arguments, rngs=rngs)


def kl_arguments(block: ConfigDict, image_size: int) -> dict[str, Any]:
    """Returns the arguments of the `AutoencoderKL` of "conv_vae" or "sd_vae"."""
    published = block.name == "sd_vae"
    return _sizes(block) | dict(
        image_size=image_size,
        latent_channels=block.latent_dim // learned_tokenizers.GROUP**2,
        scaling_factor=kl_names.SCALING_FACTOR if published else 1.0,
    )


def load_network(config: ConfigDict, workdir: Path) -> nnx.Module:
    """Reads the network that `tokenizer.weights` names.

    Raises:
        ConfigError: It is of another kind or of other sizes, or not trained yet.
        FileNotFoundError: Nothing is there; it says how to get it.
    """
    block, size = config.tokenizer, config.data.image_size
    if block.weights == RANDOM:
        return make_network(block, size, rngs=nnx.Rngs(0))
    path = places.resolve(block.weights, workdir)
    if block.name == "sd_vae":
        return _load_published(block, path, size)
    if not path.is_dir():
        raise configs.ConfigError(
            f"tokenizer.weights: {block.weights!r} does not exist. Train it with "
            "rae-jax train --config configs/tokenizer.py:VARIANT --workdir "
            f"{block.weights}"
        )
    run = configs.read_config(path / checkpoints.CONFIG_NAME)
    if run.trainer != _TRAINER:
        raise configs.ConfigError(
            f"tokenizer.weights: {path} holds a run of {run.trainer!r}, not of "
            f"{_TRAINER!r}."
        )
    _check_run(block, run.tokenizer, path)
    params = flax.traverse_util.flatten_dict(
        checkpoints.load_params(path, ("ema_params",))
    )
    model = nnx.eval_shape(lambda: make_network(block, size, rngs=nnx.Rngs(0)))
    network = pretrained.Skeleton(type(model), model.arguments)
    items = ((".".join(key), np.asarray(value)) for key, value in params.items())
    return network.filled(items, (), str(path))


def _check_run(block: ConfigDict, stored: ConfigDict, path: Path) -> None:
    """Raises a ConfigError where a tokenizer run has trained another tokenizer."""
    keys = ("name", "patch_size", "latent_dim")
    given = {key: block[key] for key in keys}
    found = {key: stored[key] for key in keys}
    if block.name in tokenizers.CONVOLUTIONAL:
        given, found = given | _sizes(block), found | _sizes(stored)
        given.pop("dtype"), found.pop("dtype")
    wrong = [
        f"{key} = {value!r}, the run has {found[key]!r}"
        for key, value in given.items()
        if value != found[key]
    ]
    if wrong:
        raise configs.ConfigError(
            f"config.tokenizer does not fit {path}: {'; '.join(wrong)}."
        )


def _load_published(block: ConfigDict, path: Path, image_size: int) -> nnx.Module:
    path = hub.locate(path, allow=pretrained.HUB_FILES)
    given = kl_arguments(block, image_size)
    wrong = kl_names.differences(given, autoencoder_kl.read_arguments(path))
    if wrong:
        raise configs.ConfigError(
            f"config.tokenizer does not fit {path}: {'; '.join(wrong)}. "
            "latent_dim is four times latent_channels."
        )
    return autoencoder_kl.AutoencoderKL.from_pretrained(path, **given)


def _sizes(block: ConfigDict) -> dict[str, Any]:
    """Returns the sizes of a convolutional tokenizer; those published by default."""
    given = block.get("sizes")
    sizes = blocks.tokenizer()["sizes"] if given is None else given.to_dict()
    return sizes | {"block_out_channels": tuple(sizes["block_out_channels"])}


def network_class(block: ConfigDict) -> Any:
    patchwise = block.name in tokenizers.PATCHWISE
    return (
        patch_autoencoder.PatchAutoencoder
        if patchwise
        else autoencoder_kl.AutoencoderKL
    )


def wrap(
    block: ConfigDict, network: nnx.Module, scale: jax.Array
) -> tokenizers.Tokenizer:
    patchwise = block.name in tokenizers.PATCHWISE
    code = learned_tokenizers.PatchCode if patchwise else learned_tokenizers.ConvCode
    return code.of(network, scale)
