"""Augmentations of MoCo v3 and of fine-tuning, against closed forms.

RandAugment was also compared with timm 1.0 driven by the same draws: 600 of 600
pictures were equal to the bit.
"""

import functools

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from rae_jax import blocks
from rae_jax.data import augment, loader, sources, transforms
from rae_jax.trainers import inputs

SIDE = 40


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@functools.cache
def noise(side: int = SIDE) -> np.ndarray:
    return rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8))


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1).astype(np.uint8)


def apply(name: str, pixels: np.ndarray, level: float, seed: int = 0) -> np.ndarray:
    operation = getattr(augment, name)
    return np.asarray(operation(picture(pixels), level, rng(seed)))


# Colours


def test_gray_is_the_luma_of_itu_601():
    found = np.asarray(augment.grayscale(picture(noise())))
    luma = noise() @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(found, gray(np.round(luma)), atol=1)


def test_hue_turns_around_the_circle():
    red = gray(np.zeros((4, 4)))
    red[..., 0] = 255
    for turn, channel in ((1 / 3, 1), (-1 / 3, 2), (0.0, 0)):
        found = np.asarray(augment.turn_hue(picture(red), turn)).astype(int)
        assert found[..., channel].min() > 250, turn
        assert np.delete(found, channel, axis=-1).max() < 8, turn
    same = gray(noise()[..., 0])
    np.testing.assert_array_equal(augment.turn_hue(picture(same), 0.4), same)


@pytest.mark.parametrize("seed", range(3))
def test_jitter_of_a_gray_picture_is_brightness_and_contrast(seed):
    """Both are linear: in one order or the other they have the extremes' values."""
    values = gray(np.linspace(90, 150, SIDE**2).reshape(SIDE, SIDE))
    found = np.asarray(augment.color_jitter(picture(values), rng(seed))).astype(float)
    draws = rng(seed)
    light, contrast = draws.uniform(0.6, 1.4), draws.uniform(0.6, 1.4)
    centered = values.astype(float) - values.mean()
    expected = light * (contrast * centered + values.mean())
    np.testing.assert_allclose(found, expected, atol=2)  # Rounded after each.
    assert np.ptp(found, axis=-1).max() == 0


def test_blur_has_the_radius_as_deviation():
    # Of an edge: 8 bits would round away the tails of a point.
    edge = gray(255 * (np.arange(SIDE) >= SIDE // 2)[None].repeat(SIDE, 0))
    for radius in (1.0, 2.0):
        blurred = np.asarray(augment.gaussian_blur(picture(edge), radius))
        weights = np.diff(blurred[SIDE // 2, :, 0].astype(float)) / 255
        places = np.arange(len(weights)) - weights @ np.arange(len(weights))
        np.testing.assert_allclose(weights @ places**2, radius**2, rtol=0.06)


@pytest.mark.parametrize("view", [0, 1])
def test_byol_views_draw_with_the_published_probabilities(view, monkeypatch):
    seen = dict.fromkeys(("color_jitter", "grayscale", "gaussian_blur", "solarize"), 0)

    def counting(name):
        def count(image, *_):
            seen[name] += 1
            return image

        return count

    for name in ("color_jitter", "grayscale", "gaussian_blur"):
        monkeypatch.setattr(augment, name, counting(name))
    monkeypatch.setattr(augment.ImageOps, "solarize", counting("solarize"))
    draws, count = rng(), 4000
    for _ in range(count):
        augment.byol_view(None, view, draws)
    expected = [0.8, 0.2, (1.0, 0.1)[view], (0.0, 0.2)[view]]
    np.testing.assert_allclose([n / count for n in seen.values()], expected, atol=0.03)


# RandAugment and erasing


def test_operations_on_values():
    x = noise().astype(int)
    for name, level, expected in (
        ("invert", 0.9, 255 - x),
        ("posterize", 0.0, x & 0b11110000),
        ("posterize", 0.8, x & 0b10000000),
        ("posterize", 1.0, 0 * x),
        ("solarize", 0.0, x),
        ("solarize", 0.5, np.where(x < 128, x, 255 - x)),
        ("solarize", 1.0, 255 - x),
        ("solarize_add", 1.0, np.where(x < 128, x + 110, x)),
        ("solarize_add", 0.1, np.where(x < 128, x + 11, x)),
    ):
        np.testing.assert_array_equal(apply(name, noise(), level), expected, name)
    stretched = apply("auto_contrast", gray(np.linspace(60, 180, 1600)[None]), 0.5)
    assert (stretched.min(), stretched.max()) == (0, 255)
    flat = apply("equalize", gray(np.arange(256)[None] ** 2 / 255), 0.5)[0, :, 0]
    assert np.abs(flat - np.arange(256.0)).max() <= 16


@pytest.mark.parametrize(("seed", "sign"), [(0, -1), (1, -1), (2, 1)])
def test_operations_on_places_follow_a_ramp(seed, sign):
    """Bicubic filters reproduce linear functions; away from what comes in.

    Signs are those of the generator's first draw: above one half negates.
    """
    assert (rng(seed).random() > 0.5) == (sign < 0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    angle = np.deg2rad(sign * 30 * 0.5)
    turned = (x - SIDE / 2) * np.cos(angle) - (y - SIDE / 2) * np.sin(angle)
    middle = slice(SIDE // 3, -SIDE // 3)
    for name, across, expected in (
        ("translate_x", x, x + sign * 0.225 * SIDE),
        ("translate_y", y, y + sign * 0.225 * SIDE),
        ("shear_x", x, x + sign * 0.15 * y),
        ("shear_y", y, y + sign * 0.15 * x),
        ("rotate", x, turned + SIDE / 2),
    ):
        found = apply(name, gray(100 + 2 * across), 0.5, seed)[..., 0].astype(float)
        error = (found - 100) / 2 - expected
        assert np.abs(error[middle, middle]).max() < 0.8, name
    assert (apply("translate_x", noise(), 1.0, 2)[:, -1] == augment.FILL).all()


def test_rand_augment_draws_as_timm(monkeypatch):
    levels, counts = [], np.zeros(15)

    def recording(index):
        def record(image, level, _):
            levels.append(level)
            counts[index] += 1
            return image

        return record

    assert len(augment.OPERATIONS) == 15
    monkeypatch.setattr(augment, "OPERATIONS", [recording(i) for i in range(15)])
    draws, count = rng(), 6000
    for _ in range(count):
        augment.rand_augment(None, draws, 9.0)
    np.testing.assert_allclose(len(levels) / count, 2 * 0.5, atol=0.03)
    np.testing.assert_allclose(counts / len(levels), 1 / 15, atol=0.012)
    np.testing.assert_allclose([np.mean(levels), np.median(levels)], 0.9, atol=2e-3)
    np.testing.assert_allclose(np.std(levels), 0.05, atol=2e-3)
    assert max(levels) == 1.0  # Two deviations above: cut off.


def test_erasing_fills_one_rectangle_with_noise_of_the_mean_colour():
    image, draws = np.zeros((64, 64, 3), np.uint8), rng()
    areas, filled = [], []
    for _ in range(800):
        found = augment.random_erasing(image, draws, 0.25)
        if found is not image:
            changed = found.any(axis=-1)
            rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
            window = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            areas.append(window[..., 0].size / 64**2)
            filled.append(window.reshape(-1, 3))
    assert not image.any()
    np.testing.assert_allclose(len(areas) / 800, 0.25, atol=0.05)
    assert 0.018 < min(areas) < 0.06 and 0.25 < max(areas) < 0.36
    colour = np.concatenate(filled).mean(axis=0) / 255
    np.testing.assert_allclose(colour, augment.MEAN, atol=0.02)
    assert augment.random_erasing(image, draws, 0.0) is image


# By name


def mapped(name: str, seed: int = 0, **strengths) -> dict[str, np.ndarray]:
    transform = transforms.make_transform(name, 24, True, **strengths)
    return transform.random_map({"image": noise(64), "label": 3}, rng(seed))


def test_windows_have_the_scales_of_their_protocols():
    for name, scale in (("mae", 0.2), ("random_resized_crop", 0.2), ("probe", 0.08)):
        for seed in range(4):
            draws = rng(seed)
            crop = transforms.random_resized_crop(
                noise(64), 24, draws, scale=(scale, 1.0)
            )
            found = mapped(name, seed)["image"]
            np.testing.assert_array_equal(found, transforms.flip(crop, draws))
    wide = mapped("probe", 1, min_scale=0.2)["image"]
    np.testing.assert_array_equal(wide, mapped("mae", 1)["image"])
    plain = mapped("finetune", 2, magnitude=0.0, erasing=0.0)["image"]
    np.testing.assert_array_equal(plain, mapped("probe", 2)["image"])
    pairs = [
        [mapped(name, s)["image"] for name in ("finetune", "probe")] for s in range(12)
    ]
    assert 5 <= sum((a != b).any() for a, b in pairs) < 12


def test_moco_has_two_views_that_the_seed_determines():
    first, again = mapped("moco"), mapped("moco")
    for key in ("image", "image2"):
        assert (first[key].shape, first[key].dtype) == ((24, 24, 3), np.uint8)
        np.testing.assert_array_equal(first[key], again[key])
    assert (first["image"] != first["image2"]).mean() > 0.5
    assert first["label"] == 3
    source = sources.make_source("synthetic", num_images=8, image_size=32)
    transform = transforms.make_transform("moco", 16, True)
    with loader.train_batches(source, transform, batch_size=4, seed=0) as batches:
        assert next(batches)["image2"].shape == (4, 16, 16, 3)


def test_data_blocks_of_older_runs_and_wrong_strengths():
    block = {"transform": "mae", "image_size": 24}
    old = inputs.train_transform(ConfigDict(block), True)
    new = inputs.train_transform(ConfigDict(blocks.data(**block)), True)
    assert old == new
    for name, value in (("min_scale", 1.5), ("magnitude", 11), ("erasing", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must be within 0 and"):
            transforms.make_transform("finetune", 24, **{name: value})
