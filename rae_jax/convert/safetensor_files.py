"""Reads and writes safetensors files, one tensor at a time.

Such a file is the length of its header, the header (JSON: type, shape and span of each
tensor) and the entries of the tensors without gaps.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rae_jax.convert import files

Path = files.Path

_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # As the safetensors library.


class Tensor(NamedTuple):
    """A tensor in a file: type, shape and first byte."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def row(self, index: int) -> "Tensor":
        """Returns the entry `index` along the first axis."""
        shape = self.shape[1:]
        size = math.prod(shape) * self.dtype.itemsize
        return Tensor(self.dtype, shape, self.start + index * size)


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the header of a file.

    Returns:
        The tensors by name, in the header's order, and the file's metadata.

    Raises:
        ValueError: The file is truncated or damaged, or a tensor has a type that is
            not supported; the message names the file and the first bad tensor.
    """
    files.first_bytes(path)
    with files.errors_naming(path), open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        if file_size < 8:
            raise EOFError
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > _MAX_HEADER:
            raise ValueError(
                f"its header would have {header_size} bytes; it is no safetensors file"
            )
        if 8 + header_size > file_size:
            raise EOFError
        header = _parsed(file.read(header_size))
    with files.errors_naming(path):
        metadata = header.pop("__metadata__", {})
        start = 8 + header_size
        spans = {name: _span(name, entry) for name, entry in header.items()}
        _check_cover(spans, file_size - start)
        tensors = {
            name: Tensor(dtype, shape, start + begin)
            for name, (dtype, shape, begin, _) in spans.items()
        }
        return tensors, metadata


def read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """Reads one tensor of a file that was opened."""
    count = math.prod(tensor.shape)
    entries = files.read_span(path, tensor.start, count, tensor.dtype)
    return entries.reshape(tensor.shape)


def write_safetensors(
    path: Path,
    items: Iterable[tuple[str, np.ndarray]],
    specs: Mapping[str, files.Spec],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to a file that appears when it is complete.

    One tensor is in memory at a time.

    Args:
        path: The file.
        items: Name and array of each tensor, in any order.
        specs: Shape and type of each, in the order that the header gets.
        metadata: Texts by name, such as {"format": "pt"} for torch's libraries.

    Raises:
        ValueError: A type is unknown to the format, or the items are not those that
            `specs` announces. No file is left.
    """
    header, starts = _header(specs, dict(metadata or {}), path)
    with files.replacing(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, data in files.checked(items, specs, path):
            file.seek(8 + len(header) + starts[name])
            file.write(data)


def _parsed(header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("its header has a name twice")
        return content

    try:
        content = json.loads(header, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    metadata = content.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no JSON object")
    return content


def _span(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape, first byte and end of a tensor, relative to the header's end."""
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"tensor {name!r} is not described as a tensor") from error
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} is described by something else than sizes")
    if kind not in _DTYPES:
        allowed = ", ".join(_DTYPES)
        raise ValueError(f"tensor {name!r} has type {kind}, which is not of {allowed}")
    dtype = _DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise ValueError(
            f"tensor {name!r} spans {end - begin} bytes, its shape {shape} needs {size}"
        )
    return dtype, shape, begin, end


def _check_cover(spans: Mapping[str, tuple], data_size: int) -> None:
    """Checks that the tensors lie one behind the other up to the file's end."""
    position = 0
    for name, (*_, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if end > data_size:
            raise ValueError(
                f"the file is truncated: tensor {name!r} ends {end - data_size} bytes "
                "behind its end"
            )
        if begin != position:
            reason = "overlaps the tensor before it" if begin < position else "is apart"
            raise ValueError(f"tensor {name!r} {reason} (byte {begin}, not {position})")
        position = end
    if position != data_size:
        raise ValueError(f"its last {data_size - position} bytes belong to no tensor")


def _header(
    specs: Mapping[str, files.Spec], metadata: dict[str, str], path: Path
) -> tuple[bytes, dict[str, int]]:
    """The header's text and where each tensor begins after it.

    Wide types come first, and the header ends at a multiple of 8 bytes, so that every
    tensor is aligned.
    """
    sizes = {}
    for name, (shape, dtype) in specs.items():
        dtype = np.dtype(dtype)
        if dtype not in _NAMES:
            raise ValueError(f"{os.fspath(path)}: tensor {name!r} has type {dtype}")
        sizes[name] = math.prod(shape) * dtype.itemsize
    starts, position = {}, 0
    for name in sorted(specs, key=lambda name: -np.dtype(specs[name][1]).itemsize):
        starts[name] = position
        position += sizes[name]
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, (shape, dtype) in specs.items():
        content[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": [int(size) for size in shape],
            "data_offsets": [starts[name], starts[name] + sizes[name]],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), starts
