"""Experiment files: named variants, command-line overrides, and the copy in a workdir.

An experiment file is plain Python with a `VARIANTS` table and a function
`get_config(variant)` that returns a locked `ConfigDict`. It imports nothing but
this package, so it can be copied anywhere and given by path.
"""

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rae_jax import storage

_SHOWN = 12  # Names that a message lists.
BEST = "best"  # Folder in a run's workdir: a workdir itself, of the best checkpoint.


class ConfigError(ValueError):
    """An experiment file, variant or override that cannot be used, and why."""


def suggest(name: str, allowed: Sequence[str], kind: str) -> str:
    """Returns an error text that names the value, the allowed ones and the nearest."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = len(allowed) - _SHOWN
    shown = [*allowed[:_SHOWN], f"{more} more"] if more > 1 else allowed
    return f"Unknown {kind} {name!r}.{hint} Choose from: {', '.join(shown)}."


def apply_variant(
    config: ConfigDict, variants: Mapping[str, Mapping[str, Any]], variant: str
) -> ConfigDict:
    """Locks a complete config and overwrites what one variant changes.

    A variant may name a parent by the key `inherits`; the parent applies first.

    Raises:
        ConfigError: For an unknown variant, a key that the config lacks, or a
            value of another type.
    """
    config.lock()
    for name in _lineage(variants, variant):
        changes = {k: v for k, v in variants[name].items() if k != "inherits"}
        _check_keys(flatten(changes), config, f"variant {name!r}: key")
        try:
            config.update(changes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Variant {name!r}: {error}") from error
    return config


def _check_keys(keys: Iterable[str], config: ConfigDict, kind: str) -> None:
    known = list(flatten(config))
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"Unknown {kind} {key!r}.{hint}")


def _lineage(variants: Mapping[str, Mapping[str, Any]], variant: str) -> list[str]:
    names: list[str] = []
    name: str | None = variant
    while name is not None:
        if name not in variants:
            raise ConfigError(suggest(name, list(variants), "variant"))
        if name in names:
            raise ConfigError(f"Variant {name!r} inherits from itself.")
        names.append(name)
        name = variants[name].get("inherits")
    return names[::-1]


def load_module(path: str | os.PathLike[str]) -> ModuleType:
    """Imports an experiment file from its path."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"No config file {str(path)!r}. Give the path of a Python file, such as "
            "configs/ldae.py, with an optional variant: configs/ldae.py:smoke."
        )
    spec = importlib.util.spec_from_file_location(f"rae_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config") or not hasattr(module, "VARIANTS"):
        raise ConfigError(f"{str(path)!r} defines no get_config and VARIANTS.")
    return module


def split_path(text: str) -> tuple[str, str | None]:
    """Splits `path.py:variant` into its path and its variant or None."""
    path, colon, variant = text.rpartition(":")
    return (path, variant) if colon and path.endswith(".py") else (text, None)


def load_config(text: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Builds the config of `path.py[:variant]` with `--config.key=value` overrides.

    Raises:
        ConfigError: Names the file, variant, key or value that is wrong, and the
            nearest right one.
    """
    path, variant = split_path(text)
    module = load_module(path)
    config = module.get_config() if variant is None else module.get_config(variant)
    keys = [_override_key(text) for text in overrides]
    _check_keys(keys, config, "config key")
    values = flags.FlagValues()
    argv = ["rae-jax", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv
        )
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(str(error).strip()) from error
    return values.config


def _override_key(text: str) -> str:
    match = re.match(r"--config\.([\w.]+)=", text)
    if match is None:
        raise ConfigError(
            f"Unexpected argument {text!r}; overrides look like --config.key=value."
        )
    return match[1]


def save_config(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, atomically."""
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    storage.write_atomically(path, text.encode())


def read_config(path: Path) -> ConfigDict:
    """Reads the config that a run stored beside its checkpoints."""
    if not path.is_file():
        raise ConfigError(
            f"{str(path)!r} does not exist: {str(path.parent)!r} is not the workdir "
            "of a run. Give the folder that was passed as --workdir."
        )
    return ConfigDict(_tuples(json.loads(storage.read_bytes(path)))).lock()


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lists `key: old -> new` for every leaf that two configs do not share."""
    return list(changes(old, new).values())


def changes(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
    """Returns the lines of `differences` by key."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = sorted(flat_old.keys() | flat_new.keys())
    missing = "(absent)"
    pairs = [(k, flat_old.get(k, missing), flat_new.get(k, missing)) for k in keys]
    return {k: f"{k}: {a!r} -> {b!r}" for k, a, b in pairs if a != b}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a nested config by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return flat


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
