"""Networks that a run reads and never changes, by shape and with weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.convert import encoder_names, hub, kl_names, stats_files
from rae_jax.models import (
    autoencoder_kl,
    encoders,
    metrics_nets,
    perceptual,
    pretrained,
    vit_encoder,
)
from rae_jax.trainers import backbones, ldae_runs, places
from rae_jax.training import state

RANDOM = ldae_runs.RANDOM
STATS_NAME = stats_files.OWN_NAME
resolve = places.resolve
STATS_FILES = (STATS_NAME, stats_files.OFFICIAL_NAME)


def abstract(
    make_model: Callable[..., nnx.Module],
) -> tuple[nnx.GraphDef, state.Params]:
    """Returns the static part and the parameter shapes of a module."""
    model = nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0)))
    return nnx.graphdef(model), state.param_dict(model)


def encoder(config: ConfigDict) -> tuple[nnx.GraphDef, state.Params]:
    """Returns the static part and the parameter shapes of `config.encoder`."""
    sizes = config.sizes.to_dict()
    return abstract(lambda rngs: encoders.make_encoder(config.name, rngs=rngs, **sizes))


def load_encoder(config: ConfigDict, workdir: Path) -> state.Params:
    """Reads the weights of `config.encoder` for a run in `workdir`.

    `weights` is "random" for an untrained encoder; for "ldae" the workdir of its run;
    for "pixels" nothing; for the others a hub id, or a folder or file in the layout of
    Hugging Face, diffusers ("sd_vae") or in ours, or for "mae" and "mocov3" the workdir
    of a run.

    Raises:
        ConfigError: If `weights` is empty, or the files have other sizes.
        CheckpointError: If the run has no checkpoint.
        FileNotFoundError: If nothing is there; it says what to download and how.
        ValueError: If tensors are missing, unexpected or wrongly shaped.
    """
    if config.name in encoders.OWN_DECODER:
        return state.param_dict(load_pair(config, workdir)[0])
    _check_named(config)
    if config.weights == RANDOM:
        sizes = config.sizes.to_dict()
        model = encoders.make_encoder(config.name, rngs=nnx.Rngs(0), **sizes)
        return state.param_dict(model)
    path = resolve(config.weights, workdir)
    if config.name == ldae_runs.TRAINER:
        return ldae_runs.load(path, config.sizes, config.ema)
    if backbones.is_run(path):
        ema = config.get("ema", False)
        return backbones.load(path, config.name, config.sizes, ema)
    return load_pretrained(config.name, path, config.sizes)


def load_pair(config: ConfigDict, workdir: Path) -> encoders.Pair:
    """Reads encoder and decoder of a `config.encoder` that has both.

    Raises:
        ConfigError: Its encoder has no decoder of its own, `weights` is empty, or the
            files have other sizes.
        FileNotFoundError, ValueError: See `load_encoder`.
    """
    sizes = config.sizes.to_dict()
    if config.name not in encoders.OWN_DECODER or config.name == "pixels":
        return encoders.make_pair(config.name, rngs=nnx.Rngs(0), **sizes)
    _check_named(config)
    if config.weights == RANDOM:
        return encoders.make_pair(config.name, rngs=nnx.Rngs(0), **sizes)
    path = hub.locate(resolve(config.weights, workdir), allow=pretrained.HUB_FILES)
    given = encoders.kl_arguments(sizes)
    _check_differences(
        kl_names.differences(given, autoencoder_kl.read_arguments(path)), path
    )
    model = autoencoder_kl.AutoencoderKL.from_pretrained(path, **given)
    return model.encoder, model.decoder


def _check_named(config: ConfigDict) -> None:
    if not config.weights:
        raise configs.ConfigError(
            "encoder.weights is empty. Give the workdir of a trained l-DAE, a hub id "
            "or folder of a pretrained encoder, or "
            f"{RANDOM!r} if an untrained encoder is what you want."
        )


def _check_differences(wrong: list[str], path: Path) -> None:
    if wrong:
        raise configs.ConfigError(
            f"config.encoder does not fit {path}: {'; '.join(wrong)}."
        )


def load_pretrained(name: str, source: Path, sizes: ConfigDict) -> state.Params:
    """Reads a pretrained encoder, whose files must be of the same family and sizes."""
    path = hub.locate(source, allow=pretrained.HUB_FILES)
    given = {"name": name} | sizes.to_dict()
    stored = vit_encoder.read_arguments(path)
    wrong = encoder_names.differences(given, stored) if stored else []
    _check_differences(wrong, path)
    return state.param_dict(vit_encoder.ViTEncoder.from_pretrained(path, **given))


def backbone_name(config: ConfigDict) -> str:
    """Returns which frozen network of a decoder run is its critic's backbone.

    `gan.backbone.name` "encoder" stands for the run's own encoder.
    """
    return "encoder" if config.gan.backbone.name == "encoder" else "backbone"


def backbone_block(config: ConfigDict) -> ConfigDict:
    """Returns the block of a decoder config that describes the critic's backbone."""
    own = backbone_name(config) == "encoder"
    block = config.encoder if own else config.gan.backbone
    if block.name in encoders.OWN_DECODER:
        raise configs.ConfigError(
            f"The critic's backbone cannot be {block.name!r}: it reads blocks of a "
            "vision transformer. Give another gan.backbone, or gan.weight=0."
        )
    return block


def load_backbone(config: ConfigDict, workdir: Path) -> state.Params:
    """Reads the weights of `config.gan.backbone` as `load_encoder` does.

    Raises:
        FileNotFoundError: If nothing is there; it says what else can be done.
    """
    try:
        return load_encoder(config.gan.backbone, workdir)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nThese are the weights of the critic's backbone, gan.backbone. "
            "Another one is the run's own encoder, gan.backbone.name=encoder with "
            "gan.blocks to match; gan.weight=0 trains without a critic."
        ) from error


def lpips(backbone: str) -> tuple[nnx.GraphDef, state.Params]:
    """Returns the static part and the parameter shapes of LPIPS."""
    return abstract(lambda rngs: perceptual.LPIPS(backbone, rngs=rngs))


def load_lpips(backbone: str) -> state.Params:
    """Reads the LPIPS weights that a package carries."""
    return metrics_nets.load_lpips(backbone)


def latent_shape(sizes: ConfigDict) -> tuple[int, int, int]:
    """Returns the shape (h, w, c) of the latents of an encoder."""
    grid = sizes.image_size // sizes.patch_size
    return (grid, grid, sizes.hidden_size)


def abstract_stats(sizes: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of latent statistics."""
    shape = jax.ShapeDtypeStruct(latent_shape(sizes), jnp.float32)
    return {"mean": shape, "var": shape}


def load_stats(path: str, sizes: ConfigDict, workdir: Path) -> dict[str, np.ndarray]:
    """Reads latent statistics: a workdir of `latent_stats`, an .npz file or a stat.pt.

    A stat.pt is in the official layout, where a mean of None is zero; it may lie on the
    hub, "owner/name:path/in/it". "none" means mean 0 and variance 1.

    Raises:
        ConfigError: If the file is missing or has another shape.
    """
    shape = latent_shape(sizes)
    if path == "none":
        return {"mean": np.zeros(shape, np.float32), "var": np.ones(shape, np.float32)}
    try:
        file = hub.locate(resolve(path, workdir), allow=STATS_FILES)
        stats = stats_files.read_stats(file).arrays()
    except FileNotFoundError as error:
        raise configs.ConfigError(
            f"latent_stats: {path!r} does not exist. Make it with "
            "rae-jax train --config configs/latent_stats.py, or set 'none'. "
            f"({error})"
        ) from error
    if stats["var"].shape != shape:
        raise configs.ConfigError(
            f"latent_stats: {path!r} has shape {stats['var'].shape}, "
            f"the encoder's latents have {shape}."
        )
    return stats


def check_shapes(name: str, expected: state.Params, given: state.Params) -> None:
    """Raises a ConfigError that lists all parameters that do not fit."""
    flat_expected = _shapes(expected)
    flat_given = _shapes(given)
    problems = [
        f"{key}: expected {flat_expected.get(key)}, got {flat_given.get(key)}"
        for key in sorted(flat_expected.keys() | flat_given.keys())
        if flat_expected.get(key) != flat_given.get(key)
    ]
    if problems:
        raise configs.ConfigError(f"{name} does not fit:\n  " + "\n  ".join(problems))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(tree)
    return {".".join(map(str, k)): tuple(np.shape(v)) for k, v in flat.items()}
