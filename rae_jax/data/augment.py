"""Changes of colour and shape that MoCo v3 and fine-tuning train with.

All take a picture of Pillow in mode "RGB" and draw from a numpy generator. Ranges are
those of torchvision and, for RandAugment and erasing, of timm.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

JITTER = (0.4, 0.4, 0.2, 0.1)  # Of brightness, contrast, saturation and hue.
JITTER_PROBABILITY = 0.8
GRAY_PROBABILITY = 0.2
BLUR_RADII = (0.1, 2.0)
SOLARIZE_FROM = 128
# Of each view in BYOL (arXiv:2006.07733 appendix B), which MoCo v3 follows.
BLUR_PROBABILITIES = (1.0, 0.1)
SOLARIZE_PROBABILITIES = (0.0, 0.2)

MAX_MAGNITUDE = 10.0
MAGNITUDE_STD = 0.5
NUM_OPERATIONS = 2
OPERATION_PROBABILITY = 0.5
FILL = (124, 116, 104)  # Mean colour of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)

Rng = np.random.Generator


def byol_view(picture: Image.Image, view: int, rng: Rng) -> Image.Image:
    """Returns one of the two views of a cropped picture, before it is mirrored.

    Args:
        picture: In mode "RGB".
        view: 0, nearly always blurred, or 1, now and then solarised.
        rng: Source of randomness.
    """
    if rng.random() < JITTER_PROBABILITY:
        picture = color_jitter(picture, rng)
    if rng.random() < GRAY_PROBABILITY:
        picture = grayscale(picture)
    if rng.random() < BLUR_PROBABILITIES[view]:
        picture = gaussian_blur(picture, rng.uniform(*BLUR_RADII))
    if rng.random() < SOLARIZE_PROBABILITIES[view]:
        picture = ImageOps.solarize(picture, SOLARIZE_FROM)
    return picture


def color_jitter(
    picture: Image.Image, rng: Rng, strengths: Sequence[float] = JITTER
) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, in a random order.

    Args:
        picture: In mode "RGB".
        rng: Source of randomness.
        strengths: Of the four. The first three are factors within 1 +- strength, the
            last is a share of the circle of hues within +- strength.
    """
    factors = [rng.uniform(max(0, 1 - s), 1 + s) for s in strengths[:3]]
    turn = rng.uniform(-strengths[3], strengths[3])
    for i in rng.permutation(4):
        if i == 3:
            picture = turn_hue(picture, turn)
        else:
            picture = _ENHANCERS[i](picture).enhance(factors[i])
    return picture


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Turns the hue by a share of the circle, in steps of 1/256 towards zero."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point(((np.arange(256) + int(255 * turn)) % 256).tolist())
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def grayscale(picture: Image.Image) -> Image.Image:
    """Returns the picture in grey, in mode "RGB" (ITU-R 601 luma)."""
    return picture.convert("L").convert("RGB")


def gaussian_blur(picture: Image.Image, radius: float) -> Image.Image:
    """Blurs by a Gaussian whose standard deviation in pixels is the radius."""
    return picture.filter(ImageFilter.GaussianBlur(radius))


# RandAugment


def rand_augment(picture: Image.Image, rng: Rng, magnitude: float = 9.0) -> Image.Image:
    """Applies two random operations, each with probability one half.

    arXiv:1909.13719 as timm's "rand-m9-mstd0.5-inc1", which MAE is fine-tuned with:
    operations that grow stronger with the magnitude, which varies by a normal
    deviation of 0.5; corners that come in have the mean colour of ImageNet.

    Args:
        picture: In mode "RGB".
        rng: Source of randomness.
        magnitude: Mean strength, of at most 10.
    """
    for index in rng.integers(len(OPERATIONS), size=NUM_OPERATIONS):
        if rng.random() > OPERATION_PROBABILITY:
            continue
        level = rng.normal(magnitude, MAGNITUDE_STD)
        level = min(max(level, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
        picture = OPERATIONS[index](picture, level, rng)
    return picture


def _signed(value: float, rng: Rng) -> float:
    return -value if rng.random() > 0.5 else value


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )


def auto_contrast(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Stretches each colour to all values."""
    return ImageOps.autocontrast(picture)


def equalize(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Makes the values of each colour equally frequent."""
    return ImageOps.equalize(picture)


def invert(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Returns the negative."""
    return ImageOps.invert(picture)


def rotate(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Turns by 30 degrees times the level, to either side."""
    angle = _signed(30 * level, rng)
    return picture.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def posterize(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Keeps 4 bits of each value, fewer at higher levels and none at 1."""
    dropped = 4 + int(4 * level)  # Pillow itself refuses to drop all 8.
    return picture.point(((np.arange(256) >> dropped) << dropped).tolist() * 3)


def solarize(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Inverts values from a threshold on, which falls from 256 to 0."""
    return ImageOps.solarize(picture, 256 - min(256, int(256 * level)))


def solarize_add(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Adds up to 110 to values below 128."""
    values = np.arange(256)
    added = np.minimum(values + min(128, int(110 * level)), 255)
    return picture.point(np.where(values < 128, added, values).tolist() * 3)


def _enhanced(enhancer: Callable) -> Callable[[Image.Image, float, Rng], Image.Image]:
    def apply(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
        return enhancer(picture).enhance(max(0.1, 1 + _signed(0.9 * level, rng)))

    return apply


def shear_x(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Shifts rows by up to 0.3 of their distance from the top."""
    return _affine(picture, 1, _signed(0.3 * level, rng), 0, 0, 1, 0)


def shear_y(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Shifts columns by up to 0.3 of their distance from the left."""
    return _affine(picture, 1, 0, 0, _signed(0.3 * level, rng), 1, 0)


def translate_x(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Shifts by up to 0.45 of the width."""
    pixels = _signed(0.45 * level, rng) * picture.width
    return _affine(picture, 1, 0, pixels, 0, 1, 0)


def translate_y(picture: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Shifts by up to 0.45 of the height."""
    pixels = _signed(0.45 * level, rng) * picture.height
    return _affine(picture, 1, 0, 0, 0, 1, pixels)


OPERATIONS = (
    auto_contrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


def random_erasing(image: np.ndarray, rng: Rng, probability: float) -> np.ndarray:
    """Fills one rectangle with noise, with some probability (arXiv:1708.04896).

    The noise is normal with ImageNet's mean and deviation; timm draws it after the
    normalisation, so that there it has no bounds, and here is cut off at 0 and 255.

    Args:
        image: Pixels uint8 (h, w, 3).
        rng: Source of randomness.
        probability: Of a rectangle.

    Returns:
        The image, or a changed copy.
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        aspect = math.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((h, w, 3), np.float32) * STD + MEAN
            image = image.copy()
            window = image[top : top + h, left : left + w]
            window[...] = np.round(255 * np.clip(noise, 0, 1)).astype(np.uint8)
            return image
    return image
