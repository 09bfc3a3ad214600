"""Writing of networks in any type: values are checked, extras kept as they are."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from rae_jax.convert import safetensor_files, sources, tables, torch_files
from rae_jax.models import pretrained


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


def write_foreign(
    folder: Path,
    export: pretrained.Export,
    ours: sources.TensorSource,
    shapes: tables.Shapes,
    dtype: np.dtype,
) -> None:
    """Writes a network as an `Export` says; extras keep their types."""
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
        pretrained.write_json(folder / name, content)
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
    export: pretrained.Export,
    types: Mapping[str, np.dtype],
    ours: sources.TensorSource,
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in items:
        if export.rename(name) is not None:
            yield export.rename(name), _finite(array, types[name], name, ours)
    yield from export.added.items()
