"""Tensors of every type, and the files that tests write them to."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from rae_jax.convert import safetensor_files, torch_files

BF16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS = {
    "half": np.linspace(-2, 2, 6, dtype=np.float16).reshape(2, 3),
    "brain": np.linspace(-2, 2, 5).astype(BF16),
    "single": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "double": np.array(0.1),
    "count": np.array(2**40),
    "flags": np.array([True, False, True]),
    "bytes": np.arange(3, dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float32),
}
WRITERS = {
    ".pt": torch_files.write_pt,
    ".safetensors": safetensor_files.write_safetensors,
}
EACH_WRITER = pytest.mark.parametrize("suffix", WRITERS)


def specs_of(arrays):
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def assert_holds(source, arrays):
    assert list(source.shapes) == list(arrays)
    for name, array in arrays.items():
        read = source.read(name)
        assert read.shape == source.shapes[name] == array.shape
        assert read.dtype == source.dtypes[name] == array.dtype
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, array)


def write_zip(path, tree, storages, folder="any name/", extra=()):
    """An archive as torch writes it: `tree` is a pickle, `storages` arrays by key."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(folder + "data.pkl", tree)
        for key, array in storages.items():
            archive.writestr(f"{folder}data/{key}", array.tobytes())
        for name, data in extra:
            archive.writestr(folder + name, data)
    return path


def write_with(suffix, path, arrays):
    """Writes in reverse order, which must not show in the file."""
    WRITERS[suffix](path, reversed(arrays.items()), specs_of(arrays))
    return path
