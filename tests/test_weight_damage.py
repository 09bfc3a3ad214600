"""Damaged and foreign weight files, and writers that fail: one clear error each."""

import json
import pickle
import struct

import numpy as np
import pytest
import test_pickles as pickled
import weight_data

from rae_jax.convert import sources


@weight_data.EACH_WRITER
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("a", np.ones(2, "f4"))], "no array came for 'b'"),
        ([("a", np.ones(2, "f4")), ("a", np.ones(2, "f4"))], "'a' comes twice"),
        ([("c", np.ones(2, "f4"))], "'c' was not announced"),
        ([("a", np.ones(3, "f4"))], r"'a' has shape \(3,\).*not \(2,\) and float32"),
        ([("a", np.ones(2, "f8"))], "'a' has .* type float64"),
    ],
)
def test_unfinished_files_are_not_left(tmp_path, suffix, items, message):
    path = tmp_path / f"model{suffix}"
    path.write_text("before")
    specs = {"a": ((2,), np.float32), "b": ((), np.int64)}
    write = weight_data.WRITERS[suffix]
    with pytest.raises(ValueError, match=rf"model\{suffix}: .*{message}"):
        write(path, items, specs)
    with pytest.raises(ValueError, match="tensor 'x' has type complex64"):
        write(path, [], {"x": ((), np.complex64)})
    with pytest.raises(ZeroDivisionError):
        write(path, ((name, 1 / 0) for name in specs), specs)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["before"]


FOREIGN = {
    "empty": (b"", "the file is empty"),
    "text": (b"not weights\n", "is a text file"),
    "page": (b"\n<!DOCTYPE html><title>404</title>", "is a web page"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "is a Git LFS pointer",
    ),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(32), "cannot be read|no safetensors"),
    "archive": (b"PK\x03\x04" + bytes(32), "truncated"),
    "number": (pickle.dumps(3), "cannot be read|truncated|no safetensors"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.safetensors", "a.npz"])
def test_foreign_files_are_explained(tmp_path, name, kind):
    data, message = FOREIGN[kind]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*({message})"):
        sources.open_tensors(path)


@weight_data.EACH_WRITER
def test_damage_is_a_value_error_that_names_the_file(tmp_path, suffix):
    """Many truncations, and many bytes turned into others."""
    arrays = {"a.weight": np.ones((2, 3), "f4"), "a.bias": np.ones(2, weight_data.BF16)}
    good = weight_data.write_with(
        suffix, tmp_path / f"good{suffix}", arrays
    ).read_bytes()
    path = tmp_path / f"model{suffix}"
    for size in range(0, len(good), 3):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match=rf"model\{suffix}"):
            read_all(path)
    for index in range(0, len(good), 2):
        for flip in (0x01, 0x80):
            data = bytearray(good)
            data[index] ^= flip
            path.write_bytes(data)
            try:
                read_all(path)
            except ValueError as error:
                assert f"model{suffix}" in str(error)


def test_damage_is_found_on_opening(tmp_path):
    """Before any tensor is read: a cut legacy file, and a name that changed."""
    tree = pickled.state_dict_ops(weight=pickled.tensor_ops("7", (2,), (1,), size=2))
    path = tmp_path / "a.pt"
    storages = {"7": np.ones(2, np.float32)}
    path.write_bytes(pickled.legacy_bytes(tree, storages)[:-1])
    with pytest.raises(ValueError, match=r"a\.pt: the file is truncated"):
        sources.open_tensors(path)
    weight_data.write_zip(path, tree, storages)
    path.write_bytes(path.read_bytes().replace(b"weight", b"height"))
    with pytest.raises(ValueError, match=r"data\.pkl is damaged \(wrong checksum"):
        sources.open_tensors(path)


def read_all(path):
    source = sources.open_tensors(path)
    return {name: source.read(name) for name in source.shapes}


def test_truncated_safetensors_name_the_first_bad_tensor(tmp_path):
    arrays = {name: np.ones(8, np.float32) for name in "abc"}
    path = weight_data.write_with(".safetensors", tmp_path / "a.safetensors", arrays)
    path.write_bytes(path.read_bytes()[:-36])
    with pytest.raises(ValueError, match="truncated: tensor 'b' ends 4 bytes behind"):
        sources.open_tensors(path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry("F8_E4M3", (8,))}, "'a' has type F8_E4M3, which is not of BOOL"),
        ({"a": entry("C64", (1,))}, "'a' has type C64"),
        ({"a": entry(shape=(3,))}, r"'a' spans 8 bytes, its shape \(3,\) needs 12"),
        ({"a": entry(offsets=(8, 16))}, "truncated: tensor 'a'"),
        ({"a": entry(shape=(-2,))}, "'a' is described by something else"),
        ({"a": entry(), "b": entry()}, "'b' overlaps the tensor before"),
        ({"a": entry(shape=(1,), offsets=(4, 8))}, "'a' is apart"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "last 4 bytes belong to no tensor"),
        ({"a": [1]}, "'a' is not described as a tensor"),
        ([1], "no JSON object"),
    ],
)
def test_bad_safetensors_headers_are_explained(tmp_path, header, message):
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
        sources.open_tensors(path)


def test_absurd_header_lengths_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for size, message in [(2**62, "would have 4611686018427387904"), (99, "truncated")]:
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(ValueError, match=message):
            sources.open_tensors(path)
