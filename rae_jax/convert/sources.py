"""Named tensors of weight files, read one at a time, whatever the files' format.

`open_tensors` takes safetensors files, torch's files (zip archives and the format
before version 1.6), npz archives, indices of sharded files, and folders with one of
them. Nothing in a file is executed.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from rae_jax import copies
from rae_jax.convert import (
    files,
    npz_files,
    pickles,
    safetensor_files,
    torch_files,
)

Path = files.Path

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
INDEX_SUFFIX = ".index.json"
# What a folder is searched for, first choice first.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
)
# Modules around a model, of distributed training and of the compiler.
_WRAPPERS = ("module.", "_orig_mod.")


class TensorSource:
    """Named tensors that stay where they are until one is read.

    Attributes:
        origin: Where the tensors come from, for messages.
        shapes: Shape by name, in the file's order.
        dtypes: Stored type by name; bfloat16 is that of ml_dtypes.
        values: What lies beside the tensors: numbers, texts and None of a torch
            checkpoint (step, epoch, an absent mean), metadata of a safetensors file.
    """

    def __init__(
        self,
        origin: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        read: Callable[[str], np.ndarray],
        *,
        read_row: Callable[[str, int], np.ndarray] | None = None,
        values: Mapping[str, Any] | None = None,
    ):
        self.origin = origin
        self.shapes = dict(shapes)
        self.dtypes = dict(dtypes)
        self.values = dict(values or {})
        self._read = read
        self._read_row = read_row or (lambda name, index: read(name)[index])

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, contiguous, in its stored type.

        Raises:
            ValueError: There is no such tensor, or its file is damaged.
        """
        self.require([name])
        return self._read(name)

    def read_row(self, name: str, index: int) -> np.ndarray:
        """Returns the entry `index` along a tensor's first axis; errors as `read`."""
        self.require([name])
        rows = self.shapes[name][:1]
        if not rows or not 0 <= index < rows[0]:
            raise ValueError(f"{self.origin}: tensor {name!r} has no row {index}")
        return self._read_row(name, index)

    def require(self, names: Iterable[str]) -> None:
        """Raises ValueError with the names that the source lacks, if there are any."""
        missing = [name for name in names if name not in self.shapes]
        if missing:
            raise ValueError(f"{self.origin} holds no tensor {files.listed(missing)}")


def from_arrays(
    arrays: Mapping[str, np.ndarray], origin: str = "memory"
) -> TensorSource:
    """A source of arrays that are in memory already."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    dtypes = {name: array.dtype for name, array in arrays.items()}
    return TensorSource(origin, shapes, dtypes, arrays.__getitem__)


def renamed(source: TensorSource, mapping: Mapping[str, str]) -> TensorSource:
    """The tensors that `mapping` (new name to old name) lists, under new names.

    Raises:
        ValueError: The source lacks an old name.
    """
    source.require(mapping.values())
    return TensorSource(
        source.origin,
        {new: source.shapes[old] for new, old in mapping.items()},
        {new: source.dtypes[old] for new, old in mapping.items()},
        lambda name: source.read(mapping[name]),
        read_row=lambda name, index: source.read_row(mapping[name], index),
        values=source.values,
    )


def subset(source: TensorSource, names: Iterable[str]) -> TensorSource:
    """The tensors of these names; a missing one is a ValueError."""
    return renamed(source, {name: name for name in names})


def under(source: TensorSource, prefix: str) -> TensorSource:
    """The tensors whose names start with `prefix`, under the rest of their names."""
    names = [name for name in source.shapes if name.startswith(prefix)]
    return renamed(source, {name.removeprefix(prefix): name for name in names})


def open_tensors(path: Path, part: str | None = None) -> TensorSource:
    """Opens a weight file, an index of sharded files, or a folder with one of them.

    "module." and "_orig_mod.", which wrappers put before names, are removed.

    Args:
        path: The file or folder.
        part: Which dict of tensors of a torch checkpoint: "ema", "model", "disc", ...
            None takes "ema", else "model", else "state_dict", else the whole file.

    Raises:
        FileNotFoundError: There is no such file, the folder has no weights, or shards
            are missing; the message lists them.
        ValueError: The file is truncated, damaged, no weight file, asks for something
            else than tensors (and nothing of it is run), or has no such part; the
            message names the file and the first bad tensor.
    """
    file = weight_file(path)
    if file.name.endswith(INDEX_SUFFIX):
        source = _open_shards(file)
    elif _is_safetensors(file):
        source = _open_safetensors(file)
    elif npz_files.is_npz(file):
        source = _open_npz(file)
    else:
        return _without_wrappers(_open_torch(file, part))
    if part is not None:
        raise ValueError(f"{file} is one set of tensors; it has no part {part!r}")
    return _without_wrappers(source)


def weight_file(path: Path) -> pathlib.Path:
    """Returns the file itself, or the weight file or index of a folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A folder has several files, and none has a usual name.
    """
    path = copies.local(path)
    if not path.is_dir():
        return path
    names = sorted(entry.name for entry in path.iterdir())
    usual = [name for name in _FOLDER_FILES if name in names]
    found = usual or [name for name in names if name.endswith(INDEX_SUFFIX)]
    found = found or [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if not found:
        raise FileNotFoundError(
            f"the folder {path} has no weight file, such as {_FOLDER_FILES[0]}; it has "
            f"{files.listed(names) or 'nothing'}"
        )
    if not usual and len(found) > 1:
        raise ValueError(f"{path} has {files.listed(found)}: give one of these files")
    return path / found[0]


def missing_shards(index: Path) -> list[str]:
    """Returns the files that an index of sharded files lists and that are absent.

    Raises:
        ValueError: The file is no such index.
    """
    folder = pathlib.Path(index).parent
    names = sorted(set(_weight_map(index).values()))
    return [name for name in names if not (folder / name).is_file()]


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor name, of an index of sharded files."""
    with files.errors_naming(index):
        weight_map = json.loads(pathlib.Path(index).read_bytes())["weight_map"]
        for name, file in weight_map.items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file:
                raise ValueError(f"tensor {name!r} is not in a file beside the index")
        return weight_map


def _open_shards(index: pathlib.Path) -> TensorSource:
    missing = missing_shards(index)
    if missing:
        raise FileNotFoundError(
            f"{index} lists shards that are not there: {', '.join(missing)}"
        )
    weight_map = _weight_map(index)
    shards = {
        file: open_tensors(index.parent / file) for file in set(weight_map.values())
    }
    homes = {name: shards[file] for name, file in weight_map.items()}
    for name, shard in homes.items():
        shard.require([name])
    return TensorSource(
        str(index),
        {name: shard.shapes[name] for name, shard in homes.items()},
        {name: shard.dtypes[name] for name, shard in homes.items()},
        lambda name: homes[name].read(name),
        read_row=lambda name, index: homes[name].read_row(name, index),
    )


def _is_safetensors(path: pathlib.Path) -> bool:
    start = files.first_bytes(path)
    return path.suffix == ".safetensors" or start[8:9] == b"{"


def _open_safetensors(path: pathlib.Path) -> TensorSource:
    tensors, metadata = safetensor_files.open_safetensors(path)

    def read(name: str) -> np.ndarray:
        with files.errors_naming(path):
            return safetensor_files.read_tensor(path, tensors[name])

    def read_row(name: str, index: int) -> np.ndarray:
        with files.errors_naming(path):
            return safetensor_files.read_tensor(path, tensors[name].row(index))

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return TensorSource(
        str(path), shapes, dtypes, read, read_row=read_row, values=metadata
    )


def _open_npz(path: pathlib.Path) -> TensorSource:
    shapes, dtypes = npz_files.open_npz(path)
    return TensorSource(
        str(path), shapes, dtypes, lambda name: npz_files.read_array(path, name)
    )


def _open_torch(path: pathlib.Path, part: str | None) -> TensorSource:
    checkpoint = torch_files.open_checkpoint(path)
    with files.errors_naming(path):
        tensors, values = torch_files.choose(checkpoint.tree, part)
        for name, ref in tensors.items():
            pickles.check_tensor(checkpoint, name, ref)

    def read(name: str) -> np.ndarray:
        with files.errors_naming(path):
            return pickles.read_tensor(checkpoint, tensors[name])

    def read_row(name: str, index: int) -> np.ndarray:
        with files.errors_naming(path):
            return pickles.read_tensor(checkpoint, tensors[name].row(index))

    shapes = {name: ref.shape for name, ref in tensors.items()}
    dtypes = {name: ref.dtype for name, ref in tensors.items()}
    return TensorSource(
        str(path), shapes, dtypes, read, read_row=read_row, values=values
    )


def _without_wrappers(source: TensorSource) -> TensorSource:
    """The source with names as they are without wrappers around the model."""
    mapping: dict[str, str] = {}
    for old in source.shapes:
        new = _bare(old)
        if new in mapping:
            raise ValueError(
                f"{source.origin}: {mapping[new]!r} and {old!r} would both be {new!r}"
            )
        mapping[new] = old
    return renamed(source, mapping)


def _bare(name: str) -> str:
    """A name without wrappers, of which the compiler's may be inside."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")
