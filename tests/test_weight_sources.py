"""Folders, shards, archives and names of weight files; where the hub keeps them."""

import json

import huggingface_hub
import numpy as np
import pytest
import weight_data

from rae_jax.convert import hub, sources

ONE = {"w": np.ones(2, np.float32)}
TWO = {"v": np.full((2, 2), 2, np.float32)}
ALLOW = ("*.json", "*.safetensors", "*.pt")


def write_index(folder, weight_map, name="model.safetensors"):
    path = folder / f"{name}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_sources_are_renamed_and_chosen_from():
    arrays = {"encoder.w": np.arange(6).reshape(2, 3).T, "encoder.b": np.array(1.0)}
    source = sources.from_arrays(arrays | {"head.w": np.ones(1)}, "here")
    assert source.origin == "here"
    inner = sources.under(source, "encoder.")
    expected = {"w": arrays["encoder.w"], "b": arrays["encoder.b"]}
    weight_data.assert_holds(inner, expected)
    weight_data.assert_holds(sources.subset(inner, ["b"]), {"b": np.array(1.0)})
    new = sources.renamed(inner, {"bias": "b", "b": "w"})
    np.testing.assert_array_equal(new.read_row("b", 2), [2, 5])
    assert new.read("bias") == 1
    for misuse in (
        lambda: source.read("w"),
        lambda: sources.renamed(source, {"x": "w"}),
        lambda: sources.subset(source, ["w"]),
    ):
        with pytest.raises(ValueError, match="here holds no tensor 'w'"):
            misuse()


def test_wrappers_leave_names(tmp_path):
    names = {
        "module._orig_mod.a": "a",
        "module.encoder._orig_mod.b": "encoder.b",
        "head.module.c": "head.module.c",
    }
    arrays = {name: np.full(1, i, np.float32) for i, name in enumerate(names)}
    for suffix in weight_data.WRITERS:
        path = weight_data.write_with(suffix, tmp_path / f"m{suffix}", arrays)
        expected = {names[name]: array for name, array in arrays.items()}
        weight_data.assert_holds(sources.open_tensors(path), expected)
    clash = {"module.a": ONE["w"], "a": ONE["w"]}
    path = weight_data.write_with(".pt", tmp_path / "m.pt", clash)
    with pytest.raises(ValueError, match="m.pt: 'module.a' and 'a' would both be 'a'"):
        sources.open_tensors(path)


def test_npz_archives(tmp_path):
    arrays = {
        "columns": np.arange(6, dtype=">f4").reshape(2, 3).T,
        "count": np.array(3, np.int16),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        source = sources.open_tensors(tmp_path / "a.npz")
        expected = {"columns": arrays["columns"].astype("f4", "C")}
        weight_data.assert_holds(source, expected | {"count": arrays["count"]})
        np.testing.assert_array_equal(source.read_row("columns", 1), [1, 4])
    with pytest.raises(ValueError, match=r"a\.npz is one set.*no part 'ema'"):
        sources.open_tensors(tmp_path / "a.npz", "ema")
    for bad in (np.array([None]), np.array(["text"])):
        np.savez(tmp_path / "a.npz", bad=bad)
        with pytest.raises(ValueError, match=r"a\.npz.*array 'bad' has type"):
            sources.open_tensors(tmp_path / "a.npz")


def test_folders_have_an_order_of_choice(tmp_path):
    """Files of usual names from the last choice to the first, each one winning."""
    with pytest.raises(FileNotFoundError, match="has no weight file.*it has nothing"):
        sources.open_tensors(tmp_path)
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(FileNotFoundError, match="it has 'readme.md'"):
        sources.open_tensors(tmp_path)
    names = ["stage2_model.pt", "model.pt", "pytorch_model.bin"]
    names += ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    for i, name in enumerate(names):
        suffix = ".safetensors" if name.endswith(".safetensors") else ".pt"
        arrays = {"w": np.full(1, i, np.float32)}
        weight_data.write_with(suffix, tmp_path / name, arrays)
        weight_data.assert_holds(sources.open_tensors(tmp_path), arrays)


def test_folders_of_several_unusual_files_are_refused(tmp_path):
    for name in ("a.pt", "b.pt"):
        weight_data.write_with(".pt", tmp_path / name, ONE)
    with pytest.raises(ValueError, match="has 'a.pt', 'b.pt': give one of these"):
        sources.open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_one_source(tmp_path, name):
    suffix = ".safetensors" if name.endswith(".safetensors") else ".pt"
    stem, end = name.split(".")
    shards = [f"{stem}-0000{i}-of-00002.{end}" for i in (1, 2)]
    index = write_index(tmp_path, {"v": shards[1], "w": shards[0]}, name)
    with pytest.raises(FileNotFoundError, match=f"not there: {', '.join(shards)}"):
        sources.open_tensors(tmp_path)
    weight_data.write_with(suffix, tmp_path / shards[0], ONE)
    with pytest.raises(FileNotFoundError, match=f"json lists .*: {shards[1]}$"):
        sources.open_tensors(tmp_path)
    weight_data.write_with(suffix, tmp_path / shards[1], TWO)
    for path in (tmp_path, index):
        source = sources.open_tensors(path)
        weight_data.assert_holds(source, TWO | ONE)
        np.testing.assert_array_equal(source.read_row("v", 1), [2, 2])


def test_bad_indices_are_explained(tmp_path):
    weight_data.write_with(".safetensors", tmp_path / "a.safetensors", ONE)
    index = write_index(tmp_path, {"w": "a.safetensors", "x": "a.safetensors"})
    with pytest.raises(ValueError, match=r"a\.safetensors holds no tensor 'x'"):
        sources.open_tensors(index)
    write_index(tmp_path, {"w": "../a.safetensors"})
    with pytest.raises(ValueError, match=r"model.*json.*'w' is not in a file beside"):
        sources.open_tensors(index)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        sources.open_tensors(index)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, which must not connect."""

    def refuse(*args, **kwargs):
        raise AssertionError("The hub was asked.")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "c"))
    return tmp_path / "c"


def snapshot(cache, repo="owner/name", revision="0" * 40):
    """Adds a repository to the cache; returns its folder of files."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    folder = root / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder


def test_local_paths_come_first(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    snapshot(cache)
    assert hub.locate("owner/name", allow=ALLOW).samefile(tmp_path / "owner" / "name")
    path = weight_data.write_with(".pt", tmp_path / "a.pt", ONE)
    assert hub.locate(path, allow=ALLOW) == path


def test_cached_repositories_are_found(cache):
    folder = snapshot(cache)
    (folder / "sub").mkdir()
    path = weight_data.write_with(".pt", folder / "sub" / "model.pt", ONE)
    assert hub.locate("owner/name:sub/model.pt", allow=ALLOW) == path
    with pytest.raises(FileNotFoundError, match="not in the cache .it has only 'sub'"):
        hub.locate("owner/name", allow=ALLOW)
    weight_data.write_with(".safetensors", folder / "model.safetensors", ONE)
    assert hub.locate("owner/name", allow=ALLOW) == folder
    with pytest.raises(FileNotFoundError, match="it has only"):
        hub.locate("owner/name", allow=("*.bin",))
    weight_data.assert_holds(sources.open_tensors(folder), ONE)


def test_half_cached_repositories_are_not_taken(cache):
    folder = snapshot(cache)
    write_index(folder, {"w": "a-1.safetensors", "v": "a-2.safetensors"})
    weight_data.write_with(".safetensors", folder / "a-1.safetensors", ONE)
    with pytest.raises(FileNotFoundError, match="it lacks 'a-2.safetensors'.*OFFLINE"):
        hub.locate("owner/name", allow=ALLOW)
    weight_data.write_with(".safetensors", folder / "a-2.safetensors", TWO)
    assert hub.locate("owner/name", allow=ALLOW) == folder


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("owner/name", "hf download owner/name"),
        ("owner/name:dir/model.pt", "hf download owner/name dir/model.pt"),
    ],
)
def test_missing_weights_are_answered_with_the_command(
    cache, monkeypatch, source, command
):
    with pytest.raises(FileNotFoundError, match=f"OFFLINE is set.*\n    {command}\n"):
        hub.locate(source, allow=ALLOW)

    def broken(*args, timeout, **kwargs):
        assert timeout <= 10
        raise ConnectionError("no route\nto host")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", broken)
    message = rf"\(no route to host\).*\n    {command}\n.*give a local file or folder"
    with pytest.raises(FileNotFoundError, match=message):
        hub.locate(source, allow=ALLOW)


def test_repositories_of_folders_need_a_file_name(cache, monkeypatch):
    files = ["readme.md", "decoders/a/model.pt"]
    siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in files]
    info = huggingface_hub.ModelInfo(
        id="owner/name", private=False, downloads=0, likes=0, tags=[], siblings=[]
    )
    info.siblings = siblings
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: info)
    for source in ("owner/name", "owner/name:model.pt"):
        with pytest.raises(
            FileNotFoundError, match="^owner/name has no.*rs/a/model.pt"
        ):
            hub.locate(source, allow=ALLOW)


@pytest.mark.parametrize("source", ["absent", "./a/b", "../a", "a/b/c", "a/b:"])
def test_what_is_neither_path_nor_id_is_said(cache, source):
    with pytest.raises(FileNotFoundError, match="no file or folder.*no hub id"):
        hub.locate(source, allow=ALLOW)
