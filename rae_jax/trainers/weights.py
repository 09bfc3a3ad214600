"""Weights wherever they are: in files of any layout, on the hub, or in a run."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.convert import (
    hub,
    kl_names,
    published,
    sources,
    stats_files,
    tables,
)
from rae_jax.models import (
    autoencoder_kl,
    conversion,
    encoders,
    kinds,
    ldae_encoder,
    pretrained,
    rae,
    rae_layouts,
    recording,
    vit_encoder,
)
from rae_jax.trainers import (
    backbones,
    frozen,
    latent_network,
    ldae_runs,
    mae,
    rae_decoder,
    tokenizer,
)
from rae_jax.training import checkpoints, state

LAYOUT = "checkpoint"
KL = "autoencoder_kl"  # Of `kinds.KINDS`.
PARTS = {"ema": "ema_params", "model": "params"}
# What is taken of a run: its average but where that is not what was trained.
USUAL_PARTS = {"mae": "model", "mocov3": "model"}
MAKERS = {"latent_diffusion": latent_network, "rae_decoder": rae_decoder, "mae": mae}
MAKERS |= {"tokenizer": tokenizer}
FILES = (*pretrained.HUB_FILES, "*.npz")

Arguments = pretrained.Arguments
Opened = conversion.Network | conversion.Statistics


def open_source(
    source: str,
    kind: str | None = None,
    part: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Opened:
    """Opens weights wherever they are.

    Args:
        source: A file or folder in any layout, the workdir of a run, a hub id with or
            without a file in it, or a name of `published`.
        kind: See `conversion.open_weights`.
        part: Likewise; of a run "ema" or "model".
        overrides: Likewise.

    Raises:
        FileNotFoundError: Nothing is there; the message says how to get it.
        ValueError: It is of another kind, or does not fit.
    """
    overrides = dict(overrides or {})
    if source in published.AUTOENCODERS and kind in (None, "autoencoder"):
        model = rae.RAE.from_pretrained(source, **overrides)
        return conversion.from_model(model, kinds.OFFICIAL)
    path = _locate(source)
    if is_run(path):
        return open_run(path, kind, part, overrides)
    return conversion.open_weights(path, kind, part, overrides)


def load(opened: conversion.Network, **overrides: Any) -> nnx.Module:
    """Returns the network of opened weights.

    Args:
        opened: From `open_source`, of a class of `pretrained`.
        **overrides: Constructor arguments, such as `dtype` and `remat`.
    """
    arguments = recording.merged(opened.arguments, overrides)
    network = pretrained.Skeleton(opened.cls, arguments)
    items = ((name, opened.parameters.read(name)) for name in network.shapes)
    return network.filled(items, (), opened.parameters.origin)


def load_autoencoder(
    source: str, latent_stats: str | None = None, **overrides: Any
) -> rae.RAE:
    """Loads an autoencoder from anything that `open_source` takes.

    Args:
        source: See `open_source`; a KL autoencoder is one, too.
        latent_stats: File of statistics in place of the autoencoder's own.
        **overrides: `dtype` and `remat`.

    Raises:
        FileNotFoundError, ValueError: See `open_source`; or the statistics are for
            other latents.
    """
    options = {} if latent_stats is None else {"eps": rae_layouts.OFFICIAL_EPS}
    if is_kl(source):
        overrides.pop("remat", None)  # It has no stack of blocks.
        model = rae.RAE.from_kl(load(open_source(source, KL), **overrides), **options)
    else:
        model = load(open_source(source, "autoencoder"), **options, **overrides)
    if latent_stats is None:
        return model
    if model.latent_var is None:
        raise ValueError(
            f"{source} is normalised as in diffusers, by deviations. Statistics of "
            "variances cannot take their place."
        )
    stats = rae_layouts.read_stats(latent_stats, model.latent_mean.shape).arrays()
    model.latent_mean[...] = jnp.asarray(stats["mean"])
    model.latent_var[...] = jnp.asarray(stats["var"])
    return model


def is_kl(source: str | os.PathLike) -> bool:
    """Returns whether weights are those of a KL autoencoder.

    Raises:
        FileNotFoundError, ValueError: See `open_source`.
    """
    source = os.fspath(source)
    if source in published.AUTOENCODERS:
        return False
    path = _locate(source)
    settings = pretrained.read_config(path)
    if settings:
        name = autoencoder_kl.AutoencoderKL.__name__
        return kl_names.is_settings(settings) or settings.get("class") == name
    return kl_names.MARK in sources.open_tensors(path).shapes


def _locate(source: str) -> Path:
    """Returns where weights are on this machine; a run in a bucket stays there."""
    source = published.SOURCES.get(source, source)
    if storage.is_bucket(source) and is_run(storage.path(source)):
        return storage.path(source)
    return hub.locate(source, allow=FILES)


def is_run(path: Path) -> bool:
    """Returns whether a folder is the workdir of a run."""
    return "trainer" in pretrained.read_config(path)


def open_run(
    workdir: Path, kind: str | None, part: str | None, overrides: Mapping[str, Any]
) -> Opened:
    """Opens the newest checkpoint of a run.

    Args:
        workdir: Its folder. A diffusion run gives its network, a run of l-DAE, MAE or
            MoCo v3 its encoder (with the kind "mae" also MAE's decoder), a run of
            latent statistics these, one of a convolutional tokenizer its autoencoder,
            and a decoder run its decoder, or with the kind "autoencoder" that and its
            encoder.
        kind: One of those; None for the first.
        part: Key of `PARTS`; None for the usual one.
        overrides: `time_index`, `depth` and `clean` of an l-DAE encoder; `normalize`
            of one of MAE or MoCo v3; `latent_stats` of an autoencoder.

    Raises:
        CheckpointError: There is no checkpoint yet.
        ValueError: The run has trained nothing of this kind.
    """
    config = configs.read_config(storage.path(workdir) / checkpoints.CONFIG_NAME)
    part = part or USUAL_PARTS.get(config.trainer, "ema")
    if part not in PARTS:
        raise ValueError(configs.suggest(part, list(PARTS), "part of a run"))
    openers = {
        "latent_diffusion": {config.get("network", ""): _open_trained},
        "rae_decoder": {"decoder": _open_trained, "autoencoder": _open_autoencoder},
        "latent_stats": {kinds.STATS: _open_stats},
        "ldae": {"encoder": _open_ldae},
        "mae": {"encoder": _open_backbone, "mae": _open_trained},
        "mocov3": {"encoder": _open_backbone},
        "tokenizer": {KL: _open_trained},
    }.get(config.trainer)
    if openers is None:
        raise ValueError(f"Runs of {config.trainer!r} have no weights to convert.")
    kind = kind or next(iter(openers))
    if kind not in openers:
        raise ValueError(
            f"{workdir} is a run of {config.trainer!r}, which gives "
            f"{' or '.join(openers)}, not {kind}."
        )
    return openers[kind](config, storage.path(workdir), part, dict(overrides))


def _open_trained(
    config: ConfigDict, workdir: Path, part: str, overrides: Arguments
) -> conversion.Network:
    """Opens the network that a run has trained."""
    _check_overrides(overrides)
    model = _abstract(MAKERS[config.trainer].make_model(config))
    params = checkpoints.load_params(workdir, (PARTS[part],))
    return _network(type(model), model.arguments, params, workdir)


def _open_autoencoder(
    config: ConfigDict, workdir: Path, part: str, overrides: Arguments
) -> conversion.Network:
    _check_overrides(overrides, "latent_stats")
    shape = frozen.latent_shape(config.encoder.sizes)
    sizes = config.encoder.sizes.to_dict()
    file = overrides.get("latent_stats")
    stats = rae_layouts.read_stats(file, shape).arrays()
    make_encoder = partial(encoders.make_encoder, config.encoder.name, **sizes)
    networks = {"encoder": make_encoder, "decoder": rae_decoder.make_model(config)}
    arguments = {"latent_shape": shape, "eps": rae_layouts.OFFICIAL_EPS if file else 0}
    for name, make in networks.items():
        model = _abstract(make)
        record = json.loads(model.arguments_json)
        arguments[name] = {"class": type(model).__name__, "arguments": record}
    params = {
        "encoder": frozen.load_encoder(config.encoder, workdir),
        "decoder": checkpoints.load_params(workdir, (PARTS[part],)),
        "latent_mean": stats["mean"],
        "latent_var": stats["var"],
    }
    return _network(rae.RAE, arguments, params, workdir)


def _open_ldae(
    config: ConfigDict, workdir: Path, part: str, overrides: Arguments
) -> conversion.Network:
    _check_overrides(overrides, "time_index", "depth", "clean")
    arguments = ldae_runs.sizes(config) | overrides
    params = ldae_runs.load(workdir, ConfigDict(arguments), part == "ema")
    return _network(ldae_encoder.LDAEEncoder, arguments, params, workdir)


def _open_backbone(
    config: ConfigDict, workdir: Path, part: str, overrides: Arguments
) -> conversion.Network:
    _check_overrides(overrides, "normalize")
    arguments = backbones.arguments(config) | {"normalize": False} | overrides
    name, sizes = arguments["name"], ConfigDict(arguments)
    del sizes.name
    params = backbones.load(workdir, name, sizes, part == "ema")
    return _network(vit_encoder.ViTEncoder, arguments, params, workdir)


def _open_stats(
    config: ConfigDict, workdir: Path, part: str, overrides: Arguments
) -> conversion.Statistics:
    _check_overrides(overrides)
    return conversion.Statistics(LAYOUT, stats_files.read_stats(workdir))


def _check_overrides(overrides: Arguments, *known: str) -> None:
    """Refuses what contradicts a run's own config."""
    for name in overrides:
        if name not in known:
            raise ValueError(
                f"The config of the run says all about its networks; {name} cannot be "
                f"set{', only ' + ', '.join(known) if known else ''}."
            )


def _abstract(make: Callable[..., nnx.Module]) -> nnx.Module:
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def _network(
    cls: type[nnx.Module], arguments: Arguments, params: state.Params, workdir: Path
) -> conversion.Network:
    """Returns trained parameters, which must be all that a network has."""
    flat = flax.traverse_util.flatten_dict(params)
    arrays = {".".join(map(str, path)): np.asarray(x) for path, x in flat.items()}
    source = sources.from_arrays(arrays, str(workdir))
    arguments, shapes = conversion.structure(cls, arguments)
    tables.check_ours(source, shapes)
    kind = kinds.of_class(cls.__name__)
    return conversion.Network(kind, LAYOUT, cls, arguments, shapes, source)
