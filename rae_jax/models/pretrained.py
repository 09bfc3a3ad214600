"""Loading and saving of networks: `from_pretrained` and `save_pretrained`.

A folder in our own layout holds `config.json`, the class and its constructor arguments,
and `model.safetensors`, one float32 array per dotted parameter name. Other layouts are
read and written through tables of names; see `convert.tables`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.convert import (
    hub,
    published,
    sources,
    tables,
)
from rae_jax.models import recording, writers

OWN_LAYOUT = "rae_jax"
CONFIG_NAME = writers.CONFIG_NAME
HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth")

Arguments = recording.Arguments


class Weights(NamedTuple):
    """Foreign tensors and what they become.

    Attributes:
        arguments: Constructor arguments of the network that they fill.
        table: Their places among its parameters.
        source: The tensors, under the names of the table.
    """

    arguments: Arguments
    table: tables.Table
    source: tables.Source


class Carried:
    """Tensors of a foreign file that no parameter holds, kept for the way back.

    It is a static attribute of a network, so it is compared by content: equal files
    give equal graph definitions, and nothing is compiled twice.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)
        digest = hashlib.sha256()
        for name, array in self.arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        self._digest = digest.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Carried) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


class Pretrained:
    """Mixin of networks that are loaded and saved; put it before `nnx.Module`.

    Records the constructor's arguments, except `rngs`, as a static JSON string. A class
    that reads or writes foreign layouts overrides `open_foreign` or `export`.
    """

    layouts: ClassVar[tuple[str, ...]] = (OWN_LAYOUT,)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        recording.register(cls)

    @property
    def arguments(self) -> Arguments:
        """The constructor's arguments, networks among them as class and arguments.

        Raises:
            ValueError: One of them was an object that JSON cannot hold.
        """
        if not self.arguments_json:
            raise ValueError(
                f"This {type(self).__name__} was built from an object that cannot be "
                "recorded, so it cannot be saved. Derive that object from Pretrained."
            )
        return json.loads(self.arguments_json)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, part: str | None = None, **overrides: Any
    ) -> Self:
        """Loads a network; every parameter is filled or an error is raised.

        Args:
            source: A folder or file in one of the class's layouts, a hub id
                "owner/name", one file of a hub repository, "owner/name:path/in/it",
                or a name of `published.SOURCES`.
            part: Which network of a training checkpoint: "ema" (first choice),
                "model", ...
            **overrides: Constructor arguments that replace those of the file, such as
                `dtype` and `remat`, or that a file cannot tell.

        Raises:
            FileNotFoundError: Nothing is there; the message says how to get it.
            ValueError: The file does not fit; the message lists every missing,
                unexpected and wrongly shaped tensor.
        """
        source = published.SOURCES.get(os.fspath(source), source)
        path = hub.locate(source, allow=HUB_FILES)
        settings = read_config(path)
        if "class" in settings:
            return _from_own(cls, path, settings, overrides)
        weights = cls.open_foreign(path, part, overrides)
        network = Skeleton(cls, weights.arguments)
        tables.check(weights.table, weights.source, network.shapes)
        items = tables.to_ours(weights.table, weights.source, network.shapes)
        extras = tables.extras_of(weights.table, weights.source)
        return network.filled(items, extras, weights.source.origin)

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: Arguments
    ) -> Weights:
        """Opens a file or folder that is not in our own layout.

        Raises:
            ValueError: The class has no other layout, or the file is none of them.
        """
        raise ValueError(
            f"{path} has no {CONFIG_NAME} of ours, and {cls.__name__} reads no other "
            "layout."
        )

    @classmethod
    def export(
        cls, layout: str, arguments: Arguments, ours: tables.Source
    ) -> writers.Export:
        """Describes how a network is written in a foreign layout.

        Args:
            layout: One of `layouts`.
            arguments: Constructor arguments.
            ours: The parameters under our names.
        """
        raise ValueError(configs.suggest(layout, list(cls.layouts), "layout"))

    def save_pretrained(
        self, folder: str | os.PathLike, layout: str = OWN_LAYOUT, **options: Any
    ) -> None:
        """Writes the network into a folder, so that `from_pretrained` reads it.

        Args:
            folder: Made if it does not exist.
            layout: One of `layouts`: "rae_jax", "official", "diffusers",
                "huggingface".
            **options: Of the layout; see the class's `export`.

        Raises:
            ValueError: The class has no such layout, or the layout cannot hold what
                the network holds.
        """
        cls = type(self)
        ours, shapes = parameters_of(self)
        if layout not in (OWN_LAYOUT, *cls.layouts):
            raise ValueError(configs.suggest(layout, list(cls.layouts), "layout"))
        with storage.filling(storage.path(folder)) as here:
            if layout == OWN_LAYOUT:
                writers.write_own(here, cls.__name__, self.arguments, ours)
                return
            description = cls.export(layout, self.arguments, ours, **options)
            writers.write_foreign(here, description, ours, shapes)


class Skeleton:
    """A network's structure and the shapes of its parameters, without its weights."""

    def __init__(self, cls: type, arguments: Arguments):
        model = nnx.eval_shape(lambda: recording.build(cls, arguments, nnx.Rngs(0)))
        self.cls = cls
        self.graphdef, state = nnx.split(model, nnx.Param)
        flat = flax.traverse_util.flatten_dict(nnx.to_pure_dict(state))
        self._paths = {".".join(map(str, path)): path for path in flat}
        self._dtypes = {".".join(map(str, p)): x.dtype for p, x in flat.items()}
        self.shapes = {".".join(map(str, p)): x.shape for p, x in flat.items()}

    def filled(
        self,
        items: Iterable[tuple[str, np.ndarray]],
        extras: Iterable[tuple[str, np.ndarray]],
        origin: str,
    ) -> nnx.Module:
        """Returns the network with parameters, moved to the device one by one.

        Raises:
            ValueError: A value is not finite, or a parameter is left out.
        """
        flat = {}
        for name, array in items:
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise ValueError(f"{origin}: the values for {name} are not all finite.")
            flat[self._paths[name]] = jnp.asarray(array, self._dtypes[name])
        absent = [name for name, path in self._paths.items() if path not in flat]
        if absent:
            raise ValueError(f"{origin} does not fill {', '.join(absent)}.")
        model = nnx.merge(self.graphdef, flax.traverse_util.unflatten_dict(flat))
        carried = dict(extras)
        if carried:
            model.carried = Carried(carried)
        return model


def read_config(path: Path) -> dict[str, Any]:
    """Returns the contents of a folder's `config.json`; empty where there is none."""
    file = storage.path(path) / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        settings = json.loads(storage.read_bytes(file))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}


def parameters_of(model: nnx.Module) -> tuple[tables.Source, dict[str, tuple]]:
    """Returns the parameters, copied to the host as they are read, and their shapes.

    The source has the extras of the file that the network came from, too.
    """
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat = flax.traverse_util.flatten_dict(state)
    params = {".".join(map(str, path)): value for path, value in flat.items()}
    shapes = {name: value.shape for name, value in params.items()}
    extras = carried_by(model)
    source = sources.TensorSource(
        type(model).__name__,
        shapes | {name: value.shape for name, value in extras.items()},
        {name: np.dtype(value.dtype) for name, value in (params | extras).items()},
        lambda name: np.asarray((params | extras)[name]),
        read_row=lambda name, index: np.asarray(params[name][index]),
    )
    return source, shapes


def carried_by(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the extras of a network and of the networks in it."""
    found = {}
    for name, value in vars(model).items():
        if isinstance(value, Pretrained):
            for key, array in carried_by(value).items():
                inner = key.removeprefix(tables.EXTRA)
                found[f"{tables.EXTRA}{name}.{inner}"] = array
    own = getattr(model, "carried", None)
    return found | (own.arrays if own is not None else {})


def _from_own(
    cls: type, path: Path, settings: dict[str, Any], overrides: Arguments
) -> Any:
    if settings["class"] != cls.__name__:
        raise ValueError(
            f"{path} holds a {settings['class']}; load it with "
            f"{settings['class']}.from_pretrained, not {cls.__name__}'s."
        )
    network = Skeleton(cls, recording.merged(settings["arguments"], overrides))
    source = sources.open_tensors(path)
    tables.check_ours(source, network.shapes)
    is_extra = {n: n.startswith(tables.EXTRA) for n in source.shapes}
    items = ((n, source.read(n)) for n in network.shapes)
    extras = ((n, source.read(n)) for n in source.shapes if is_extra[n])
    return network.filled(items, extras, source.origin)
