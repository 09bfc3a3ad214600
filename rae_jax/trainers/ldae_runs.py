"""Runs of l-DAE as encoders: their sizes, and their weights with the tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.models import ldae_encoder, pretrained, tokenizers
from rae_jax.trainers import tokenizer_networks, tokenizing
from rae_jax.training import checkpoints, state

TRAINER = "ldae"
RANDOM = "random"  # Weights of an encoder that is not trained.
# What a user chooses for given weights.
FREE = ("time_index", "clean", "dtype", "remat")

Sizes = dict[str, Any]


def sizes(run: ConfigDict) -> Sizes:
    """Returns the arguments of the `LDAEEncoder` that an l-DAE config leads to."""
    model, noise = run.model, run.noise
    found = {
        "image_size": run.data.image_size,
        "patch_size": run.tokenizer.patch_size,
        "latent_dim": run.tokenizer.latent_dim,
        "hidden_size": model.hidden_size,
        "depth": run.encoder_depth,
        "num_heads": model.num_heads,
        "tokenizer": tokenizing.name(run),
        "input_space": noise.input_space,
        "schedule": noise.schedule,
        "num_levels": noise.num_levels,
        "num_classes": model.get("num_classes", 0),
        "mlp_ratio": model.get("mlp_ratio", 4.0),
        "condition_divisor": model.get("condition_divisor", 4),
    }
    if found["tokenizer"] in tokenizers.CONVOLUTIONAL:
        block, size = run.tokenizer, run.data.image_size
        arguments = tokenizer_networks.kl_arguments(block, size)
        implied = ("image_size", "latent_channels", "dtype")
        found["vae"] = {k: v for k, v in arguments.items() if k not in implied}
    return found


def load(workdir: Path, given: ConfigDict, ema: bool) -> state.Params:
    """Reads the encoder half of an l-DAE run with its tokenizer, or a converted one.

    Args:
        workdir: Folder of the run, or of an encoder in our own layout.
        given: `encoder.sizes` of the config that wants it. The depth may be any that
            the run has trained.
        ema: Whether to take the average of the weights.

    Raises:
        ConfigError: It is another run, its sizes are others, or its tokenizer has not
            been fitted.
        CheckpointError: It has no checkpoint.
    """
    if "class" in pretrained.read_config(workdir):
        model = ldae_encoder.LDAEEncoder.from_pretrained(workdir)
        _check(given, model.arguments, workdir, "the encoder")
        return state.param_dict(model)
    run = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if run.trainer != TRAINER:
        raise configs.ConfigError(
            f"{workdir} holds a run of {run.trainer!r}, not of {TRAINER!r}."
        )
    stored = sizes(run) | {"depth": min(max(given.depth, 1), run.model.depth)}
    _check(given, stored, workdir, "the run")
    params = checkpoints.load_params(workdir, ("ema_params" if ema else "params",))
    tokenizer = tokenizing.load(workdir, run)
    in_image = stored["input_space"] == "image"
    return ldae_encoder.encoder_params(params, tokenizer, given.depth, in_image)


def _check(
    given: ConfigDict, stored: Mapping[str, Any], workdir: Path, where: str
) -> None:
    """Raises a ConfigError where sizes contradict those of stored weights."""
    wrong = [
        f"{k} = {v}, {where} has {stored[k]}"
        for k, v in given.to_dict().items()
        if k not in (*FREE, "vae") and k in stored and stored[k] != v
    ]
    ours, theirs = given.get("vae"), stored.get("vae")
    if theirs and given.get("tokenizer") in tokenizers.CONVOLUTIONAL:
        ours = _listed(ours.to_dict() if ours else {})
        wrong += [
            f"vae.{k} = {ours.get(k)}, {where} has {v}"
            for k, v in _listed(theirs).items()
            if ours.get(k) != v
        ]
    if wrong:
        raise configs.ConfigError(
            f"encoder.sizes do not fit {workdir}: {'; '.join(wrong)}."
        )


def _listed(values: Mapping[str, Any]) -> Sizes:
    """Returns values with tuples as lists, as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
