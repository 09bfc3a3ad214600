"""Writing of networks in any layout and type: values are checked, extras kept."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rae_jax import storage
from rae_jax.convert import safetensor_files, sources, tables, torch_files

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_FLOAT32 = np.dtype(np.float32)


class Export(NamedTuple):
    """How a network is written in a foreign layout.

    Attributes:
        table: Places of its parameters among the foreign tensors.
        file: Name of the weight file, which decides its format: .pt or .safetensors.
        rename: Maps a name of the table to that in the file; None leaves it out.
        added: Tensors of the file that are neither parameters nor extras.
        configs: Contents of JSON files beside it.
        finish: Called with the folder at the end, to write what else belongs there.
    """

    table: tables.Table
    file: str
    rename: Callable[[str], str | None] = lambda name: name
    added: Mapping[str, np.ndarray] = {}
    configs: Mapping[str, Any] = {}
    finish: Callable[[Path], None] = lambda folder: None


def cast(
    source: tables.Source, shapes: tables.Shapes, dtype: np.dtype
) -> sources.TensorSource:
    """Returns a source whose parameters are checked and of another type."""
    dtypes = {n: dtype if n in shapes else source.dtypes[n] for n in source.shapes}

    def read(name: str) -> np.ndarray:
        array = source.read(name)
        return _finite(array, dtype, name, source) if name in shapes else array

    # In the order of the module, whatever that of the file.
    names = [*shapes, *(name for name in source.shapes if name not in shapes)]
    ordered = {name: source.shapes[name] for name in names}
    return sources.TensorSource(source.origin, ordered, dtypes, read)


def _finite(
    array: np.ndarray, dtype: np.dtype, name: str, source: tables.Source
) -> np.ndarray:
    """Returns an array in another type; ValueError if a value is not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype, copy=False)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{source.origin}: {name} has values that are not finite in {dtype}."
        )
    return result


def write_own(
    folder: Path, name: str, arguments: Mapping[str, Any], ours: tables.Source
) -> None:
    """Writes a folder in our own layout.

    Args:
        folder: Made if it does not exist.
        name: Class of the network.
        arguments: Its constructor arguments.
        ours: Its parameters, and extras of a foreign file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items = ((key, ours.read(key)) for key in ours.shapes)
    specs = {key: (shape, ours.dtypes[key]) for key, shape in ours.shapes.items()}
    safetensor_files.write_safetensors(
        folder / WEIGHTS_NAME, items, specs, metadata={"format": "np"}
    )
    _write_json(folder / CONFIG_NAME, {"class": name, "arguments": arguments})


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    storage.write_atomically(path, text.encode())


def write_foreign(
    folder: Path,
    export: Export,
    ours: sources.TensorSource,
    shapes: tables.Shapes,
    dtype: np.dtype = _FLOAT32,
) -> None:
    """Writes a network as an `Export` says; extras keep their types.

    Raises:
        ValueError: A value is not finite in `dtype`.
    """
    types = _types(export.table, ours, dtype)
    specs = {}
    for name, shape in tables.written(export.table, ours, shapes).items():
        if export.rename(name) is not None:
            specs[export.rename(name)] = (shape, types[name])
    specs |= {name: (x.shape, x.dtype) for name, x in export.added.items()}
    items = _renamed(tables.to_foreign(export.table, ours, shapes), export, types, ours)
    folder.mkdir(parents=True, exist_ok=True)
    if export.file.endswith(".safetensors"):
        safetensor_files.write_safetensors(
            folder / export.file, items, specs, metadata={"format": "pt"}
        )
    else:
        torch_files.write_pt(folder / export.file, items, specs)
    for name, content in export.configs.items():
        _write_json(folder / name, content)
    export.finish(folder)


def _types(
    table: tables.Table, ours: sources.TensorSource, dtype: np.dtype
) -> dict[str, np.dtype]:
    """Returns the types of the foreign tensors that are written."""
    types = {entry.name: dtype for entry in table.entries}
    for extra in table.extras:
        carried = tables.EXTRA + extra.name
        if carried in ours.shapes:
            types[extra.name] = ours.dtypes[carried]
        elif extra.make is not None:
            types[extra.name] = extra.make().dtype
    return types


def _renamed(
    items: Iterable[tuple[str, np.ndarray]],
    export: Export,
    types: Mapping[str, np.dtype],
    ours: sources.TensorSource,
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in items:
        if export.rename(name) is not None:
            yield export.rename(name), _finite(array, types[name], name, ours)
    yield from export.added.items()
