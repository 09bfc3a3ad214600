"""Images, shards and latents at gs:// and s3:// addresses are those of the disk."""

import argparse
import itertools
import os
import pickle
import shutil
import threading
import time
from concurrent import futures

import numpy as np
import pytest
from chain import load
from PIL import Image

from rae_jax import storage
from rae_jax.commands import prepare
from rae_jax.data import images, latents, loader, records, sources, transforms
from rae_jax.trainers import inputs, latent_cache
from rae_jax.training import sharding

CLASSES = ("ant", "bee", "cow")
SHARDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of classes with all that order and choice depend on."""
    root = tmp_path_factory.mktemp("images") / "train"
    names = [f"{name}/{k}.png" for name in CLASSES for k in range(3)]
    names += ["ant/deeper/z.JPG", "ant/deep-er/a.png", "bee/a b%20#1 é.png"]
    rng = np.random.default_rng(0)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((50, 40)).save(path)
    for name in (".hidden/0.png", "ant/.hidden/0.png", "ant/._0.png", "cow/notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """Those of the folder."""
    out = tmp_path_factory.mktemp("shards") / "out"
    assert run(folder, out, "--shards", SHARDS, "--workers", 1) == 0
    return out


@pytest.fixture
def requests(bucket, monkeypatch):
    """Counts what is asked of the bucket, in a list that grows."""
    system = type(storage.system(storage.path(bucket))[0])
    name = "_call" if bucket.startswith("gs") else "_call_s3"
    call, made = getattr(system, name), []

    def counted(self, method, *args, **options):
        made.append(method)
        return call(self, method, *args, **options)

    monkeypatch.setattr(system, name, counted)
    return made


def put(folder, address):
    """Copies a folder of the disk into a bucket."""
    target = storage.path(address)
    for name in storage.files_below(folder):
        storage.upload(folder / name, target / name)
    return address


def run(*words):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(word) for word in words]))


def content(folder):
    folder = storage.path(folder)
    names = storage.files_below(folder)
    return {name: storage.read_bytes(folder / name) for name in names}


def all_of(source):
    return [source[i] for i in range(len(source))]


def assert_equal(found, expected, root):
    """Two sources have the same records; names tell where they lie."""
    assert found.class_names == expected.class_names
    assert len(found) == len(expected)
    for i in range(len(expected)):
        record = found[i]
        assert record["image"] == expected[i]["image"]
        assert record["label"] == expected[i]["label"]
        assert record["name"] == f"{root}/{expected.name(i)}"
        assert found.name(i) == expected.name(i)


def test_class_folders_are_those_of_the_disk(folder, bucket, requests):
    put(folder, f"{bucket}/data/train")
    put(folder / "cow", f"{bucket}/data/train-2/dog")  # Not of the folder beside it.
    put(folder / "cow", f"{bucket}/data/val/dog")
    requests.clear()
    source = sources.make_source("class_folder", path=f"{bucket}/data")
    # Whether there is such a folder, with folders; then all that is in it.
    assert len(requests) == 6
    expected = sources.ClassFolder(folder)
    assert len(expected) == 12
    requests.clear()
    assert_equal(source, expected, f"{bucket}/data/train")
    assert len(requests) == 12
    again = pickle.loads(pickle.dumps(source))
    with futures.ThreadPoolExecutor(4) as pool:
        assert [*pool.map(again.__getitem__, range(12))] == all_of(source)
    val = sources.make_source("class_folder", path=f"{bucket}/data", split="validation")
    assert val.class_names == ("dog",) and len(val) == 3


def test_flat_folders_are_those_of_the_disk(folder, bucket):
    address = put(folder / "bee", f"{bucket}/val")
    expected = sources.FlatFolder(folder / "bee")
    for source in (
        sources.make_source("flat_folder", path=bucket, split="validation"),
        sources.open_folder(address),
    ):
        assert_equal(source, expected, address)
    pixels = images.decode(f"{address}/0.png")
    np.testing.assert_array_equal(pixels, images.decode(expected[0]["image"]))
    assert isinstance(sources.open_folder(bucket), sources.ClassFolder)


def complaint(name, path, split="train"):
    with pytest.raises(ValueError) as caught:
        sources.make_source(name, path=path, split=split)
    return str(caught.value)


def test_errors_are_those_of_the_disk_with_the_address(folder, bucket, tmp_path):
    for name in ("text/cat/notes.txt", "shards/x.array_record", "other/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    shutil.copytree(folder, tmp_path / "classes")
    shutil.copytree(folder / "cow", tmp_path / "flat")
    put(tmp_path, bucket)
    for name, path, split, expected in (
        ("class_folder", "flat", "train", "'flat_folder'"),
        ("flat_folder", "classes", "train", "'class_folder'"),
        ("class_folder", "shards", "train", "'array_record'"),
        ("flat_folder", "other", "train", "found only 'notes.txt'"),
        ("class_folder", "text", "train", "no images in 'cat'"),
        ("class_folder", "nowhere", "train", "nowhere does not exist"),
        ("class_folder", "classes", "validation", "no folder validation or val"),
        ("flat_folder", "flat/0.png", "train", "is a file"),
        ("array_record", "classes", "train", "no metadata.json"),
        ("array_record", "nowhere/images-*", "train", "nowhere does not exist"),
    ):
        found = complaint(name, f"{bucket}/{path}", split)
        assert expected in found and f"{bucket}/{path}".rstrip("/images-*") in found
        on_disk = complaint(name, tmp_path / path, split)
        assert found.replace(bucket, "") == on_disk.replace(str(tmp_path), "")


def test_empty_folders_are_told(bucket):
    """Some tools make a folder as an empty object; a bucket is a folder itself."""
    system, key = storage.system(storage.path(bucket))
    assert f"{bucket}: " in complaint("flat_folder", bucket)
    system.pipe_file(f"{key}/empty/", b"")
    for name in ("class_folder", "flat_folder"):
        found = complaint(name, f"{bucket}/empty")
        assert "folder is empty" in found and f"{bucket}/empty" in found
    missing = f"{bucket[:5]}no-such-bucket-of-ours/x"
    assert f"{missing} does not exist" in complaint("class_folder", missing)


def test_shards_are_those_of_the_disk(shards, bucket, tmp_path):
    address, expected = put(shards, f"{bucket}/shards"), sources.ArrayRecords(shards)
    source = sources.make_source("array_record", path=address)
    again = pickle.loads(pickle.dumps(source))
    assert source.class_names == expected.class_names
    for found in (source, again):
        assert all_of(found) == all_of(expected)
    some = sources.ArrayRecords(f"{address}/images-0000[12]-*")
    names = [expected[i]["name"] for i in range(4, 12)]
    assert [some[i]["name"] for i in range(len(some))] == names
    # Those of gs:// are read where they are; those of s3:// were copied, each once.
    copies = list(tmp_path.rglob("*.array_record"))
    assert len(copies) == (0 if bucket.startswith("gs") else SHARDS)
    assert "names none of the 3 shards" in complaint("array_record", f"{address}/x*")


def test_damaged_shards_are_named(shards, bucket, requests):
    address = put(shards, f"{bucket}/shards")
    folder, name = storage.path(address), records.shard_names(SHARDS)[1]
    storage.write_atomically(folder / name, (shards / name).read_bytes()[:70_000])
    found = complaint("array_record", address)
    assert found.startswith(f"{address}/{name} is damaged; prepare it again.")
    storage.remove(folder / name)
    requests.clear()
    assert complaint("array_record", address) == (
        f"{address} lacks '{name}'; prepare it again."
    )
    assert len(requests) <= 7  # None is of one shard alone.


@pytest.mark.parametrize("kind, workers", [("gs", 2), ("s3", 1)])
def test_prepare_reads_and_writes_buckets(
    folder, make_bucket, tmp_path, capsys, kind, workers
):
    bucket = make_bucket(kind)
    address = put(folder, f"{bucket}/images")
    words = ("--shards", SHARDS, "--size", 16, "--transform", "center_crop")
    pack = ("--size", 8, "--skip-bad", "--workers", 1)  # Hidden files are bad.
    assert run(folder, tmp_path / "out", *words, "--workers", 1) == 0
    assert run(address, f"{bucket}/out", *words, "--workers", workers) == 0
    for source, place in ((folder, tmp_path), (address, bucket)):
        assert run(source, "--pack", f"{place}/pack/a.npz", *pack) == 0
        assert "Skipped 2 files" in capsys.readouterr().out
    for name, count in (("out", SHARDS + 1), ("pack", 1)):
        found = content(f"{bucket}/{name}")
        assert found == content(tmp_path / name) and len(found) == count


def test_an_interrupted_prepare_continues(
    folder, bucket, tmp_path, monkeypatch, capsys
):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "cow" / "1.png").write_bytes(b"")
    address, out = put(images, f"{bucket}/images"), f"{bucket}/out"
    words = ("--shards", SHARDS, "--workers", 1)
    assert run(address, out, *words) == 1
    assert f"{address}/cow/1.png: the file is empty" in capsys.readouterr().err
    assert "has no metadata.json" in complaint("array_record", out)
    storage.upload(folder / "cow" / "1.png", storage.path(address) / "cow" / "1.png")
    upload, written = storage.upload, []
    monkeypatch.setattr(
        storage, "upload", lambda *a: (written.append(a[1].name), upload(*a))
    )
    assert run(address, out, *words) == 0
    last = records.shard_names(SHARDS)[-1]
    assert written == ["plan.json", last, f"{last}.json", records.METADATA]
    assert run(folder, tmp_path / "out", *words) == 0
    assert content(out) == content(tmp_path / "out")
    written.clear()
    assert run(address, out, *words) == 0 and not written
    assert run(address, out, *words, "--size", 8) == 1
    assert f"{out} was prepared with other size" in capsys.readouterr().err


def test_an_unwritable_bucket_is_told_once(folder, bucket, capsys):
    missing = f"{bucket[:5]}no-such-bucket-of-ours/x"
    assert run(folder, missing, "--workers", 1) == 1
    error = capsys.readouterr().err
    assert error == (
        f"rae-jax prepare: {missing}/unfinished/plan.json: there is no such bucket.\n"
    )


def config(path, *more):
    data = ("data.source=class_folder", f"data.path={path}", "data.split=all")
    return load("latent_diffusion", *data, "mesh.data=1", "model.num_classes=3", *more)


def test_latents_are_those_of_the_disk(folder, bucket, tmp_path):
    address = put(folder, f"{bucket}/images")
    target, mesh = storage.path(f"{bucket}/latents"), sharding.make_mesh(1)

    def job(path, target):
        options = dict(batch_size=4, num_shards=SHARDS)
        return latent_cache.make_job(config(path), target, mesh, **options)

    def stop(count):
        counted.append(count)
        if sum(counted) == 6:
            raise KeyboardInterrupt

    counted = []
    with pytest.raises(KeyboardInterrupt):
        job(address, target).run(mesh, stop)
    with pytest.raises(ValueError, match="run the same command again"):
        latents.Latents(target)
    half = job(address, target)
    assert half.bytes_to_write == half.bytes_in_all * 8 // 12
    assert f"in {target} (" in half.describe()
    assert "a bucket has no known limit" in half.describe()
    counted = []
    half.run(mesh, counted.append)
    assert counted[0] == 4 and sum(counted) == 12
    job(folder, tmp_path / "latents").run(mesh, lambda count: None)
    found, expected = content(target), content(tmp_path / "latents")
    for files, path in ((found, address), (expected, folder)):
        name = str(path).encode()  # The metadata tells the images' own.
        assert files[records.METADATA].count(name) == 1
        files[records.METADATA] = files[records.METADATA].replace(name, b"")
    assert found == expected
    on_disk, source = (
        latents.Latents(tmp_path / "latents"),
        latents.Latents(str(target)),
    )
    assert source[7] == on_disk[7]
    for index, mirrored in ((0, False), (7, True), (11, False)):
        np.testing.assert_array_equal(
            source.latent(index, mirrored), on_disk.latent(index, mirrored)
        )
    storage.remove(target / latents.LABELS)
    with pytest.raises(ValueError, match=f"{target}/labels.npy has 0 labels"):
        latents.Latents(target)
    with pytest.raises(ValueError, match=f"{target}2 does not exist"):
        latents.Latents(f"{target}2")


@pytest.mark.parametrize(
    "kind, source_name", [("gs", "array_record"), ("s3", "class_folder")]
)
def test_worker_processes_read_buckets(folder, shards, make_bucket, kind, source_name):
    path = folder if source_name == "class_folder" else shards
    address = put(path, f"{make_bucket(kind)}/data")
    crop = transforms.make_transform("random_resized_crop", 8, flip=True)
    taken = []
    for place, workers in ((path, 0), (address, 2)):
        source = sources.make_source(source_name, path=place)
        options = dict(batch_size=4, seed=0, num_workers=workers)
        with loader.train_batches(source, crop, **options) as batches:
            taken.append(list(itertools.islice(batches, 4)))
    for expected, found in zip(*taken, strict=True):
        for key, rows in expected.items():
            np.testing.assert_array_equal(found[key], rows)


def test_names_of_a_home_are_resolved(folder, monkeypatch):
    monkeypatch.setenv("HOME", os.fspath(folder.parent))
    assert len(sources.make_source("class_folder", path="~")) == 12


class Slow:
    """Images that take a while to come; remembers how many came at a time."""

    class_names, num_classes, waits = ("image",), 1, True

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        return {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "name": ""}


def test_more_is_asked_for_where_answers_take_time(monkeypatch):
    monkeypatch.setattr(loader.os, "cpu_count", lambda: 1)
    most = []
    for source in (Slow(), inputs.Subset(Slow(), np.arange(64)), Slow()):
        inner = getattr(source, "_source", source)
        inner.waits = len(most) < 2
        with loader.train_batches(
            source, transforms.make_transform("none", 8), batch_size=4, seed=0
        ) as batches:
            for _ in itertools.islice(batches, 12):
                pass
        most.append(inner.most)
    assert min(most[:2]) > 4 and most[2] <= 2
