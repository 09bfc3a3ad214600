"""Reads numpy's npz archives of numbers, one array at a time."""

import zipfile
from typing import IO

import numpy as np

from rae_jax.convert import files

Path = files.Path


def is_npz(path: Path) -> bool:
    """Tells whether a file is a whole zip archive of arrays alone."""
    if not zipfile.is_zipfile(path):
        return False
    with files.errors_naming(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def open_npz(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, np.dtype]]:
    """Returns shape and type of each array, in the machine's byte order.

    Raises:
        ValueError: The file is damaged, or an array does not hold numbers.
    """
    shapes, dtypes = {}, {}
    with files.errors_naming(path), zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            name = entry.removesuffix(".npy")
            with archive.open(entry) as file:
                shapes[name], dtype = _header(file)
            if dtype.kind not in "biuf":
                raise ValueError(f"array {name!r} has type {dtype}, which is no number")
            dtypes[name] = dtype.newbyteorder("=")
    return shapes, dtypes


def read_array(path: Path, name: str) -> np.ndarray:
    """Reads one array, contiguous, in the machine's byte order."""
    with files.errors_naming(path), np.load(path, allow_pickle=False) as archive:
        array = archive[name]
        return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype
