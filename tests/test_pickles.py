"""Restricted readers of pickled weights: exact values, and nothing else runs."""

import os
import pickle
import struct

import numpy as np
import pytest

from rae_jax.convert import pickles

READERS = [pickles.load_lpips_pickle, pickles.load_legacy_pth]
MAGIC = 0x1950A86A20F9469CFC6C


class Payload:
    """Runs a shell command when a pickle of it is loaded the usual way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def ops(value):
    """Opcodes that push a plain value: its pickle without the frame."""
    return pickle.dumps(value, 2)[2:-1]


def tensor_ops(key, shape, stride, *, size, offset=0, kind="FloatStorage"):
    """Opcodes for a tensor as torch writes it."""
    storage = b"(" + ops("storage") + f"ctorch\n{kind}\n".encode() + ops(key)
    storage += ops("cpu") + ops(size) + b"NtQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    args = storage + ops(offset) + ops(shape) + ops(stride) + ops(False) + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR"


def state_dict_ops(**tensors):
    """A whole pickle: an OrderedDict of tensors, with torch's metadata attribute."""
    items = b"".join(ops(name) + tensor for name, tensor in tensors.items())
    metadata = b"}" + ops("_metadata") + b"}sb"
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"."


def legacy_bytes(tree, storages):
    """A legacy .pth: header pickles, objects, storage keys, lengths and entries."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    data = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, system))
    data += tree + pickle.dumps(list(storages), 2)
    for values in storages.values():
        data += struct.pack("<q", values.size) + values.tobytes()
    return data


def write(tmp_path, data):
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    return path


@pytest.fixture
def legacy_file(tmp_path):
    entries = np.arange(24, dtype=np.float32)
    tree = state_dict_ops(
        rows=tensor_ops("7", (4, 3), (3, 1), size=24),
        columns=tensor_ops("7", (3, 4), (1, 3), size=24, offset=12),
        scalar=tensor_ops("8", (), (), size=1, kind="LongStorage"),
        empty=tensor_ops("7", (0, 3), (3, 1), size=24),
    )
    return write(tmp_path, legacy_bytes(tree, {"7": entries, "8": np.array([5])}))


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("package", [b"numpy._core", b"numpy.core"])
def test_nested_arrays_are_read_exactly(tmp_path, protocol, package):
    """Both module names, orders and byte orders, and protocols with raw bytes."""
    tree = {
        "conv": {"kernel": np.asfortranarray(np.random.rand(3, 2, 4).astype("f4"))},
        "big": np.arange(5, dtype=">i2"),
        "half": np.array(1.5, np.float16),
    }
    data = pickle.dumps(tree, protocol)
    if protocol == 3:  # Names are lines there, of any length.
        data = data.replace(b"numpy._core", package)
    read = pickles.load_lpips_pickle(write(tmp_path, data))
    assert read.keys() == tree.keys()
    for a, b in [
        (read["conv"]["kernel"], tree["conv"]["kernel"]),
        (read["big"], tree["big"].astype("i2")),
        (read["half"], tree["half"]),
    ]:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_legacy_tensors_are_read_exactly(legacy_file):
    read = pickles.load_legacy_pth(legacy_file)
    entries = np.arange(24, dtype=np.float32)
    assert list(read) == ["rows", "columns", "scalar", "empty"]
    np.testing.assert_array_equal(read["rows"], entries[:12].reshape(4, 3))
    np.testing.assert_array_equal(read["columns"], entries[12:].reshape(4, 3).T)
    assert read["columns"].flags.c_contiguous
    assert read["scalar"] == 5 and read["scalar"].dtype == np.int64
    assert read["empty"].shape == (0, 3)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_commands_are_refused_by_name_and_not_run(tmp_path, reader, protocol):
    marker = tmp_path / "ran"
    data = pickle.dumps({"weight": Payload(f"touch '{marker}'")}, protocol)
    pickle.loads(data)
    assert marker.exists(), "The payload is harmless, so this test proves nothing."
    marker.unlink()
    with pytest.raises(ValueError, match=r"weights.bin.*asks for \w+.system"):
        reader(write(tmp_path, data))
    assert not marker.exists()


def test_commands_behind_a_valid_header_are_refused(tmp_path):
    marker = tmp_path / "ran"
    payload = pickle.dumps({"weight": Payload(f"touch '{marker}'")}, 2)
    path = write(tmp_path, legacy_bytes(payload, {}))
    with pytest.raises(ValueError, match=r"weights.bin.*asks for \w+.system"):
        pickles.load_legacy_pth(path)
    assert not marker.exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy load", "torch load", "functools partial"]
)
def test_other_names_are_refused(tmp_path, reader, name):
    data = b"c" + name.replace(" ", "\n").encode() + b"\n."
    with pytest.raises(ValueError, match=f"asks for {name.replace(' ', '.')}"):
        reader(write(tmp_path, data))


def test_names_of_one_reader_are_unknown_to_the_other(tmp_path):
    tree = b"\x80\x02cnumpy\ndtype\n."
    with pytest.raises(ValueError, match=r"asks for numpy\.dtype"):
        pickles.load_legacy_pth(write(tmp_path, legacy_bytes(tree, {})))
    tree = b"ctorch._utils\n_rebuild_tensor_v2\n."
    with pytest.raises(ValueError, match=r"asks for torch\._utils"):
        pickles.load_lpips_pickle(write(tmp_path, tree))


def test_object_arrays_are_refused(tmp_path):
    data = pickle.dumps({"weight": np.array([None, 1], object)}, 3)
    with pytest.raises(ValueError, match="array type 'O8'"):
        pickles.load_lpips_pickle(write(tmp_path, data))


@pytest.mark.parametrize(
    "name", [b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor_v2"]
)
def test_alterations_by_one_pickle_do_not_outlive_it(tmp_path, name):
    """The BUILD opcode may set attributes on whatever a name stands for."""
    tree = b"\x80\x02c" + name + b"\n}" + ops("marked") + ops(1) + b"sb."
    with pytest.raises(ValueError, match="holds a function, not a dict"):
        pickles.load_legacy_pth(write(tmp_path, legacy_bytes(tree, {})))
    stand_ins = [*pickles._torch_names().values(), *vars(pickles).values()]
    assert not any(hasattr(value, "marked") for value in stand_ins)


def test_every_truncation_is_an_error_that_names_the_file(tmp_path, legacy_file):
    whole = {
        pickles.load_legacy_pth: legacy_file.read_bytes(),
        pickles.load_lpips_pickle: pickle.dumps({"a": {"b": np.ones(3)}}, 3),
    }
    for reader, data in whole.items():
        for size in range(len(data)):
            with pytest.raises(ValueError, match=r"weights\.bin"):
                reader(write(tmp_path, data[:size]))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "data",
    [b"\x89PNG\r\n\x1a\n" + bytes(32), b"not weights", pickle.dumps([1, 2], 3)],
    ids=["png", "text", "list"],
)
def test_foreign_files_are_errors_that_name_the_file(tmp_path, reader, data):
    with pytest.raises(ValueError, match=r"weights\.bin"):
        reader(write(tmp_path, data))


def test_zip_archives_are_recognised(tmp_path):
    with pytest.raises(ValueError, match="zip archive"):
        pickles.load_legacy_pth(write(tmp_path, b"PK\x03\x04" + bytes(32)))


@pytest.mark.parametrize("reader", READERS)
def test_missing_files_stay_missing_files(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match="absent"):
        reader(tmp_path / "absent.bin")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (ops("text"), "not those that its tensors use"),
        (tensor_ops("7", (5,), (1,), size=4), "beyond its storage"),
        (tensor_ops("7", (2, 2), (3, 1), size=4), "beyond its storage"),
        (tensor_ops("7", (1,), (1,), size=4, offset=4), "beyond its storage"),
        (tensor_ops("7", (2,), (-1,), size=4, offset=3), "something else than sizes"),
        (tensor_ops("7", (2,), (1, 1), size=4), "something else than sizes"),
        (tensor_ops("7", (2,), (1,), size=9), "has 4 entries, not 9"),
        (tensor_ops("9", (2,), (1,), size=4), "not those that its tensors use"),
        (tensor_ops("7", (2,), (1,), size=4, kind="QInt8Storage"), "QInt8Storage"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(tmp_path, tensor, message):
    tree = state_dict_ops(tensor=tensor)
    storages = {"7": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=f"weights.bin.*{message}"):
        pickles.load_legacy_pth(write(tmp_path, legacy_bytes(tree, storages)))


def test_state_dicts_hold_tensors_alone(tmp_path):
    tree = state_dict_ops(epoch=ops(3), weight=tensor_ops("7", (1,), (1,), size=1))
    path = write(tmp_path, legacy_bytes(tree, {"7": np.ones(1, np.float32)}))
    with pytest.raises(ValueError, match="'epoch' is not a named tensor"):
        pickles.load_legacy_pth(path)
