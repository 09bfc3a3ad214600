"""Networks that a run reads and never changes, by shape and with weights."""

import os
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
from rae_jax.models import encoders, ldae, metrics_nets, perceptual, tokenizers
from rae_jax.training import checkpoints, state

RANDOM = "random"
TOKENIZER_NAME = "tokenizer.npz"
STATS_NAME = "latent_stats.npz"


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


def resolve(path: str, workdir: Path) -> Path:
    """Finds a file or folder that a config names.

    A relative path counts from the run's workdir, so that runs that lie side by side
    can be moved together; failing that, from the current folder.
    """
    beside = Path(os.path.normpath(Path(workdir) / path))
    return beside if beside.exists() else Path(path)


def load_encoder(config: ConfigDict, workdir: Path) -> state.Params:
    """Reads the weights of `config.encoder` for a run in `workdir`.

    `weights` is the workdir of an l-DAE run, or "random" for an untrained encoder.

    Raises:
        ConfigError: If `weights` is empty, or the run has other sizes.
        CheckpointError: If the run has no checkpoint.
    """
    if not config.weights:
        raise configs.ConfigError(
            "encoder.weights is empty. Give the workdir of a trained l-DAE, or "
            f"{RANDOM!r} if an untrained encoder is what you want."
        )
    if config.weights == RANDOM:
        sizes = config.sizes.to_dict()
        model = encoders.make_encoder(config.name, rngs=nnx.Rngs(0), **sizes)
        return state.param_dict(model)
    return load_ldae(resolve(config.weights, workdir), config.sizes, config.ema)


def load_ldae(workdir: Path, sizes: ConfigDict, ema: bool) -> state.Params:
    """Reads the encoder half of an l-DAE run, with its patch PCA."""
    run = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if run.trainer != "ldae":
        raise configs.ConfigError(
            f"{workdir} holds a run of {run.trainer!r}, not of 'ldae'."
        )
    expected = ldae_sizes(run)
    given = {k: v for k, v in sizes.to_dict().items() if k in expected}
    wrong = [f"{k} = {given[k]}, the run has {expected[k]}" for k in given]
    wrong = [w for k, w in zip(given, wrong, strict=True) if given[k] != expected[k]]
    if wrong:
        raise configs.ConfigError(
            f"encoder.sizes do not fit the run in {workdir}: {'; '.join(wrong)}."
        )
    params = checkpoints.load_params(workdir, ("ema_params" if ema else "params",))
    components = tokenizers.load_components(workdir / TOKENIZER_NAME)
    pca = tokenizers.make_pca(components, sizes.latent_dim)
    return ldae.encoder_params(
        params, pca.basis[: sizes.latent_dim], pca.mean, sizes.depth
    )


def ldae_sizes(run: ConfigDict) -> dict[str, int]:
    """Returns the encoder sizes that an l-DAE config leads to."""
    return {
        "image_size": run.data.image_size,
        "patch_size": run.tokenizer.patch_size,
        "latent_dim": run.tokenizer.latent_dim,
        "hidden_size": run.model.hidden_size,
        "depth": run.encoder_depth,
        "num_heads": run.model.num_heads,
    }


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
    """Reads latent statistics: a workdir of `latent_stats`, or an .npz file.

    "none" means mean 0 and variance 1.

    Raises:
        ConfigError: If the file is missing or has another shape.
    """
    shape = latent_shape(sizes)
    if path == "none":
        return {"mean": np.zeros(shape, np.float32), "var": np.ones(shape, np.float32)}
    file = resolve(path, workdir)
    file = file / STATS_NAME if file.is_dir() else file
    if not file.is_file():
        raise configs.ConfigError(
            f"latent_stats: {str(file)!r} does not exist. Make it with "
            "rae-jax train --config configs/latent_stats.py, or set 'none'."
        )
    with np.load(file) as data:
        stats = {name: data[name] for name in ("mean", "var")}
    if stats["mean"].shape != shape:
        raise configs.ConfigError(
            f"latent_stats: {str(file)!r} has shape {stats['mean'].shape}, "
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
