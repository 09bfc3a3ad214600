"""Records of how a network was constructed, and its construction from them.

A record is the constructor's arguments as JSON holds them, without `rngs`. A network
among the arguments is recorded as its class and its own arguments.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rae_jax import config as configs

CLASSES: dict[str, type[nnx.Module]] = {}
SHARED = ("dtype", "remat")  # Overrides that inner networks take, too.

Arguments = dict[str, Any]


def register(cls: type) -> None:
    """Makes constructions of a class leave the attribute `arguments_json`."""
    CLASSES[cls.__name__] = cls
    if "__init__" in vars(cls):
        cls.__init__ = _recording(cls.__init__)


def build(cls: type, arguments: Arguments, rngs: nnx.Rngs) -> nnx.Module:
    """Constructs a network from recorded arguments, networks among them first."""
    values = {
        name: _built(value, rngs) if _is_network(value) else _as_given(value)
        for name, value in arguments.items()
    }
    if "rngs" in inspect.signature(cls.__init__).parameters:
        values["rngs"] = rngs
    return cls(**values)


def merged(arguments: Arguments, overrides: Arguments) -> Arguments:
    """Returns arguments with others in their place; those of inner networks merge.

    `dtype` and `remat` reach inner networks too, unless these have their own.
    """
    result = dict(arguments)
    shared = {k: v for k, v in overrides.items() if k in SHARED}
    for name, value in arguments.items():
        if _is_network(value):
            accepted = inspect.signature(CLASSES[value["class"]].__init__).parameters
            inner = {k: v for k, v in shared.items() if k in accepted}
            inner |= overrides.get(name) or {}
            result[name] = value | {"arguments": merged(value["arguments"], inner)}
        elif name in overrides:
            result[name] = _recorded(name, overrides[name])
    holds_networks = any(map(_is_network, arguments.values()))
    new = {k: _recorded(k, v) for k, v in overrides.items() if k not in arguments}
    if holds_networks:
        new = {k: v for k, v in new.items() if k not in shared}
    return result | new


def _recording(init: Callable) -> Callable:
    """Makes a constructor record its arguments; an inner one's are overwritten."""
    signature = inspect.signature(init)
    catch_all = [
        p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD
    ]

    @functools.wraps(init)
    def recording(self, *args, **kwargs):
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()  # Files outlive defaults.
        given = dict(bound.arguments)
        for name in catch_all:
            given |= given.pop(name)
        del given[next(iter(signature.parameters))]
        given.pop("rngs", None)
        self.arguments_json = _to_json(given)

    return recording


def _to_json(arguments: Arguments) -> str:
    """Returns the record of arguments; empty where one of them cannot be recorded."""
    try:
        return json.dumps({name: _recorded(name, v) for name, v in arguments.items()})
    except TypeError:  # Such as an encoder of the caller's own.
        return ""


def _recorded(name: str, value: Any) -> Any:
    """Returns an argument as JSON holds it; TypeError where it cannot."""
    if getattr(value, "arguments_json", ""):
        arguments = json.loads(value.arguments_json)
        return {"class": type(value).__name__, "arguments": arguments}
    if name == "dtype":
        return jnp.dtype(value).name
    if isinstance(value, Mapping):
        return {key: _recorded(key, inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_recorded(name, inner) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"Argument {name} is a {type(value).__name__}, which has no JSON.")


def _as_given(value: Any) -> Any:
    """Lists become the tuples that they were: attributes of modules are static."""
    if isinstance(value, list):
        return tuple(_as_given(inner) for inner in value)
    return value


def _is_network(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"class", "arguments"}


def _built(value: dict[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    if value["class"] not in CLASSES:
        raise ValueError(configs.suggest(value["class"], list(CLASSES), "class"))
    return build(CLASSES[value["class"]], value["arguments"], rngs)
