"""Image sets that are read batch by batch, and packing them."""

import image_sets
import numpy as np
import pytest
from PIL import Image

from rae_jax import main
from rae_jax.data import transforms
from rae_jax.evaluation import streaming

SIDE = 8


def run(capsys, *arguments):
    """Returns the exit status and all that the command printed."""
    status = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# Streams of images.


def all_of(images):
    return np.concatenate(list(images.batches()))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("limit", [None, 70])
def test_packed_images_are_streamed(tmp_path, save, limit):
    pixels = image_sets.pictures(100)
    save(tmp_path / "x.npz", arr_0=pixels, labels=np.arange(100))
    images = streaming.open_images(tmp_path / "x.npz", limit)
    assert len(images) == (limit or 100) and images.size == (SIDE, SIDE)
    sizes = [len(batch) for batch in images.batches()]
    assert max(sizes) == streaming.CHUNK and len(sizes) == 2
    for _ in range(2):  # A set can be read again.
        np.testing.assert_array_equal(all_of(images), pixels[:limit])


def test_folders_are_read_in_the_order_of_their_paths(tmp_path):
    pixels = image_sets.pictures(5)
    for name, image in zip(("a/2", "a/10", "b", "c/d/e", "z"), pixels, strict=True):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    images = streaming.open_images(tmp_path)
    np.testing.assert_array_equal(all_of(images), pixels[[1, 0, 2, 3, 4]])
    assert len(streaming.open_images(tmp_path, 2)) == 2
    Image.fromarray(pixels[0, :4]).save(tmp_path / "m.png")
    with pytest.raises(ValueError) as error:
        all_of(streaming.open_images(tmp_path))
    for text in ("m.png has 8 x 4 pixels", "10.png has 8 x 8", "--pack", "--size 8"):
        assert text in str(error.value)


def test_images_that_cannot_be_used(tmp_path):
    path = tmp_path / "x.npz"

    def refused(**arrays):
        np.savez(path, **arrays)
        with pytest.raises(ValueError) as error:
            streaming.open_images(path)
        assert str(path) in str(error.value)
        return str(error.value)

    assert "no array 'arr_0', only ['images']" in refused(images=image_sets.pictures(2))
    assert "not float32 (2, 8, 8, 3)" in refused(
        arr_0=image_sets.pictures(2).astype("f4")
    )
    assert "not uint8 (2, 8, 8)" in refused(arr_0=image_sets.pictures(2)[..., 0])
    assert "is empty (0, 8, 8, 3)" in refused(arr_0=image_sets.pictures(2)[:0])
    assert "columns first" in refused(arr_0=np.asfortranarray(image_sets.pictures(2)))
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a whole .npz"):
        streaming.open_images(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        streaming.open_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        streaming.open_images(tmp_path / "gone")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        streaming.open_images(tmp_path, 0)


def test_damaged_arrays_are_noticed(tmp_path):
    """A flipped bit fails the archive's checksum once the array is read."""
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=image_sets.pictures(100))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="x.npz is damaged"):
        all_of(streaming.open_images(path))


@pytest.mark.parametrize("size", [1, 4, 9, 40])
def test_rebatching_keeps_rows_and_order(size):
    x = np.arange(23)
    batches = list(streaming.rebatch([x[:2], x[2:2], x[2:15], x[15:]], size))
    np.testing.assert_array_equal(np.concatenate(batches), x)
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert 1 <= len(batches[-1]) <= size


def test_packing_takes_all_images_below_a_folder(capsys, tmp_path):
    """In the order of their paths, as the official script, whatever the layout."""
    rng = np.random.default_rng(0)
    names = ("b.png", "a/z.png", "a-b/x.png", "a/deep/y.png", "c/w.png")
    pixels = {}
    for name in names:
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels[name] = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels[name]).save(path)
    out = tmp_path / "out.npz"
    pack = ("prepare", tmp_path / "src", "--pack", out, "--size", 8, "--workers", 1)
    status, text = run(capsys, *pack)
    assert status == 0, text
    packed = np.load(out)["arr_0"]
    assert packed.dtype == np.uint8 and len(packed) == 5
    paths = sorted(str(tmp_path / "src" / name) for name in names)
    for image, path in zip(packed, paths, strict=True):
        name = path.removeprefix(str(tmp_path / "src") + "/")
        np.testing.assert_array_equal(image, transforms.center_crop(pixels[name], 8))
    assert len(streaming.open_images(out)) == 5
    assert run(capsys, *pack, "--limit", 2)[0] == 0
    np.testing.assert_array_equal(np.load(out)["arr_0"], packed[:2])
