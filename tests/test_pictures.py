"""Pictures side by side in a file."""

import numpy as np
from PIL import Image

from rae_jax.evaluation import pictures

GAP = pictures.GAP


def colours(count, height=3, width=4):
    """Flat uint8 images (count, h, w, 3), none of them white."""
    values = np.random.default_rng(count).integers(0, 200, (count, 1, 1, 3), np.uint8)
    return np.broadcast_to(values, (count, height, width, 3))


def test_rows_stand_below_each_other_with_gaps(tmp_path):
    rows = [colours(3), colours(2, 5, 2)]
    path = tmp_path / "new" / "rows.png"
    pictures.save_rows(path, rows, zoom=1)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (3 * GAP + 3 + 5, 4 * GAP + 3 * 4, 3)
    for row, top, width in ((rows[0], GAP, 4), (rows[1], 2 * GAP + 3, 2)):
        for i, image in enumerate(row):
            left = GAP + i * (width + GAP)
            found = pixels[top : top + image.shape[0], left : left + width]
            np.testing.assert_array_equal(found, image)
    inside = sum(row[..., 0].size for row in rows)
    white = (pixels == 255).all(axis=-1).sum()
    assert white == pixels[..., 0].size - inside
    assert [p.name for p in path.parent.iterdir()] == ["rows.png"]


def test_zoom_repeats_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 3, 3), np.uint8)
    pictures.save_rows(tmp_path / "one.png", [images], zoom=1)
    pictures.save_rows(tmp_path / "three.png", [images], zoom=3)
    one, three = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "three")
    )
    np.testing.assert_array_equal(three, one.repeat(3, axis=0).repeat(3, axis=1))


def test_grid_fills_rows_and_the_last_may_be_short(tmp_path):
    images = colours(5)
    pictures.save_grid(tmp_path / "grid.png", images, columns=2, zoom=1)
    pictures.save_rows(
        tmp_path / "rows.png", [images[:2], images[2:4], images[4:]], zoom=1
    )
    grid, rows = (tmp_path / f"{name}.png" for name in ("grid", "rows"))
    assert grid.read_bytes() == rows.read_bytes()


def test_floats_are_rounded_and_clipped():
    values = np.array([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 0.5, 1.0, 7.0])
    np.testing.assert_array_equal(
        pictures.to_pixels(values), [0, 0, 0, 1, 128, 255, 255]
    )
    pixels = np.arange(256, dtype=np.uint8)
    assert pictures.to_pixels(pixels) is pixels
    np.testing.assert_array_equal(pictures.to_pixels(pixels / 255), pixels)
