"""Files and folders on a disk and in buckets, by the same calls."""

import types
from concurrent import futures
from pathlib import Path

import pytest

from rae_jax import copies, storage


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request, make_bucket, tmp_path):
    if request.param == "disk":
        return tmp_path / "data"
    return storage.path(make_bucket(request.param)) / "data"


def test_a_file_appears_when_it_is_complete(folder):
    target = folder / "a" / "file.npz"
    with storage.writing(target) as file:
        assert file.suffix == ".npz"
        file.write_bytes(b"first")
        assert not target.exists()
    with pytest.raises(RuntimeError), storage.writing(target) as file:
        file.write_bytes(b"second")
        raise RuntimeError
    assert target.read_bytes() == b"first"
    storage.write_atomically(target, b"third")
    assert copies.local(target).read_bytes() == b"third"
    assert storage.names_in(folder / "a") == ([], ["file.npz"])


def test_folders_are_listed_moved_and_deleted(folder):
    for name in ("b/two", "b/c/three", "one"):
        storage.write_atomically(folder / name, name.encode())
    assert storage.names_in(folder) == (["b"], ["one"])
    assert storage.files_below(folder) == ["b/c/three", "b/two", "one"]
    assert (copies.local(folder / "b") / "c" / "three").read_bytes() == b"b/c/three"
    storage.write_atomically(folder / "moved" / "old", b"")
    storage.move_tree(folder / "b", folder / "moved")
    assert storage.files_below(folder) == ["moved/c/three", "moved/two", "one"]
    storage.remove_tree(folder / "moved")
    storage.remove_tree(folder / "moved")
    assert storage.files_below(folder) == ["one"]


def test_kinds_and_contents_are_told(folder):
    storage.write_atomically(folder / "b" / "two", b"content")
    names = ("b", "b/two", "b/three", "bb")
    assert [storage.kind(folder / n) for n in names] == ["folder", "file", "", ""]
    assert storage.read_bytes(folder / "b" / "two") == b"content"
    with pytest.raises(FileNotFoundError, match="b/three"):
        storage.read_bytes(folder / "b" / "three")


def test_files_of_a_folder_are_copied_together(folder, monkeypatch):
    names = [f"b/{k}" for k in range(5)]
    for name in names:
        storage.write_atomically(folder / name, name.encode())
    found = copies.local_files(folder, names[1:])
    assert [file.read_bytes() for file in found] == [n.encode() for n in names[1:]]
    assert found == [copies.local(folder / name) for name in names[1:]]
    if storage.is_bucket(folder):
        with pytest.raises(FileNotFoundError, match="b/9 does not exist"):
            copies.local_files(folder, ["b/0", "b/9"])
        usage = types.SimpleNamespace(free=5)  # Enough for each, not for all.
        monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: usage)
        storage.write_atomically(folder / "b" / "1", b"new")
        with pytest.raises(OSError, match="RAE_CACHE"):
            copies.local_files(folder, names[:2])
        assert copies.local_files(folder, names[2:]) == found[1:]


def test_a_copy_follows_its_original(bucket):
    target = storage.path(f"{bucket}/file")
    storage.write_atomically(target, b"one")
    first = copies.local(target)
    assert copies.local(target) == first and first.parent.parent.parent.is_dir()
    storage.write_atomically(target, b"two")
    assert copies.local(target).read_bytes() == b"two"
    assert first.read_bytes() == b"one"
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        copies.local(f"{bucket}/missing")


def test_no_room_for_a_copy_is_said(bucket, monkeypatch):
    target = storage.path(f"{bucket}/file")
    storage.write_atomically(target, b"one")
    usage = types.SimpleNamespace(free=2)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="RAE_CACHE"):
        copies.local(target)


def test_an_unwritable_bucket_is_named(bucket):
    with pytest.raises(OSError, match="ours/file: there is no such bucket"):
        storage.write_atomically(
            storage.path(f"{bucket[:5]}no-such-bucket-of-ours/file"), b""
        )


@pytest.mark.parametrize("scheme", storage.SCHEMES)
def test_a_missing_library_is_named(scheme, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    storage._prepare.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rae_jax\[(gcs|s3)\]"'):
        storage.path(f"{scheme}bucket/x")
    storage._prepare.cache_clear()


def test_addresses_need_a_bucket():
    with pytest.raises(ValueError, match="gs:///x names no bucket"):
        storage.path("gs:///x")


@pytest.mark.parametrize(
    "folder, name, joined",
    [
        ("runs/a", "../b", "runs/b"),
        ("runs/a", "gs://bucket/b", "gs://bucket/b"),
        ("gs://bucket/runs/a", "../b", "gs://bucket/runs/b"),
        ("gs://bucket/runs", "../../../b", "gs://bucket/b"),
        ("s3://bucket/runs", "s3://other/b", "s3://other/b"),
    ],
)
def test_names_count_from_a_folder(folder, name, joined):
    assert str(storage.join(storage.path(folder), name)) == joined


def test_absolute_names_stand_alone(tmp_path):
    assert storage.join(storage.path("gs://bucket/x"), str(tmp_path)) == tmp_path
    assert storage.absolute("a/../x") == Path.cwd() / "x"
    assert str(storage.absolute("gs://bucket/x")) == "gs://bucket/x"


def test_of_a_folder_only_what_is_wanted_is_copied(bucket):
    folder = storage.path(bucket) / "run"
    for name in ("config.json", "model.npz", "checkpoints/3/state/d/array"):
        storage.write_atomically(folder / name, b"x")
    copy = copies.local(folder, ("*.json", "*.npz"))
    assert storage.files_below(copy) == ["config.json", "model.npz"]
    assert len(storage.files_below(copies.local(folder))) == 3
    with pytest.raises(FileNotFoundError, match="run does not exist"):
        copies.local(folder, ("*.pt",))


def test_folders_are_whole_where_they_cannot_be_renamed(folder):
    storage.write_atomically(folder / "parts" / "old", b"")
    with pytest.raises(RuntimeError), storage.writing_folder(folder / "parts", "z"):
        raise RuntimeError
    assert storage.files_below(folder / "parts") == ["old"]
    with storage.writing_folder(folder / "parts", "a") as here:
        (here / "a").write_bytes(b"1")
        (here / "b").write_bytes(b"2")
    assert storage.files_below(folder / "parts") == ["a", "b"]
    with storage.filling(folder / "parts") as here:
        (here / "c").write_bytes(b"3")
    assert storage.files_below(folder / "parts") == ["a", "b", "c"]


def test_a_file_may_be_replaced_while_it_is_read(folder):
    """As the config of a run is, when several processes resume it."""
    contents, target = (b"old", b"the new one"), folder / "config.json"
    storage.write_atomically(target, contents[0])

    def write():
        for k in range(40):
            storage.write_atomically(target, contents[k % 2])

    with futures.ThreadPoolExecutor(1) as pool:
        writing, found = pool.submit(write), set()
        while not writing.done():
            found.add(storage.read_bytes(target))
        writing.result()
    assert found <= set(contents)
