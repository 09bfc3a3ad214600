"""Encoders whose sizes a config takes from the weights that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.models import ldae_encoder, pretrained, vit_encoder
from rae_jax.trainers import backbones, ldae_runs, places
from rae_jax.training import checkpoints

LDAE = ldae_encoder.LDAEEncoder.__name__


def follow(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns a config whose encoder is the one that `encoder.weights` holds.

    It does so where `encoder.match` says so and the weights are a run of ldae, mae or
    mocov3, or a folder with the encoder of one. The image size of the data, `row` and
    `tier` follow, too, and the depth of an l-DAE reaches all blocks of `sweep.blocks`.

    Args:
        config: Any config.
        workdir: Its folder, from which `encoder.weights` counts.
    """
    block = config.get("encoder")
    if block is None or not block.get("match"):
        return config
    path = places.resolve(block.weights, workdir)
    stored = pretrained.read_config(path) if block.weights else {}
    run = None
    if "trainer" in stored:
        run = configs.read_config(path / checkpoints.CONFIG_NAME)
    found = _encoder(config, path, stored, run)
    if found is None:
        return config  # It says all itself, or loading says what is wrong.
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.encoder = ConfigDict(found)
        config.data.image_size = found["sizes"]["image_size"]
        for name in {"row", "tier"} & set(config):
            config[name] = config[name] or (run or {}).get(name, "")
    return config.lock()


def _encoder(
    config: ConfigDict, path: Path, stored: Mapping[str, Any], run: ConfigDict | None
) -> dict[str, Any] | None:
    """Returns the block of the encoder in a folder; None if there is none to follow."""
    block = config.encoder
    others = {key: block[key] for key in ("weights", "ema", "match") if key in block}
    dtype = block.sizes.dtype
    if backbones.is_run(path):
        arguments = backbones.arguments(run)
    elif run is not None and run.trainer == ldae_runs.TRAINER:
        deepest = max((config.get("sweep") or {}).get("blocks", ()), default=0)
        sizes = ldae_runs.sizes(run)
        sizes["depth"] = max(sizes["depth"], deepest)
        return _ldae(block, sizes) | others
    elif stored.get("class") == LDAE:
        return _ldae(block, stored["arguments"]) | others
    elif block.name == ldae_runs.TRAINER and ("class" in stored or _is_hub(stored)):
        arguments = vit_encoder.read_arguments(path)
    else:
        return None
    sizes = {key: _value(value) for key, value in arguments.items() if key != "name"}
    preset = {"name": arguments["name"], "weights": block.weights, "sizes": sizes}
    return blocks.pretrained_encoder(preset, dtype=dtype) | others


def _is_hub(stored: Mapping[str, Any]) -> bool:
    return "model_type" in stored


def _ldae(block: ConfigDict, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the block of an l-DAE encoder: what a user chooses stays."""
    is_ldae = block.name == ldae_runs.TRAINER
    own = block.sizes.to_dict() if is_ldae else {"dtype": block.sizes.dtype}
    free = {key: own[key] for key in ldae_runs.FREE if key in own}
    sizes = {k: _value(v) for k, v in sizes.items() if v is not None}
    whole = blocks.encoder(block.weights)
    return whole | {"sizes": whole["sizes"] | sizes | free}


def _value(value: Any) -> Any:
    """Returns a value as a config has it, with tuples in the place of lists."""
    if isinstance(value, Mapping):
        return {k: _value(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value
