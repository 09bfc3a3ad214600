"""Conversion of weights between layouts, one tensor at a time.

Weights of any layout are seen as our parameters, which are made when they are read, and
written from there; only the largest of our stacked parameters is in memory as a whole.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import ml_dtypes
import numpy as np
from flax import nnx

from rae_jax import config as configs
from rae_jax.convert import sources, stats_files, tables
from rae_jax.models import (
    kinds,
    ldae_encoder,
    ldae_merging,
    pretrained,
    recording,
    vit_encoder,
    writers,
)

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_METADATA = "format"  # Of a safetensors file.

Arguments = pretrained.Arguments
Rows = list[tuple[str, str, str]]
Rename = Callable[[str], str | None]


class Network(NamedTuple):
    """The weights of a network, wherever they lie.

    Attributes:
        kind: Key of `kinds.KINDS`.
        layout: In which they lie.
        cls: Class of the network.
        arguments: Its constructor arguments.
        shapes: Shapes of its parameters.
        parameters: The parameters, and the extras of a foreign file.
        table: Names in the foreign file; None in our own layout.
        left_out: What the file has and the network does not, in words.
    """

    kind: str
    layout: str
    cls: type[nnx.Module]
    arguments: Arguments
    shapes: tables.Shapes
    parameters: sources.TensorSource
    table: tables.Table | None = None
    left_out: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def export(self, layout: str, **options: Any) -> writers.Export:
        """Returns how a foreign layout is written.

        Raises:
            ValueError: There is no such layout of this network.
        """
        kind = kinds.KINDS[self.kind]
        if layout not in kind.layouts or self.cls is not kind.classes[0]:
            is_first = self.cls is kind.classes[0]
            known = [*(kind.layouts if is_first else ()), pretrained.OWN_LAYOUT]
            name = self.cls.__name__
            raise ValueError(configs.suggest(layout, known, f"layout of {name}"))
        return kind.export(layout, self.arguments, self.parameters, **options)

    def rows(self, layout: str, **options: Any) -> list[tuple[str, Rows]]:
        """Returns what goes where, as titles and tables (foreign, ours, how)."""
        found = []
        if self.table is not None:
            found.append((f"from {self.layout}", self._rows(self.table)))
        if layout != pretrained.OWN_LAYOUT:
            written = self.written(layout)
            export = written.export(layout, **options)
            rows = written._rows(export.table, "made anew", export.rename)
            rows += [(name, "-", "from arguments") for name in export.added]
            found.append((f"to {layout}", rows))
        if not found:
            found = [(self.layout, [(path, path, "same") for path in self.shapes])]
        return found

    def _rows(
        self, table: tables.Table, anew: str = "", rename: Rename = lambda name: name
    ) -> Rows:
        """Returns the rows of a table; extras that are not carried are `anew`."""
        entries = [e._replace(name=e.name and rename(e.name)) for e in table.entries]
        entries = tuple(e for e in entries if e.name is not None)
        found = tables.rows(tables.Table(entries))
        for extra in table.extras:
            name = rename(extra.name)
            is_carried = tables.EXTRA + extra.name in self.parameters.shapes
            if name is not None and is_carried:
                found.append((name, "-", "carried along"))
            elif name is not None and anew and extra.make is not None:
                found.append((name, "-", anew))
        return found

    def write(
        self, path: Path, layout: str, dtype: str = "float32", **options: Any
    ) -> None:
        """Writes the network.

        Args:
            path: A folder, or in a foreign layout a file ending in .pt, .pth or
                .safetensors.
            layout: "rae_jax" or one of the kind's layouts.
            dtype: Key of `DTYPES`, for parameters; extras keep their types.
            **options: Of the layout.

        Raises:
            ValueError: There is no such layout, it cannot hold the network, or a value
                is not finite in `dtype`.
        """
        if layout == pretrained.OWN_LAYOUT:
            ours = writers.cast(self.parameters, self.shapes, DTYPES[dtype])
            writers.write_own(path, self.cls.__name__, self.arguments, ours)
            return
        network = self.written(layout)
        export = network.export(layout, **options)
        if path.suffix in sources.WEIGHT_SUFFIXES:
            path, export = path.parent, export._replace(file=path.name)
        ours, shapes = network.parameters, network.shapes
        writers.write_foreign(path, export, ours, shapes, DTYPES[dtype])

    def written(self, layout: str) -> "Network":
        """Returns the network that a file of a layout holds.

        Of an l-DAE encoder a foreign one holds the plain ViT that it is at its level.

        Raises:
            ValueError: It is none.
        """
        if self.cls is not ldae_encoder.LDAEEncoder or layout != kinds.HUGGINGFACE:
            return self
        arguments, arrays = ldae_merging.merge(self.arguments, self.parameters)
        cls = vit_encoder.ViTEncoder
        arguments, shapes = structure(cls, arguments)
        source = sources.from_arrays(arrays, self.parameters.origin)
        return Network(self.kind, self.layout, cls, arguments, shapes, source)


class Statistics(NamedTuple):
    """Latent statistics, with what commands need of a `Network`."""

    layout: str
    stats: stats_files.LatentStats
    kind: str = kinds.STATS
    left_out: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(array.size for array in self.stats if array is not None)

    def rows(self, layout: str) -> list[tuple[str, Rows]]:
        """Returns what goes where, as titles and tables (from, to, how)."""
        foreign = kinds.OFFICIAL in (self.layout, layout) and self.layout != layout
        how = "channels moved" if foreign else "same"
        rows = [(n, n, how) for n, x in self.stats._asdict().items() if x is not None]
        if self.stats.mean is None:
            rows.append(("mean", "mean", "None, counts as zero"))
        return [(f"from {self.layout} to {layout}", rows)]

    def write(self, path: Path, layout: str, dtype: str = "float32") -> None:
        """Writes a file, or one of the layout's usual name into a folder.

        Raises:
            ValueError: There is no such layout, or the file's name says another.
        """
        is_own = layout == pretrained.OWN_LAYOUT
        if layout not in (pretrained.OWN_LAYOUT, kinds.OFFICIAL):
            known = [kinds.OFFICIAL, pretrained.OWN_LAYOUT]
            raise ValueError(configs.suggest(layout, known, f"layout of {self.kind}"))
        if dtype != "float32":
            raise ValueError("Latent statistics are always float32.")
        if path.suffix not in sources.WEIGHT_SUFFIXES:
            name = stats_files.OWN_NAME if is_own else stats_files.OFFICIAL_NAME
            path = path / name
        if (path.suffix == ".npz") != is_own:
            raise ValueError(
                f"Statistics in the layout {layout} end in "
                f"{'.npz' if is_own else '.pt'}, not {path.suffix!r}."
            )
        stats_files.write_stats(path, self.stats)


def open_weights(
    path: Path,
    kind: str | None = None,
    part: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Network | Statistics:
    """Opens the weights in a file or folder of any layout.

    Args:
        path: A file or folder.
        kind: One of `kinds.NAMES`; None for what the names of tensors say.
        part: Which network of a training checkpoint; see `sources.open_tensors`.
        overrides: Constructor arguments that a file does not tell.

    Raises:
        ValueError: The file is of no kind or another, or does not fit; the message
            lists every missing, unexpected and wrongly shaped tensor.
    """
    overrides = dict(overrides or {})
    settings = pretrained.read_config(path)
    if "class" in settings:
        return _open_own(path, settings, kind, overrides)
    if kind is None:
        kind = _guess(path, part)
    if kind == kinds.STATS:
        stats = stats_files.read_stats(path)
        return Statistics(kinds.layout_of(path, kind), stats)
    weights = kinds.KINDS[kind].open(path, part, overrides)
    cls = kinds.KINDS[kind].classes[0]
    arguments, shapes = structure(cls, weights.arguments)
    return Network(
        kind,
        kinds.layout_of(path, kind),
        cls,
        arguments,
        shapes,
        as_ours(weights, shapes),
        weights.table,
        _left_out(path, part, kind, weights),
    )


def from_model(model: nnx.Module, layout: str = pretrained.OWN_LAYOUT) -> Network:
    """Returns the weights of a network that is in memory."""
    parameters, shapes = pretrained.parameters_of(model)
    cls = type(model)
    kind = kinds.of_class(cls.__name__)
    return Network(kind, layout, cls, model.arguments, shapes, parameters)


def structure(
    cls: type[nnx.Module], arguments: Arguments
) -> tuple[Arguments, tables.Shapes]:
    """Returns all of a network's arguments, and the shapes of all its variables.

    Raises:
        ValueError: The class cannot be built with these arguments.
    """
    try:
        model = nnx.eval_shape(lambda: recording.build(cls, arguments, nnx.Rngs(0)))
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be built: {error}") from error
    if isinstance(model, pretrained.Pretrained):
        arguments = model.arguments  # With defaults, which files outlive.
    flat = flax.traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    shapes = {".".join(map(str, path)): tuple(x.shape) for path, x in flat.items()}
    return arguments, shapes


def as_ours(weights: pretrained.Weights, shapes: tables.Shapes) -> sources.TensorSource:
    """Returns foreign weights as our parameters, made anew whenever one is read.

    Raises:
        ValueError: They do not fit, see `tables.check`; or an extra is not what it
            should be.
    """
    table, source = weights.table, weights.source
    tables.check(table, source, shapes)
    list(tables.to_ours(table._replace(entries=()), source, shapes))  # Its extras.
    entries: dict[str, list[tables.Entry]] = {}
    for entry in table.entries:
        entries.setdefault(entry.path, []).append(entry)
    extras = {tables.EXTRA + extra.name: extra.name for extra in table.extras}
    extras = {ours: name for ours, name in extras.items() if name in source.shapes}

    def read(path: str) -> np.ndarray:
        if path in extras:
            return source.read(extras[path])
        return _assembled(path, entries[path], shapes[path])

    def read_row(path: str, index: int) -> np.ndarray:
        chosen = [e._replace(layer=None) for e in entries[path] if e.layer == index]
        if not chosen:
            return read(path)[index]
        return _assembled(path, chosen, shapes[path][1:])

    def _assembled(path: str, parts: list[tables.Entry], shape: tables.Shape):
        part = tables.Table(tuple(parts))
        return dict(tables.to_ours(part, source, {path: shape}))[path]

    extra_shapes = {ours: source.shapes[name] for ours, name in extras.items()}
    extra_dtypes = {ours: source.dtypes[name] for ours, name in extras.items()}
    return sources.TensorSource(
        source.origin,
        dict(shapes) | extra_shapes,
        dict.fromkeys(shapes, DTYPES["float32"]) | extra_dtypes,
        read,
        read_row=read_row,
    )


def _open_own(
    path: Path, settings: Mapping[str, Any], kind: str | None, overrides: Arguments
) -> Network:
    found = kinds.of_class(settings["class"])
    if kind not in (None, found):
        raise ValueError(f"{path} holds a {settings['class']}, of the kind {found!r}.")
    classes = {cls.__name__: cls for cls in kinds.KINDS[found].classes}
    cls = classes[settings["class"]]
    arguments = recording.merged(settings["arguments"], overrides)
    arguments, shapes = structure(cls, arguments)
    source = sources.open_tensors(path)
    tables.check_ours(source, shapes)
    return Network(found, pretrained.OWN_LAYOUT, cls, arguments, shapes, source)


def _guess(path: Path, part: str | None) -> str:
    if kinds.layout_of(path, kinds.STATS) == kinds.DIFFUSERS:
        return "autoencoder"
    if path.is_dir() and (path / stats_files.OWN_NAME).is_file():
        return kinds.STATS
    source = sources.open_tensors(path, part)
    return kinds.guess(source.shapes, source.origin)


def _left_out(
    path: Path, part: str | None, kind: str, weights: pretrained.Weights
) -> tuple[str, ...]:
    """Describes what lies beside the network: other networks, numbers such as epoch."""
    values = getattr(weights.source, "values", {})
    found = [f"{name} = {value!r}" for name, value in values.items()]
    found = [text for text in found if not text.startswith(f"{_METADATA} = ")]
    if kind in ("encoder", "decoder"):
        everything = sources.open_tensors(path, part).shapes.values()
        count = sum(map(math.prod, everything))
        count -= sum(map(math.prod, weights.source.shapes.values()))
        found += [f"{count:,} values of other networks"] if count else []
    return tuple(found)
