"""Reads and writes torch's weight files without torch.

Reading loads the pickled objects with `pickles`, which can only build tensors and plain
data, and one tensor's entries when they are asked for. Writing makes files that
`torch.load(path, weights_only=True)` returns as an OrderedDict of tensors.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from rae_jax.convert import files, pickles

Path = files.Path
PlainValue = None | bool | int | float | str

_DEFAULT_PARTS = ("ema", "model", "state_dict")
_FOLDER = "archive/"
_ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
# Entries from this size on get the fields of large files, which take 20 bytes.
_LARGE = 2**30
_LARGE_FIELDS = 20
_STORAGES = {
    dtype: kind
    for kind, dtype in pickles.STORAGE_DTYPES.items()
    if kind != "UntypedStorage"
}


def open_checkpoint(path: Path) -> pickles.Checkpoint:
    """Opens a file that `torch.save` wrote, of any version since 0.4.

    Its objects are loaded, the entries of its tensors are not.

    Raises:
        ValueError: The file is no such file, is truncated, or its pickle asks for a
            name other than those of tensors and plain data (nothing of it is run);
            the message names the file.
    """
    start = files.first_bytes(path)
    if start.startswith(_LOCAL_MAGIC):
        with files.errors_naming(path):
            return _open_zip(path)
    return pickles.open_legacy(path)


def choose(
    tree: Any, part: str | None
) -> tuple[dict[str, pickles.TensorRef], dict[str, Any]]:
    """Returns the tensors of one part of a checkpoint, and plain values beside them.

    Args:
        tree: A checkpoint's objects.
        part: Key of a dict in it; None takes "ema", else "model", else "state_dict",
            else the whole tree.

    Raises:
        ValueError: There is no such part (the message lists those there are), or it
            holds something else than tensors and plain values.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a dict of tensors")
    parts = {k: v for k, v in tree.items() if isinstance(v, dict)}
    names = files.listed(parts) or "none"
    if part is None:
        part = next((name for name in _DEFAULT_PARTS if name in parts), None)
    elif part not in parts:
        raise ValueError(f"it has no part {part!r}; its parts are: {names}")
    chosen = tree if part is None else parts[part]
    tensors, values = {}, {k: v for k, v in tree.items() if isinstance(v, PlainValue)}
    for name, value in chosen.items():
        if isinstance(name, str) and isinstance(value, pickles.TensorRef):
            tensors[name] = value
        elif not isinstance(value, PlainValue):
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            hint = f"; its parts are: {names}" if part is None else f" in {part!r}"
            raise ValueError(f"its entry {name!r} is a {kind}, not a tensor{hint}")
        else:
            values[name] = value
    if not tensors:
        raise ValueError(f"it holds no tensors; its parts are: {names}")
    return tensors, values


def write_pt(
    path: Path,
    items: Iterable[tuple[str, np.ndarray]],
    specs: Mapping[str, files.Spec],
    values: Mapping[str, PlainValue] | None = None,
) -> None:
    """Writes tensors as `torch.save` would an OrderedDict of them.

    One tensor is in memory at a time. The file appears when it is complete.

    Args:
        path: The file.
        items: Name and array of each tensor, in any order.
        specs: Shape and type of each, in the order that the dict gets.
        values: Plain entries of the dict, which come before its tensors.

    Raises:
        ValueError: A type has no counterpart in torch, or the items are not those
            that `specs` announces. No file is left.
    """
    tree = _pickled(specs, values or {}, path)
    keys = {name: str(index) for index, name in enumerate(specs)}
    with files.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write_entry(archive, file, "data.pkl", tree)
        _write_entry(archive, file, "byteorder", b"little")
        for name, data in files.checked(items, specs, path):
            _write_entry(archive, file, f"data/{keys[name]}", data)
        _write_entry(archive, file, "version", b"3\n")


def _open_zip(path: Path) -> pickles.Checkpoint:
    with open(path, "rb") as file:
        entries = _directory(file)
        if "constants.pkl" in entries:
            raise ValueError("it is a TorchScript program, not a file of weights")
        if "byteorder" in entries:
            order = _read_entry(file, entries["byteorder"]).strip()
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}, not little-endian")
        data = _read_entry(file, entries["data.pkl"])
        tree, storages = pickles.load_torch_pickle(io.BytesIO(data))
        spans = dict(_storage_spans(file, entries, storages))
    return pickles.Checkpoint(path, tree, spans)


def _directory(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by their names in its top folder."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"it starts as a zip archive and does not end as one ({error}); it is "
            "truncated or damaged"
        ) from error
    tops = [e.filename[: -len("data.pkl")] for e in entries if _is_tree(e.filename)]
    if len(tops) != 1:
        names = files.listed(entry.filename for entry in entries)
        raise ValueError(
            f"it is a zip archive without torch's data.pkl; it has {names}"
        )
    inside = (e for e in entries if e.filename.startswith(tops[0]))
    return {entry.filename.removeprefix(tops[0]): entry for entry in inside}


def _is_tree(name: str) -> bool:
    return name == "data.pkl" or name.endswith("/data.pkl") and name.count("/") == 1


def _storage_spans(
    file: BinaryIO,
    entries: Mapping[str, zipfile.ZipInfo],
    storages: Iterable[str],
) -> Iterator[tuple[str, tuple[int, int]]]:
    for key in storages:
        entry = entries.get(f"data/{key}")
        if entry is not None:
            yield key, (_data_start(file, entry), entry.file_size)


def _read_entry(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    """Reads a small entry; torch can be told to write 0 for its checksum."""
    file.seek(_data_start(file, entry))
    data = file.read(entry.file_size)
    if entry.CRC not in (0, zlib.crc32(data)):
        raise ValueError(f"its entry {entry.filename} is damaged (wrong checksum)")
    return data


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"its entry {entry.filename} is compressed, which torch's files never are"
        )
    file.seek(max(entry.header_offset, 0))  # Damage can make it negative.
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size:
        raise EOFError
    magic, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    start = file.tell() + name_size + extra_size
    if magic != _LOCAL_MAGIC:
        raise ValueError(f"its entry {entry.filename} is not where its directory says")
    if start + entry.file_size > os.fstat(file.fileno()).st_size:
        raise EOFError
    return start


def _write_entry(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview
) -> None:
    """Writes an entry whose data start at a multiple of `_ALIGNMENT`."""
    entry = zipfile.ZipInfo(_FOLDER + name)
    is_large = len(data) >= _LARGE
    header = 30 + len(entry.filename) + 4 + (_LARGE_FIELDS if is_large else 0)
    padding = -(file.tell() + header) % _ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=is_large) as stream:
        stream.write(data)


def _pickled(
    specs: Mapping[str, files.Spec], values: Mapping[str, PlainValue], path: Path
) -> bytes:
    """The pickle of an OrderedDict of plain values and tensors."""
    entries = [_ops(name) + _ops(value) for name, value in values.items()]
    for index, (name, (shape, dtype)) in enumerate(specs.items()):
        dtype = np.dtype(dtype)
        if dtype not in _STORAGES or name in values:
            known = dtype in _STORAGES
            reason = "is a plain value, too" if known else f"has type {dtype}"
            raise ValueError(f"{os.fspath(path)}: tensor {name!r} {reason}")
        entries.append(_ops(name) + _tensor_ops(str(index), _STORAGES[dtype], shape))
    content = b"(" + b"".join(entries) + b"u" if entries else b""
    return b"\x80\x02" + _DICT_OPS + content + b"."


_DICT_OPS = b"ccollections\nOrderedDict\n)R"


def _tensor_ops(key: str, kind: str, shape: tuple[int, ...]) -> bytes:
    """Opcodes that make a row-major tensor of a whole storage."""
    sizes = np.cumprod((1, *reversed(shape)), dtype=object)
    storage = b"(" + _ops("storage") + f"ctorch\n{kind}\n".encode() + _ops(key)
    storage += _ops("cpu") + _ops(int(sizes[-1])) + b"tQ"
    strides = tuple(max(int(size), 1) for size in reversed(sizes[:-1]))
    view = _ops(0) + _ops(tuple(map(int, shape))) + _ops(strides)
    args = b"(" + storage + view + _ops(False) + _DICT_OPS + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"R"


def _ops(value: PlainValue | tuple[int, ...]) -> bytes:
    """Opcodes that push a plain value: its pickle without start and stop."""
    return pickle.dumps(value, 2)[2:-1]
