"""Tables of names that lead from foreign weights to ours and back.

A table lists every tensor of a foreign layout, with the parameter that holds it here
and how its axes turn. One table serves both directions, is checked against both files
before anything is read, and moves one tensor at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
EXTRA = "extra."  # Prefix, in our files, of foreign tensors that no parameter holds.
_EXTRA_TOLERANCE = 1e-4


class Source(Protocol):
    """What tables read from; see `sources.TensorSource`."""

    origin: str
    shapes: Shapes

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""

    def read_row(self, name: str, index: int) -> np.ndarray:
        """Returns the entry `index` along the first axis of a tensor."""


class Entry(NamedTuple):
    """One foreign tensor and its place among our parameters.

    Attributes:
        name: Foreign name; "" where the foreign layout has nothing and ours is zero.
        path: Our parameter, dotted, such as "blocks.block.attn.qkv.kernel".
        form: Key of `FORMS`: how the axes turn.
        layer: Index along our leading axis, of stacked blocks.
        part: (i, n) for the i-th of n equal parts of our last axis, such as the
            query of a fused query-key-value map.
        shape: Foreign shape, where ours does not imply it ("patch", "reshape").
    """

    name: str
    path: str
    form: str = "same"
    layer: int | None = None
    part: tuple[int, int] | None = None
    shape: Shape | None = None


class Extra(NamedTuple):
    """A foreign tensor that none of our parameters holds.

    Attributes:
        name: Foreign name.
        make: Makes it anew for a file that is written; None where that is impossible.
        required: Whether a foreign file must have it.
        check: Whether the one in a file has to equal the one that `make` gives.
    """

    name: str
    make: Callable[[], np.ndarray] | None = None
    required: bool = False
    check: bool = False


class Table(NamedTuple):
    """All tensors of a foreign layout."""

    entries: tuple[Entry, ...]
    extras: tuple[Extra, ...] = ()


class Form(NamedTuple):
    """How axes turn: foreign -> ours and, given the foreign shape, ours -> foreign."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_foreign: Callable[[np.ndarray, Shape | None], np.ndarray]


def _patch_to_ours(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _patch_to_foreign(x: np.ndarray, shape: Shape | None) -> np.ndarray:
    o, i, kh, kw = shape
    return x.reshape(kh, kw, i, o).transpose(3, 2, 0, 1)


FORMS = {
    "same": Form(lambda x: x, lambda x, _: x),
    "linear": Form(lambda x: x.T, lambda x, _: x.T),  # (o, i) <-> (i, o)
    # (o, i, kh, kw) <-> (kh * kw * i, o), as in `patches.PatchEmbed`.
    "patch": Form(_patch_to_ours, _patch_to_foreign),
    "conv2d": Form(  # (o, i, kh, kw) <-> (kh, kw, i, o)
        lambda x: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1)
    ),
    "conv1d": Form(  # (o, i, k) <-> (k, i, o)
        lambda x: x.transpose(2, 1, 0), lambda x, _: x.transpose(2, 1, 0)
    ),
    # Ours is fixed by the parameter it goes to; see `_placed`.
    "reshape": Form(lambda x: x, lambda x, shape: x.reshape(shape)),
}


def prefixed(table: Table, foreign: str, ours: str) -> Table:
    """Returns the table of the same tensors under prefixes, such as "decoder."."""
    entries = [
        e._replace(name=foreign + e.name if e.name else "", path=ours + e.path)
        for e in table.entries
    ]
    extras = [e._replace(name=foreign + e.name) for e in table.extras]
    return Table(tuple(entries), tuple(extras))


def joined(*parts: Table) -> Table:
    """Returns one table of all the tensors of several."""
    entries = [e for table in parts for e in table.entries]
    extras = [e for table in parts for e in table.extras]
    return Table(tuple(entries), tuple(extras))


def foreign_shape(entry: Entry, shapes: Shapes) -> Shape:
    """Returns the shape that the foreign tensor of an entry must have."""
    if entry.shape is not None:
        return entry.shape
    slot = _slot(np.broadcast_to(np.float32(0), shapes[entry.path]), entry)
    return FORMS[entry.form].to_foreign(slot, None).shape


def check(table: Table, source: Source, shapes: Shapes) -> None:
    """Checks that foreign tensors fill our parameters exactly, before any is read.

    Args:
        table: The layout.
        source: Foreign tensors.
        shapes: Shapes of all our parameters, by dotted path.

    Raises:
        ValueError: Lists all missing, unexpected and wrongly shaped tensors.
    """
    _check_complete(table, shapes)
    known = {e.name for e in (*table.entries, *table.extras)}
    required = [e.name for e in table.entries if e.name]
    required += [e.name for e in table.extras if e.required]
    problems = [f"missing: {name}" for name in required if name not in source.shapes]
    problems += [f"unexpected: {name}" for name in source.shapes if name not in known]
    for entry in table.entries:
        given, expected = source.shapes.get(entry.name), foreign_shape(entry, shapes)
        if given is not None and tuple(given) != tuple(expected):
            problems.append(f"shape: {entry.name} is {given}, expected {expected}")
    _raise(source.origin, problems)


def check_ours(source: Source, shapes: Shapes) -> None:
    """Checks that a file in our own layout holds exactly our parameters.

    Raises:
        ValueError: Lists all missing, unexpected and wrongly shaped parameters.
    """
    problems = [f"missing: {path}" for path in shapes if path not in source.shapes]
    for name, given in source.shapes.items():
        if name.startswith(EXTRA):
            continue
        if name not in shapes:
            problems.append(f"unexpected: {name}")
        elif tuple(given) != tuple(shapes[name]):
            problems.append(f"shape: {name} is {given}, expected {shapes[name]}")
    _raise(source.origin, problems)


def to_ours(
    table: Table, source: Source, shapes: Shapes
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our parameters (path, float32 array), one after the other.

    Call `check` first. Extras of the file are compared with what they should be.

    Raises:
        ValueError: If an extra that is to be checked differs.
    """
    _check_extras(table, source)
    by_path: dict[str, list[Entry]] = {}
    for entry in table.entries:
        by_path.setdefault(entry.path, []).append(entry)
    for path, entries in by_path.items():
        parameter = np.zeros(shapes[path], np.float32)
        for entry in entries:
            if entry.name:
                slot = _slot(parameter, entry)
                value = FORMS[entry.form].to_ours(source.read(entry.name))
                slot[...] = value.reshape(slot.shape)
        yield path, parameter


def extras_of(table: Table, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the extras of a foreign file under the names that our files give them."""
    for extra in table.extras:
        if extra.name in source.shapes:
            yield EXTRA + extra.name, source.read(extra.name)


def to_foreign(
    table: Table, source: Source, shapes: Shapes
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields foreign tensors (name, float32 array) from our parameters.

    Entries come in the order of the table, then the extras: as they were in the file
    that ours came from, or made anew.

    Raises:
        ValueError: If an extra is required and can be had neither way, or a part that
            the foreign layout lacks is not zero.
    """
    check_ours(source, shapes)
    for entry in table.entries:
        if entry.layer is None:
            parameter = source.read(entry.path)
        else:
            parameter = source.read_row(entry.path, entry.layer)
        value = _slot(parameter, entry._replace(layer=None))
        if entry.name:
            value = FORMS[entry.form].to_foreign(value, entry.shape)
            yield entry.name, np.ascontiguousarray(value)
        elif np.any(value):
            raise ValueError(
                f"{source.origin}: part {entry.part} of {entry.path} is not zero, "
                "which the target layout cannot express."
            )
    for extra in table.extras:
        if EXTRA + extra.name in source.shapes:
            yield extra.name, source.read(EXTRA + extra.name)
        elif extra.make is not None:
            yield extra.name, np.ascontiguousarray(extra.make())
        elif extra.required:
            raise ValueError(
                f"{source.origin}: the target needs {extra.name}, which is not among "
                "our parameters. Convert from a file that has it."
            )


def written(table: Table, source: Source, shapes: Shapes) -> dict[str, Shape]:
    """Returns the shapes of what `to_foreign` yields, in its order."""
    found = {e.name: foreign_shape(e, shapes) for e in table.entries if e.name}
    for extra in table.extras:
        if EXTRA + extra.name in source.shapes:
            found[extra.name] = tuple(source.shapes[EXTRA + extra.name])
        elif extra.make is not None:
            found[extra.name] = extra.make().shape
    return found


def rows(table: Table) -> list[tuple[str, str, str]]:
    """Returns (foreign, ours, how) for people, stacked blocks as one row.

    Numbers of blocks are written as their range, such as "blocks.{0..27}.norm1.weight".
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for entry in table.entries:
        name = entry.name or "(nothing)"
        if entry.layer is not None:
            name = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        how = "zeros" if not entry.name else entry.form
        if entry.part is not None:
            how += f", part {entry.part[0] + 1} of {entry.part[1]}"
        numbers = groups.setdefault((name, entry.path, how), [])
        numbers += [int(n) for n in re.findall(r"\.(\d+)\.", entry.name)[:1]]
    listed = []
    for (name, path, how), numbers in groups.items():
        span = f"{{{min(numbers)}..{max(numbers)}}}" if numbers else ""
        listed.append((name.replace("{}", span), path, how))
    return listed + [(e.name, "-", "carried along") for e in table.extras]


def _slot(parameter: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns the view of our parameter that an entry fills."""
    if entry.layer is not None:
        parameter = parameter[entry.layer]
    if entry.part is not None:
        index, count = entry.part
        width = parameter.shape[-1] // count
        parameter = parameter[..., index * width : (index + 1) * width]
    return parameter


def _check_complete(table: Table, shapes: Shapes) -> None:
    """Raises where a table and a module disagree: an error of ours, not of a file."""
    filled = dict.fromkeys(shapes, 0)
    for entry in table.entries:
        if entry.path not in filled:
            raise ValueError(f"The module has no parameter {entry.path!r}.")
        slot = _slot(np.broadcast_to(np.float32(0), shapes[entry.path]), entry)
        filled[entry.path] += slot.size
    wrong = [p for p, shape in shapes.items() if filled[p] != int(np.prod(shape))]
    if wrong:
        raise ValueError(f"The table does not fill {', '.join(wrong)} exactly.")


def _check_extras(table: Table, source: Source) -> None:
    for extra in table.extras:
        if not extra.check or extra.make is None or extra.name not in source.shapes:
            continue
        given, expected = source.read(extra.name), extra.make()
        if given.shape != expected.shape or not np.allclose(
            given.astype(np.float32), expected, rtol=0, atol=_tolerance(given.dtype)
        ):
            raise ValueError(
                f"{source.origin}: {extra.name} is not the table that the sizes imply: "
                "the file belongs to a model of another grid or another kind."
            )


def _tolerance(dtype: np.dtype) -> float:
    """Returns by how much a table of sines may differ that is stored as `dtype`."""
    return max(_EXTRA_TOLERANCE, float(ml_dtypes.finfo(dtype).eps))


def _raise(origin: str, problems: Iterable[str], limit: int = 40) -> None:
    problems = list(problems)
    if problems:
        more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
        lines = "\n  ".join(problems[:limit] + more)
        raise ValueError(
            f"{origin} does not fit, and nothing was converted:\n  {lines}"
        )
