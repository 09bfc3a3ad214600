"""Sources, the embedded photographs and the batch iterators."""

import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from rae_jax.data import images, loader, photos, sources, transforms

ROOT = Path(__file__).parents[1]


def picture(height=40, width=60, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def class_folder(root, classes=3, per_class=4, size=40):
    for k in range(classes):
        folder = root / f"class_{k}"
        folder.mkdir(parents=True)
        for j in range(per_class):
            pixels = picture(size, size + 10, seed=10 * k + j)
            (folder / f"{j}.png").write_bytes(encoded(pixels, "PNG"))
    return root


def threads_and_workers():
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if "grain-" in name] + active_children()


def test_class_folder_orders_like_image_folder(tmp_path):
    class_folder(tmp_path)
    (tmp_path / "class_1" / "deeper").mkdir()
    (tmp_path / "class_1" / "deeper" / "z.JPG").write_bytes(encoded(picture(), "JPEG"))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "class_0" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "class_0" / "notes.txt").write_text("no image")
    source = sources.make_source("class_folder", path=tmp_path)
    assert source.class_names == ("class_0", "class_1", "class_2")
    assert source.num_classes == 3 and len(source) == 13
    assert [source[i]["label"] for i in range(13)] == [0] * 4 + [1] * 5 + [2] * 4
    assert source.name(8) == os.path.join("class_1", "deeper", "z.JPG")
    np.testing.assert_array_equal(
        images.decode(source[5]["image"]), picture(40, 50, seed=11)
    )


def test_split_folders_are_found(tmp_path):
    class_folder(tmp_path / "train")
    class_folder(tmp_path / "val", per_class=1)
    assert len(sources.make_source("class_folder", path=tmp_path)) == 12
    val = sources.make_source("class_folder", path=tmp_path, split="validation")
    assert len(val) == 3
    whole = sources.make_source("class_folder", path=tmp_path / "val", split="all")
    assert len(whole) == 3
    with pytest.raises(ValueError, match="no folder validation or val"):
        sources.make_source("class_folder", path=tmp_path / "val", split="validation")
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        sources.make_source("class_folder", path=tmp_path, split="test")


def test_a_class_may_be_called_train(tmp_path):
    class_folder(tmp_path, classes=2)
    (tmp_path / "class_1").rename(tmp_path / "train")
    source = sources.make_source("class_folder", path=tmp_path)
    assert source.class_names == ("class_0", "train")


def test_flat_folder_is_sorted(tmp_path):
    for name in ("b.png", "a.jpeg", "c.webp"):
        kind = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[name[2:]]
        (tmp_path / name).write_bytes(encoded(picture(), kind))
    source = sources.make_source("flat_folder", path=tmp_path)
    assert [source.name(i) for i in range(3)] == ["a.jpeg", "b.png", "c.webp"]
    assert source.num_classes == 1 and source[2]["label"] == 0


def test_wrong_folders_say_what_was_expected(tmp_path):
    def complaint(name, path, **options):
        with pytest.raises(ValueError) as caught:
            sources.make_source(name, path=path, **options)
        return str(caught.value)

    flat, classes, empty = tmp_path / "flat", tmp_path / "classes", tmp_path / "empty"
    for folder in (flat, empty, classes / "cat"):
        folder.mkdir(parents=True)
    (flat / "a.png").write_bytes(encoded(picture(), "PNG"))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "x.array_record").write_bytes(b"")

    assert "'flat_folder'" in complaint("class_folder", flat)
    assert "'class_folder'" in complaint("flat_folder", classes)
    assert "folder is empty" in complaint("class_folder", empty)
    assert "folder is empty" in complaint("flat_folder", empty)
    assert "'array_record'" in complaint("class_folder", shards)
    assert "no images in 'cat'" in complaint("class_folder", classes)
    assert "does not exist" in complaint("class_folder", tmp_path / "nowhere")
    assert "is a file" in complaint("flat_folder", flat / "a.png")
    assert "no metadata.json" in complaint("array_record", shards)
    assert "Did you mean 'class_folder'" in complaint("classfolder", flat)
    assert "needs a path" in complaint("array_record", "")


def test_synthetic_images_are_fixed_and_differ():
    source = sources.make_source("synthetic", num_images=20, image_size=16)
    np.testing.assert_array_equal(source[3]["image"], source[3]["image"])
    assert (source[3]["image"] != source[13]["image"]).any()
    assert source[13]["label"] == 3
    assert source[9]["image"].mean() > source[0]["image"].mean() + 100


def test_photo_splits_share_no_pixel_and_validation_covers_a_quarter():
    splits = {name: photos.Photos(name, crops_per_photo=64) for name in photos.SPLITS}
    for k, photo in enumerate(photos.PHOTOS):
        height, width = images.decode(photos.locate(photo)).shape[:2]
        covered = {name: np.zeros((height, width), bool) for name in photos.SPLITS}
        for name, source in splits.items():
            for crop in range(64):
                number, (left, top, right, bottom) = source.window(10 * crop + k)
                assert number == k and right - left == bottom - top
                assert left >= 0 and right <= width and top >= 0 and bottom <= height
                covered[name][top:bottom, left:right] = True
        assert not (covered["train"] & covered["validation"]).any()
        left, top, right, bottom = photos.held_out_box(photo, width, height)
        assert 0.2 < (right - left) * (bottom - top) / (width * height) < 0.27
        inside = np.zeros_like(covered["validation"])
        inside[top:bottom, left:right] = True
        assert not (covered["validation"] & ~inside).any()
        assert covered["validation"][inside].mean() > 0.8
        assert covered["train"][~inside].mean() > 0.7


def test_photo_records_are_their_windows():
    source = photos.Photos("validation", crops_per_photo=3, seed=1)
    assert len(source) == 30 and source.num_classes == 10
    for index in (0, 17, 29):
        k, (left, top, right, bottom) = source.window(index)
        whole = images.decode(photos.locate(photos.PHOTOS[k]))
        record = source[index]
        assert record["label"] == k == index % 10
        np.testing.assert_array_equal(record["image"], whole[top:bottom, left:right])


def test_photo_windows_depend_on_the_seed_and_pickle_small():
    first = photos.Photos("train", crops_per_photo=4)
    again = photos.Photos("train", crops_per_photo=4)
    other = photos.Photos("train", crops_per_photo=4, seed=1)
    windows = [[s.window(i) for i in range(40)] for s in (first, again, other)]
    assert windows[0] == windows[1] != windows[2]
    first[0]
    assert len(pickle.dumps(first)) < 10_000  # No pixels travel to workers.


def test_missing_photographs_say_what_to_install():
    photo = photos.Photo("x", "no_such_package", "a.png", (0, 0, 1, 1))
    with pytest.raises(ModuleNotFoundError, match=r"rae_jax\[demo\]"):
        photos.locate(photo)
    with pytest.raises(ValueError, match="Unknown split 'val'"):
        photos.Photos("val")


def shared_memory_blocks():
    # By type: isinstance would ask lazy modules for attributes, which may warn.
    return [x for x in gc.get_objects() if type(x) is SharedMemory]


SOURCE = sources.Synthetic(num_images=20, image_size=12)
RANDOM = transforms.make_transform("random_resized_crop", 8, flip=True)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_have_the_promised_form_and_follow_the_seed():
    first = take(loader.train_batches(SOURCE, RANDOM, batch_size=8, seed=0), 3)
    forms = {key: (value.shape, value.dtype) for key, value in first[0].items()}
    assert forms == {
        "image": ((8, 8, 8, 3), np.uint8),
        "label": ((8,), np.int32),
        "index": ((8,), np.int64),
    }
    for batch in first:
        np.testing.assert_array_equal(batch["label"], batch["index"] % 10)
    again = take(loader.train_batches(SOURCE, RANDOM, batch_size=8, seed=0), 3)
    other = take(loader.train_batches(SOURCE, RANDOM, batch_size=8, seed=1), 3)
    assert_same(first, again)
    assert (first[0]["image"] != other[0]["image"]).any()


def test_every_epoch_shows_each_image_once_in_a_new_order():
    batches = take(loader.train_batches(SOURCE, RANDOM, batch_size=8, seed=0), 10)
    order = np.concatenate([batch["index"] for batch in batches]).reshape(4, 20)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    # The crop of an image is a new one in the next epoch.
    rows = np.concatenate([batch["image"] for batch in batches]).reshape(4, 20, -1)
    views = [rows[k][order[k] == 7].tobytes() for k in range(4)]
    assert len(set(views)) == 4


def test_workers_do_not_change_batches_and_end_cleanly():
    """Two worker processes, started while JAX is running, as in training."""
    jax.numpy.zeros(1).block_until_ready()
    options = dict(batch_size=6, seed=5)
    alone = take(loader.train_batches(SOURCE, RANDOM, **options), 5)
    with loader.train_batches(SOURCE, RANDOM, num_workers=2, **options) as batches:
        assert_same(alone[:2], [next(batches), next(batches)])
        state = batches.get_state()
        batches.set_state({"batches": 3})
        assert_same(alone[3:], [next(batches), next(batches)])
        assert state == {"batches": 2}
    assert not threads_and_workers()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_same_global_batches(count):
    options = dict(batch_size=8, seed=3)
    whole = take(loader.train_batches(SOURCE, RANDOM, **options), 4)
    parts = [
        take(
            loader.train_batches(
                SOURCE, RANDOM, process_index=k, process_count=count, **options
            ),
            4,
        )
        for k in range(count)
    ]
    for step, batch in enumerate(whole):
        joined = {
            key: np.concatenate([part[step][key] for part in parts]) for key in batch
        }
        assert_same(joined, batch)


def test_resuming_gives_the_same_next_batches():
    options = dict(batch_size=8, seed=3)
    with loader.train_batches(SOURCE, RANDOM, **options) as batches:
        for _ in range(4):
            next(batches)
        state = batches.get_state()
        expected = [next(batches) for _ in range(3)]
    assert state == {"batches": 4}
    with loader.train_batches(SOURCE, RANDOM, **options) as resumed:
        resumed.set_state(state)
        assert_same([next(resumed) for _ in range(3)], expected)
    assert_same(
        take(loader.train_batches(SOURCE, RANDOM, start=4, **options), 3), expected
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("limit", [None, 16, 3])
def test_one_pass_shows_each_image_once(count, limit):
    plain = transforms.make_transform("center_crop", 8)
    parts = [
        list(
            loader.eval_batches(
                SOURCE,
                plain,
                batch_size=8,
                limit=limit,
                process_index=k,
                process_count=count,
            )
        )
        for k in range(count)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for step in range(len(parts[0])):
        for part in parts:
            batch = part[step]
            assert batch["image"].shape == (8 // count, 8, 8, 3)
            assert batch["mask"].dtype == np.float32
            seen += batch["index"][batch["mask"] == 1].tolist()
            padding = batch["index"][batch["mask"] == 0]
            assert (padding == (limit or 20) - 1).all()
    assert seen == list(range(limit or 20))  # None lost, none twice, in order.


def test_one_pass_with_workers_ends_cleanly_and_stays_ended():
    plain = transforms.make_transform("center_crop", 8)
    batches = loader.eval_batches(SOURCE, plain, batch_size=8, num_workers=2)
    seen = [int(i) for batch in batches for i in batch["index"]]
    assert seen == [*range(20), 19, 19, 19, 19]
    assert list(batches) == []
    assert not threads_and_workers()
    deadline = time.monotonic() + 10  # A thread of Grain frees the memory.
    while shared_memory_blocks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not shared_memory_blocks()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_named_by_the_iterator(tmp_path, num_workers):
    class_folder(tmp_path, classes=1)
    (tmp_path / "class_0" / "2.png").write_bytes(b"")
    source = sources.ClassFolder(tmp_path)
    plain = transforms.make_transform("center_crop", 8)
    with (
        loader.eval_batches(
            source, plain, batch_size=4, num_workers=num_workers
        ) as batches,
        pytest.raises(images.BadImageError, match=r"class_0.2\.png: .*empty"),
    ):
        next(batches)


def test_an_error_does_not_skip_the_batch(tmp_path):
    class_folder(tmp_path, classes=1)
    broken = tmp_path / "class_0" / "0.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    plain = transforms.make_transform("center_crop", 8)
    source = sources.ClassFolder(tmp_path)
    with loader.eval_batches(source, plain, batch_size=2) as batches:
        for _ in range(2):
            with pytest.raises(images.BadImageError):
                next(batches)
        broken.write_bytes(whole)
        assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3]]


def test_forgotten_iterators_leave_no_noise_at_exit():
    program = """
from rae_jax.data import loader, sources, transforms
if __name__ == "__main__":
    source = sources.Synthetic(num_images=20, image_size=12)
    crop = transforms.make_transform("center_crop", 8)
    kept = [
        loader.train_batches(source, crop, batch_size=4, seed=0, num_workers=n)
        for n in (0, 2)
    ]
    print([next(batches)["index"].shape for batches in kept])
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[(4,), (4,)]\n", "")


def test_bad_arguments_are_refused():
    def refuse(match, **options):
        options = dict(batch_size=8, seed=0) | options
        with pytest.raises(ValueError, match=match):
            loader.train_batches(SOURCE, RANDOM, **options)

    refuse("multiple of the 3 processes, got 8", process_index=0, process_count=3)
    refuse("process_index must be in", process_index=2, process_count=2)
    refuse("batch_size must be a positive", batch_size=0)
    refuse("num_workers must not be negative", num_workers=-1)
    refuse("must not be negative", start=-1)
    with pytest.raises(ValueError, match="limit must be positive"):
        loader.eval_batches(SOURCE, RANDOM, batch_size=8, limit=0)


def test_to_global_shards_the_leading_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    (batch,) = take(loader.train_batches(SOURCE, RANDOM, batch_size=16, seed=0), 1)
    arrays = loader.to_global(batch, NamedSharding(mesh, P("data")))
    assert arrays["image"].dtype == np.uint8 and arrays["index"].dtype == np.int32
    assert arrays["image"].addressable_shards[3].data.shape == (2, 8, 8, 3)
    assert_same(jax.device_get(arrays), batch)
