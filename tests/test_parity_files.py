"""Weight files against torch and the safetensors library, in both directions."""

import importlib
import zipfile

import ml_dtypes
import numpy as np
import pytest
import weight_data

from rae_jax.convert import safetensor_files, sources, torch_files

pytestmark = pytest.mark.parity

torch = None  # Bound by the fixture: only parity runs have torch.

DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
]
DTYPES += ["uint8", "bool"]


@pytest.fixture(autouse=True, scope="module")
def import_torch():
    global torch
    torch = importlib.import_module("torch")


def to_numpy(tensor):
    """The same entries as an array, bfloat16 by its bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_equal(source, tensors):
    arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    weight_data.assert_holds(source, arrays)


def model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 3)
    )


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_torch_saves(tmp_path, dtype, is_zip):
    """Views, shared storages, scalars, empty tensors and parameters."""
    base = (torch.arange(60) % 7).reshape(3, 4, 5).to(getattr(torch, dtype))
    tensors = {
        "base": base,
        "view": base.permute(2, 0, 1)[1:, ::2],
        "scalar": base[1, 2, 3],
        "empty": base[:0],
        "row": base[0, :1].expand(2, 5),
    }
    if base.dtype.is_floating_point:
        tensors["parameter"] = torch.nn.Parameter(base.clone())
    path = tmp_path / "state.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    source = sources.open_tensors(path)
    assert_equal(source, tensors)
    row = to_numpy(tensors["view"][2])
    np.testing.assert_array_equal(source.read_row("view", 2), row)


def test_reads_unsigned_types(tmp_path):
    """These have no storage class, so torch describes them in another way."""
    tensors = {
        f"uint{bits}": torch.arange(6).to(getattr(torch, f"uint{bits}")).reshape(2, 3).T
        for bits in (16, 32, 64)
    }
    torch.save(tensors, tmp_path / "a.pt")
    assert_equal(sources.open_tensors(tmp_path / "a.pt"), tensors)


def test_float8_and_complex_are_refused_by_name(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        torch.save({"w": torch.ones(2).to(dtype)}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="a.pt.*(float8_e4m3fn|ComplexFloat)"):
            sources.open_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("is_zip", [True, False])
def test_reads_training_checkpoints(tmp_path, is_zip):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, betas=(0.9, 0.95))
    net(torch.ones(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60]),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ]
    wrapped = torch.nn.Module()
    wrapped.module = net
    checkpoint = {
        "step": 7,
        "epoch": 1,
        "model": wrapped.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": [scheduler.state_dict() for scheduler in schedulers],
        "rng": torch.get_rng_state(),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 0),
        "disc": None,
    }
    path = tmp_path / "ep-last.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    source = sources.open_tensors(path)
    assert_equal(source, net.state_dict())
    assert source.values == {
        "step": 7,
        "epoch": 1,
        "dtype": "torch.bfloat16",
        "device": "torch.device('cuda', 0)",
        "disc": None,
    }


def test_checksums_are_checked_unless_they_were_left_out(tmp_path):
    path = tmp_path / "a.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    weight_data.assert_holds(sources.open_tensors(path), {"w": np.ones(2, np.float32)})
    torch.save({"w": torch.ones(2)}, path)
    path.write_bytes(
        path.read_bytes().replace(b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00v")
    )
    with pytest.raises(ValueError, match="a/data.pkl is damaged"):
        sources.open_tensors(path)


@pytest.mark.parametrize("large", [2**30, 0])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(tmp_path, monkeypatch, mmap, large):
    monkeypatch.setattr(torch_files, "_LARGE", large)
    path = weight_data.write_with(".pt", tmp_path / "m.pt", weight_data.ARRAYS)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert type(loaded).__name__ == "OrderedDict"
    assert list(loaded) == list(weight_data.ARRAYS)
    for name, array in weight_data.ARRAYS.items():
        assert loaded[name].is_contiguous()
        assert loaded[name].shape == array.shape
        assert to_numpy(loaded[name]).dtype == array.dtype
        np.testing.assert_array_equal(to_numpy(loaded[name]), array)


def test_modules_load_strictly_what_is_written(tmp_path):
    net, other = model(), model()
    torch.save(net.state_dict(), tmp_path / "theirs.pt")
    source = sources.open_tensors(tmp_path / "theirs.pt")
    specs = {name: (source.shapes[name], source.dtypes[name]) for name in source.shapes}
    items = ((name, source.read(name)) for name in source.shapes)
    torch_files.write_pt(tmp_path / "ours.pt", items, specs)
    other.load_state_dict(torch.load(tmp_path / "ours.pt"), strict=True)
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert storages_of(tmp_path / "ours.pt") == storages_of(tmp_path / "theirs.pt")


def storages_of(path):
    """Contents of the archive's storages, in any order."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.split("/")[1] == "data"]
        return sorted(archive.read(name) for name in names)


def test_statistics_without_a_mean(tmp_path):
    specs = {"var": ((2, 1), np.float32)}
    items = [("var", np.full((2, 1), 3, np.float32))]
    torch_files.write_pt(tmp_path / "stat.pt", items, specs, {"mean": None})
    loaded = torch.load(tmp_path / "stat.pt", weights_only=True)
    assert list(loaded) == ["mean", "var"] and loaded["mean"] is None
    torch.save({"mean": None, "var": loaded["var"]}, tmp_path / "stat.pt")
    source = sources.open_tensors(tmp_path / "stat.pt")
    assert source.values == {"mean": None}
    weight_data.assert_holds(source, dict(items))


def test_safetensors_of_torch(tmp_path):
    theirs = importlib.import_module("safetensors.torch")
    path = tmp_path / "a.safetensors"
    tensors = {
        dtype: (torch.arange(6) % 5).reshape(2, 3).to(getattr(torch, dtype))
        for dtype in DTYPES
    }
    theirs.save_file(tensors, path)
    source = sources.open_tensors(path)
    assert_equal(source, {name: tensors[name] for name in source.shapes})
    assert source.shapes.keys() == tensors.keys()
    specs = weight_data.specs_of(weight_data.ARRAYS)
    items = weight_data.ARRAYS.items()
    safetensor_files.write_safetensors(path, items, specs, {"format": "pt"})
    loaded = theirs.load_file(path)
    for name, array in weight_data.ARRAYS.items():
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(to_numpy(loaded[name]), array)
