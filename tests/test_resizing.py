"""Windows of resized pictures: equal to Pillow's, or near to them if that is said."""

import concurrent.futures
import io
import sys
import time

import numpy as np
import pytest
from PIL import Image
from skimage import data

from rae_jax.data import resizing, transforms


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo():
    return Image.fromarray(data.astronaut()).crop((0, 60, 500, 435))


def resized(picture, size, window):
    left, top, width, height = window
    whole = np.array(picture.resize(size, Image.Resampling.BICUBIC))
    return whole[top : top + height, left : left + width]


def test_windows_are_those_of_the_whole_to_the_bit():
    """Of wide and tall pictures, shrunk and enlarged, at any place."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        old, size = rng.integers(20, 300, 2), rng.integers(10, 250, 2)
        part = rng.integers(1, size + 1)
        place = rng.integers(0, size - part + 1)
        window = tuple(int(x) for x in (*place, *part))
        picture, size = noise(*old, seed), tuple(int(x) for x in size)
        found = resizing.resized_window(picture, size, window)
        np.testing.assert_array_equal(found, resized(picture, size, window))


def adm_crop(picture, size):
    """The crop of ADM, step by step."""
    while min(*picture.size) >= 2 * size:
        half = tuple(x // 2 for x in picture.size)
        picture = picture.resize(half, resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    shape = tuple(round(x * scale) for x in picture.size)
    pixels = np.array(picture.resize(shape, resample=Image.Resampling.BICUBIC))
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (90, 700), (700, 90)])
@pytest.mark.parametrize("size", [64, 256])
def test_centre_crop_is_adms(shape, size):
    picture = photo().resize(shape)
    found = transforms.center_crop(picture, size)
    np.testing.assert_array_equal(found, adm_crop(picture, size))
    np.testing.assert_array_equal(
        transforms.center_crop(np.array(picture), size), found
    )


def test_simd_is_near_and_safe_with_threads():
    encoded = io.BytesIO()
    photo().save(encoded, "JPEG", quality=90)
    record = {"image": encoded.getvalue(), "label": 0, "name": "a photograph"}
    names = ("center_crop", "resize_random_crop", "random_resized_crop")
    makers = [(name, seed) for name in names for seed in range(20)]

    def crops(maker):
        name, seed = maker
        return [
            transforms.make_transform(name, 256, resampling=resampling).random_map(
                record, np.random.default_rng(seed)
            )["image"]
            for resampling in resizing.RESAMPLINGS
        ]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for exact, near in pool.map(crops, makers):
            difference = np.abs(exact.astype(int) - near)
            # Placed elsewhere by a tenth of a pixel, it would be more than 0.35.
            assert 0 < difference.mean() < 0.3 and difference.max() <= 16


def stage1_crop(picture, size, rng):
    """Resizing to 1.5 times the size and a random crop, as torchvision does it."""
    shape = tuple(1.5 * size * side / min(picture.size) for side in picture.size)
    picture = picture.resize(tuple(map(int, shape)), Image.Resampling.BICUBIC)
    top, left = (int(rng.integers(picture.size[i] - size + 1)) for i in (1, 0))
    return np.array(picture.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("name", ["center_crop", "resize_random_crop"])
def test_simd_takes_two_thirds_of_the_time_at_most(name):
    """With decoding, in CPU time, taking turns with the plain way; measured: half."""
    encoded, rng = io.BytesIO(), np.random.default_rng(0)
    photo().save(encoded, "JPEG", quality=90)
    record = {"image": encoded.getvalue(), "label": 0, "name": "a photograph"}
    transform = transforms.make_transform(name, 256, resampling="simd")

    def plain():
        picture = Image.open(io.BytesIO(record["image"])).convert("RGB")
        if name == "center_crop":
            return adm_crop(picture, 256)
        return stage1_crop(picture, 256, rng)

    def timed(function):
        start = time.process_time()
        for _ in range(10):
            function()
        return time.process_time() - start

    pairs = [
        (timed(plain), timed(lambda: transform.random_map(record, rng)))
        for _ in range(7)
    ]
    assert np.median([a / b for a, b in pairs]) > 1.5


def test_what_is_missing_is_said(monkeypatch):
    resizing._package.cache_clear()
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rae_jax\[fast\]"'):
        transforms.make_transform("center_crop", 32, resampling="simd")
    with pytest.raises(ValueError, match="Unknown resampling 'cubic'"):
        transforms.make_transform("center_crop", 32, resampling="cubic")
