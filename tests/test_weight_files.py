"""Weight files without torch: exact values, one tensor at a time, clear refusals."""

import builtins
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import test_pickles as pickled
import weight_data

from rae_jax.convert import safetensor_files, sources, torch_files


def dict_ops(**items):
    """Opcodes for a plain dict of values that are opcodes."""
    entries = b"".join(pickled.ops(name) + value for name, value in items.items())
    return b"}(" + entries + b"u"


def whole(ops):
    return b"\x80\x02" + ops + b"."


@weight_data.EACH_WRITER
def test_written_files_are_read_exactly(tmp_path, suffix):
    """Every type, scalars and empty tensors, in any order of writing."""
    path = weight_data.write_with(
        suffix, tmp_path / f"model{suffix}", weight_data.ARRAYS
    )
    weight_data.assert_holds(sources.open_tensors(path), weight_data.ARRAYS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_safetensors_agree_with_their_library(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"format": "pt"}
    specs = weight_data.specs_of(weight_data.ARRAYS)
    safetensor_files.write_safetensors(
        path, weight_data.ARRAYS.items(), specs, metadata
    )
    theirs = safetensors.numpy.load_file(path)
    for name, array in weight_data.ARRAYS.items():
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(theirs[name], array)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == sources.open_tensors(path).values == metadata
    safetensors.numpy.save_file(weight_data.ARRAYS, path)
    read = sources.open_tensors(path)
    weight_data.assert_holds(
        read, {name: weight_data.ARRAYS[name] for name in read.shapes}
    )
    assert read.shapes.keys() == weight_data.ARRAYS.keys()


@pytest.mark.parametrize("large", [2**30, 0])
def test_pt_entries_are_aligned_and_stored(tmp_path, monkeypatch, large):
    """With and without the fields of large entries."""
    monkeypatch.setattr(torch_files, "_LARGE", large)
    path = weight_data.write_with(".pt", tmp_path / "model.pt", weight_data.ARRAYS)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            name_size, extra_size = struct.unpack_from(
                "<HH", data, entry.header_offset + 26
            )
            start = entry.header_offset + 30 + name_size + extra_size
            assert start % 64 == 0
            assert entry.compress_type == zipfile.ZIP_STORED
    weight_data.assert_holds(sources.open_tensors(path), weight_data.ARRAYS)


def test_statistics_may_lack_a_mean(tmp_path):
    path = tmp_path / "stat.pt"
    specs = {"var": ((2,), np.float32)}
    torch_files.write_pt(path, [("var", np.ones(2, "f4"))], specs, {"mean": None})
    source = sources.open_tensors(path)
    assert source.values == {"mean": None}
    weight_data.assert_holds(source, {"var": np.ones(2, np.float32)})


@pytest.mark.parametrize("folder", ["", "archive/", "stage 2/"])
def test_zip_tensors_are_strided_views(tmp_path, folder):
    entries = np.arange(24, dtype=np.float32)
    parameter = pickled.tensor_ops("7", (2, 2), (6, 1), size=24, offset=1)
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + parameter + b"\x88)tR"
    tree = pickled.state_dict_ops(
        rows=pickled.tensor_ops("7", (4, 3), (3, 1), size=24),
        columns=pickled.tensor_ops("7", (3, 4), (1, 3), size=24, offset=12),
        parameter=parameter,
        expanded=pickled.tensor_ops("7", (2, 2), (0, 1), size=24, offset=22),
        single=pickled.tensor_ops("7", (1, 2), (99, 1), size=24, offset=22),
        scalar=pickled.tensor_ops("8", (), (), size=1, kind="LongStorage"),
    )
    storages = {"7": entries, "8": np.array([5])}
    extra = [("byteorder", "little"), ("version", "3\n")]
    source = sources.open_tensors(
        weight_data.write_zip(tmp_path / "a.pt", tree, storages, folder, extra)
    )
    rows = entries[:12].reshape(4, 3)
    columns = entries[12:].reshape(4, 3).T
    expected = {
        "rows": rows,
        "columns": columns,
        "parameter": np.float32([[1, 2], [7, 8]]),
        "expanded": np.float32([[22, 23], [22, 23]]),
        "single": np.float32([[22, 23]]),
        "scalar": np.array(5),
    }
    weight_data.assert_holds(source, expected)
    np.testing.assert_array_equal(source.read_row("columns", 2), columns[2])
    with pytest.raises(ValueError, match="'columns' has no row 3"):
        source.read_row("columns", 3)


def checkpoint_tree():
    """A training checkpoint, with all that optimisers and schedulers keep."""

    def weights(key, prefix=""):
        tensor = pickled.tensor_ops(key, (2,), (1,), size=2)
        return dict_ops(**{f"{prefix}head.weight": tensor, "note": pickled.ops("x")})

    moments = dict_ops(
        exp_avg=pickled.tensor_ops("0", (2,), (1,), size=2),
        dtype=b"ctorch\nfloat32\n",
        device=b"ctorch\ndevice\n" + pickled.ops(("cuda", 0)) + b"R",
    )
    state = b"ccollections\ndefaultdict\nc__builtin__\ndict\n\x85R"
    milestones = b"ccollections\nCounter\n" + pickled.ops({30: 1}) + b"\x85R"
    groups = [{"lr": 2e-4, "betas": (0.9, 0.95), "params": [0, 1], "foreach": None}]
    scheduler = dict_ops(
        milestones=milestones, _last_lr=pickled.ops([1e-4]), lr_lambdas=pickled.ops([])
    )
    return dict_ops(
        step=pickled.ops(100080),
        epoch=pickled.ops(80),
        optimizer=dict_ops(
            state=state + pickled.ops(0) + moments + b"s",
            param_groups=pickled.ops(groups),
        ),
        scheduler=scheduler,
        disc=weights("1"),
        model=weights("2", "module._orig_mod."),
        ema=weights("3", "_orig_mod."),
        shape=b"ctorch\nSize\n" + pickled.ops(((2, 3),)) + b"R",
    )


@pytest.fixture(params=["zip", "legacy"])
def training_checkpoint(request, tmp_path):
    path = tmp_path / "ep-0000080.pt"
    storages = {str(i): np.full(2, i, np.float32) for i in range(4)}
    tree = whole(checkpoint_tree())
    if request.param == "zip":
        return weight_data.write_zip(path, tree, storages)
    path.write_bytes(pickled.legacy_bytes(tree, storages))
    return path


@pytest.mark.parametrize(
    ("part", "value"), [(None, 3), ("ema", 3), ("model", 2), ("disc", 1)]
)
def test_parts_of_training_checkpoints(training_checkpoint, part, value):
    source = sources.open_tensors(training_checkpoint, part)
    weight_data.assert_holds(source, {"head.weight": np.full(2, value, np.float32)})
    assert source.values == {"step": 100080, "epoch": 80, "note": "x"}


def test_absent_parts_are_answered_with_the_present_ones(training_checkpoint):
    with pytest.raises(ValueError, match="0080.pt.*'ema2'.*'optimizer'.*'disc', 'mod"):
        sources.open_tensors(training_checkpoint, "ema2")
    with pytest.raises(ValueError, match="'state' is a dict, not a tensor"):
        sources.open_tensors(training_checkpoint, "optimizer")


def test_flat_files_have_no_parts(tmp_path):
    for suffix in (".pt", ".safetensors"):
        path = weight_data.write_with(
            suffix, tmp_path / f"model{suffix}", weight_data.ARRAYS
        )
        with pytest.raises(ValueError, match=r"model\.\w+.* no part 'ema'"):
            sources.open_tensors(path, "ema")
    tree = whole(dict_ops(weights=dict_ops(step=pickled.ops(1))))
    with pytest.raises(ValueError, match="'weights' is a dict.*parts are: 'weights'"):
        sources.open_tensors(weight_data.write_zip(tmp_path / "a.pt", tree, {}))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("nested", [False, True])
def test_commands_are_refused_by_name_and_not_run(tmp_path, protocol, kind, nested):
    """Wherever they hide, so in optimiser state whose weights would be fine."""
    marker = tmp_path / "ran"
    tree = {"ema": {}, "optimizer": {0: pickled.Payload(f"touch '{marker}'")}}
    data = pickle.dumps(tree if nested else tree["optimizer"][0], protocol)
    pickle.loads(data)
    assert marker.exists(), "The payload is harmless, so this test proves nothing."
    marker.unlink()
    path = tmp_path / "weights.pt"
    if kind == "zip":
        weight_data.write_zip(path, data, {})
    else:
        path.write_bytes(data if kind == "plain" else pickled.legacy_bytes(data, {}))
    with pytest.raises(ValueError, match=r"weights.pt.*asks for posix.system, which"):
        sources.open_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "torch load",
        "torch.storage _load_from_bytes",
    ]
    + ["numpy.core.multiarray scalar", "argparse Namespace", "torch Tensor"],
)
def test_other_names_are_refused(tmp_path, name):
    ops = dict_ops(args=b"c" + name.replace(" ", "\n").encode() + b"\n")
    with pytest.raises(ValueError, match=f"asks for {name.replace(' ', '.')}, which"):
        sources.open_tensors(weight_data.write_zip(tmp_path / "a.pt", whole(ops), {}))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (pickled.tensor_ops("7", (5,), (1,), size=4), "'w' reaches beyond its storage"),
        (pickled.tensor_ops("7", (2, 2), (3, 1), size=4), "'w' reaches beyond"),
        (pickled.tensor_ops("7", (2,), (1,), size=9), "'w'.*has 16 bytes, not 36"),
        (pickled.tensor_ops("9", (2,), (1,), size=4), "'w'.*storage '9' is missing"),
        (pickled.tensor_ops("7", (2,), (-1,), size=4, offset=3), "else than sizes"),
        (pickled.ops([1, 2]), "'w' is a list, not a tensor"),
    ],
)
def test_bad_tensors_are_named(tmp_path, tensor, message):
    tree = pickled.state_dict_ops(w=tensor)
    path = weight_data.write_zip(tmp_path / "a.pt", tree, {"7": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match=f"a.pt.*{message}"):
        sources.open_tensors(path)


def test_unsupported_archives_are_explained(tmp_path):
    path, tree = tmp_path / "a.pt", pickled.state_dict_ops()
    weight_data.write_zip(path, tree, {}, extra=[("byteorder", "big")])
    with pytest.raises(ValueError, match="byte order is b'big', not little"):
        sources.open_tensors(path)
    weight_data.write_zip(path, tree, {}, extra=[("constants.pkl", b"")])
    with pytest.raises(ValueError, match="TorchScript"):
        sources.open_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tree)
    with pytest.raises(ValueError, match=r"a/data\.pkl is compressed"):
        sources.open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"")
    with pytest.raises(ValueError, match=r"without torch's data\.pkl; it has 'photo"):
        sources.open_tensors(path)


def test_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    """Counts the bytes that the readers take from files of 4 x 1 MB."""
    arrays = {f"w{i}": np.full((4, 1 << 16), i, np.float32) for i in range(4)}
    paths = [tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "legacy.pt"]
    for path in paths[:2]:
        weight_data.write_with(path.suffix, path, arrays)
    refs = {
        name: pickled.tensor_ops(name, array.shape, (1 << 16, 1), size=array.size)
        for name, array in arrays.items()
    }
    tree = pickled.state_dict_ops(**refs)
    paths[2].write_bytes(pickled.legacy_bytes(tree, arrays))
    counter = CountingFile.count_in(monkeypatch)
    for path in paths:
        counter.total = 0
        source = sources.open_tensors(path)
        assert 0 < counter.total < 1 << 17
        np.testing.assert_array_equal(source.read("w2"), arrays["w2"])
        assert 1 << 20 <= counter.total < (1 << 20) + (1 << 18)
        assert (source.read_row("w3", 1) == 3).all()
        assert counter.total < (1 << 20) + (1 << 19)


class CountingFile(io.FileIO):
    """A file that counts the bytes which are read from any of its kind."""

    total = 0

    def readinto(self, buffer):
        size = super().readinto(buffer)
        CountingFile.total += size
        return size

    def readall(self):
        data = super().readall()
        CountingFile.total += len(data)
        return data

    @classmethod
    def count_in(cls, monkeypatch):
        """Makes binary files that are opened from now on count."""

        def counting_open(path, mode):
            assert mode == "rb"
            return io.BufferedReader(cls(path))

        monkeypatch.setattr(builtins, "open", counting_open)
        return cls
