"""Decoding of image files, and the crops and flips."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from rae_jax.data import images, transforms

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "center_crop.npz"


def picture(height=40, width=60, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_decode_keeps_lossless_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = images.decode(encoded(picture(), kind, **options))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, picture())


def test_decode_reads_a_path(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))
    np.testing.assert_array_equal(images.decode(tmp_path / "a.png"), picture())


def test_decode_cmyk_and_grey_like_pillow():
    for mode in ("CMYK", "L"):
        data = encoded(Image.fromarray(picture()).convert(mode), "JPEG", quality=100)
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(images.decode(data), expected)
    # A CMYK file looks like the picture, not like its negative.
    cmyk = encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=100)
    error = np.abs(images.decode(cmyk).astype(int) - picture()).mean()
    assert error < 5


def test_decode_scales_sixteen_bit_grey():
    values = np.linspace(0, 65535, 256 * 3).astype(np.uint16).reshape(16, 48)
    for kind in ("PNG", "TIFF"):
        pixels = images.decode(encoded(Image.fromarray(values), kind))
        expected = np.round(values / 257.0)
        np.testing.assert_array_equal(pixels, np.stack([expected] * 3, axis=-1))


def test_decode_palette_with_and_without_transparency():
    palette = Image.fromarray(picture()).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(
        images.decode(encoded(palette, "PNG")), np.array(palette.convert("RGB"))
    )
    seen = images.decode(encoded(palette, "PNG", transparency=bytes(256)))
    np.testing.assert_array_equal(seen, np.full((40, 60, 3), 255))


def test_decode_lays_transparency_on_white_and_ignores_opaque_alpha():
    alpha = np.full((40, 60, 1), 255, np.uint8)
    opaque = np.concatenate([picture(), alpha], axis=-1)
    np.testing.assert_array_equal(images.decode(encoded(opaque, "PNG")), picture())
    clear = np.concatenate([picture(), np.zeros_like(alpha)], axis=-1)
    assert images.decode(encoded(clear, "PNG")).min() == 255
    for kind, mode in (("WEBP", "RGBA"), ("PNG", "LA")):
        image = Image.fromarray(clear).convert(mode)
        options = {"lossless": True} if kind == "WEBP" else {}
        assert images.decode(encoded(image, kind, **options)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_every_exif_orientation(orientation):
    # Turning a picture that is stored turned gives what Pillow's own tool gives.
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "PNG", exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(images.decode(data), expected)
    jpeg = images.decode(encoded(picture(), "JPEG", exif=exif))
    assert jpeg.shape == expected.shape


def damaged():
    png = encoded(picture(), "PNG")
    jpeg = encoded(picture(), "JPEG")
    flipped = bytearray(png)
    flipped[60] ^= 0xFF
    return {
        "zero bytes": b"",
        "text": b"not an image",
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "truncated png": png[: len(png) // 2],
        "truncated webp": encoded(picture(), "WEBP")[:100],
        "header only": png[:20],
        "damaged png": bytes(flipped),
        "float tiff": encoded(Image.new("F", (4, 4)), "TIFF"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_bad_files_are_named(kind):
    with pytest.raises(images.BadImageError, match="Cannot read a/b.jpg: .*skip-bad"):
        images.decode(damaged()[kind], "a/b.jpg")


def test_bad_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(images.BadImageError("a.jpg", "empty")))
    assert str(error) == str(images.BadImageError("a.jpg", "empty"))


def test_damaged_metadata_and_large_files_pass_without_warnings():
    """Pillow warns about both; users must see neither a warning nor an error."""
    program = """
import io, sys
from PIL import Image
from rae_jax.data import images
Image.MAX_IMAGE_PIXELS = 2000  # 2400 pixels: Pillow warns, as for a 100 MP photo.
exif = Image.Exif()
exif[0x0112] = 6
exif[0x010F] = "maker" * 10
buffer = io.BytesIO()
Image.new("RGB", (60, 40)).save(buffer, "JPEG", exif=exif.tobytes()[:-30])
assert images.decode(buffer.getvalue()).shape in ((40, 60, 3), (60, 40, 3))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("case", ["70x90_32", "50x41_32", "33x200_16"])
def test_center_crop_equals_the_official_code(case):
    golden = np.load(GOLDEN)
    expected = golden[f"center_crop/{case}/out"]
    crop = transforms.center_crop(
        golden[f"center_crop/{case}/image"], expected.shape[0]
    )
    np.testing.assert_array_equal(crop, expected)


def test_resize_random_crop_is_a_window_of_the_resized_image():
    image = picture(50, 91)
    resized = transforms.resize_shorter(image, 48)
    assert resized.shape == (48, 87, 3)  # int(48 * 91 / 50)
    windows = np.lib.stride_tricks.sliding_window_view(resized, (32, 32), (0, 1))
    positions = set()
    for seed in range(300):
        crop = transforms.resize_random_crop(image, 32, np.random.default_rng(seed))
        match = (windows == crop.transpose(2, 0, 1)).all((2, 3, 4))
        assert match.any()
        positions.add(tuple(int(x) for x in np.argwhere(match)[0]))
    tops, lefts = zip(*positions, strict=True)
    # Every row offset occurs, and the columns reach both ends.
    assert set(tops) == set(range(17))
    assert min(lefts) <= 1 and max(lefts) >= 54


def test_decoder_training_resizes_256_to_384():
    crop = transforms.resize_random_crop(
        picture(300, 300), 256, np.random.default_rng(0)
    )
    resized = np.array(
        Image.fromarray(picture(300, 300)).resize((384, 384), Image.Resampling.BICUBIC)
    )
    rng = np.random.default_rng(0)
    top, left = rng.integers(129), rng.integers(129)
    np.testing.assert_array_equal(crop, resized[top : top + 256, left : left + 256])


@pytest.mark.parametrize("shape", [(40, 60), (9, 300), (300, 9), (5, 5)])
def test_random_resized_crop_windows_stay_inside_and_in_range(shape):
    areas = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        top, left, height, width = transforms._random_window(
            shape, rng, (0.2, 1.0), (3 / 4, 4 / 3)
        )
        assert top >= 0 and top + height <= shape[0] and height > 0
        assert left >= 0 and left + width <= shape[1] and width > 0
        areas.append(height * width / (shape[0] * shape[1]))
        if shape == (40, 60):
            assert 0.7 < width / height < 1.42  # 3/4 to 4/3, sides rounded
    if shape == (40, 60):
        assert 0.19 < min(areas) < 0.3 and max(areas) > 0.8
        assert abs(np.mean(areas) - 0.55) < 0.1


def test_flip_mirrors_half_of_the_images():
    image = picture()
    flips = 0
    for seed in range(400):
        out = transforms.flip(image, np.random.default_rng(seed))
        mirrored = bool((out == image[:, ::-1]).all())
        assert mirrored or (out == image).all()
        flips += mirrored
    assert 150 < flips < 250


def test_transforms_return_the_asked_size_and_names_are_checked():
    for name in set(transforms.NAMES) - {"none"}:
        transform = transforms.make_transform(name, 24, flip=True)
        record = {"image": encoded(picture(), "PNG"), "label": 1, "name": "x"}
        out = transform.random_map(record, np.random.default_rng(0))
        assert out["image"].shape == (24, 24, 3) and out["image"].dtype == np.uint8
        assert out["label"] == 1 and record["name"] == "x"
    with pytest.raises(ValueError, match="'centre'.*center_crop"):
        transforms.make_transform("centre", 24)
    with pytest.raises(ValueError, match="needs .24, 24, 3"):
        transforms.make_transform("none", 24).random_map(record, None)
