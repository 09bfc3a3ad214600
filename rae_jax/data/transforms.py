"""Crops and flips of uint8 images, pixel for pixel as the official RAE code."""

import dataclasses
import math
from typing import Any

import grain
import numpy as np
from PIL import Image

from rae_jax.data import augment, images, resizing

Picture = np.ndarray | Image.Image

MOCO = "moco"
# Those that cut out a random window, with the smallest share of the area.
MIN_SCALES = {
    "random_resized_crop": 0.2,
    "mae": 0.2,
    "probe": 0.08,
    "finetune": 0.08,
    MOCO: 0.08,
}
NAMES = ("center_crop", "resize_random_crop", "none", *MIN_SCALES)
SECOND = "image2"  # Of a record, the second view of "moco".


def center_crop(
    image: Picture, size: int, *, resampling: str = resizing.PILLOW
) -> np.ndarray:
    """Returns the central square (size, size, 3), as ADM and DiT crop ImageNet.

    Halves with a box filter while the shorter side is at least twice the size, then
    resizes it to the size with a bicubic filter, then crops.

    Args:
        image: Pixels uint8 (h, w, 3), or a picture of Pillow in mode "RGB".
        size: Side of the crop.
        resampling: See `resizing.resized_window`.
    """
    picture = _picture(image)
    while min(picture.size) >= 2 * size:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    window = (left, top, size, size)
    return resizing.resized_window(picture, (width, height), window, resampling)


def resize_random_crop(
    image: Picture,
    size: int,
    rng: np.random.Generator,
    *,
    resampling: str = resizing.PILLOW,
) -> np.ndarray:
    """Returns a random square (size, size, 3) of the image resized to 1.5 x size.

    The transform of RAE decoder training: the shorter side becomes 384 pixels for
    crops of 256, and int(1.5 * size) otherwise.
    """
    picture = _picture(image)
    width, height = _shape_of_shorter(picture.size, int(1.5 * size))
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    window = (left, top, size, size)
    return resizing.resized_window(picture, (width, height), window, resampling)


def resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes so that the shorter side has `size` pixels (bicubic, antialiased)."""
    size_of = (image.shape[1], image.shape[0])
    if min(size_of) == size:
        return image
    shape = _shape_of_shorter(size_of, size)
    return np.array(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def _shape_of_shorter(old: tuple[int, int], shorter: int) -> tuple[int, int]:
    # The longer side is truncated, as in torchvision.
    return shorter * old[0] // min(old), shorter * old[1] // min(old)


def random_resized_crop(
    image: Picture,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resampling: str = resizing.PILLOW,
) -> np.ndarray:
    """Returns a window of random area and aspect ratio, resized to (size, size, 3).

    The distribution of torchvision's RandomResizedCrop, with bicubic resizing and by
    default the area range of MAE (arXiv:2111.06377), which l-DAE follows.

    Args:
        image: Pixels uint8 (h, w, 3), or a picture of Pillow in mode "RGB".
        size: Side of the result.
        rng: Source of randomness.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height, drawn log-uniformly.
        resampling: See `resizing.resized_window`.
    """
    picture = _picture(image)
    shape = (picture.height, picture.width)
    top, left, height, width = _random_window(shape, rng, scale, ratio)
    picture = picture.crop((left, top, left + width, top + height))
    whole = (size, size)
    return resizing.resized_window(picture, whole, (0, 0, *whole), resampling)


def _random_window(
    shape: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of a window inside an image of a shape."""
    for _ in range(10):
        area = shape[0] * shape[1] * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= shape[1] and 0 < height <= shape[0]:
            top = int(rng.integers(shape[0] - height + 1))
            left = int(rng.integers(shape[1] - width + 1))
            return top, left, height, width
    # No draw fitted, as with very long images: the largest central window does.
    height = min(shape[0], round(shape[1] / ratio[0]))
    width = min(shape[1], round(shape[0] * ratio[1]))
    return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width


def _picture(image: Picture) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the image left to right with probability one half."""
    return image[:, ::-1] if draws_flip(rng) else image


def draws_flip(rng: np.random.Generator) -> bool:
    """Returns whether `flip` would mirror."""
    return rng.random() < 0.5


@dataclasses.dataclass(frozen=True)
class Transform(grain.transforms.RandomMap):
    """Decodes the image of a record, crops it by name and perhaps flips it.

    "mae", "probe" and "finetune" are random windows as in those protocols;
    "finetune" goes on with RandAugment and random erasing. "moco" makes two views.

    Attributes:
        name: One of `NAMES`.
        image_size: Side of the square results.
        flip: Whether to mirror half of the images.
        resampling: See `resizing.resized_window`.
        min_scale: Smallest share of the area of a random window; 0 for the usual.
        magnitude: Of `augment.rand_augment` in "finetune"; 0 leaves it out.
        erasing: Probability of `augment.random_erasing` in "finetune".
    """

    name: str
    image_size: int
    flip: bool = False
    resampling: str = resizing.PILLOW
    min_scale: float = 0.0
    magnitude: float = 9.0
    erasing: float = 0.25

    def random_map(
        self, record: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Returns the record with "image" as uint8 (image_size, image_size, 3).

        With "moco" also "image2", its other view.
        """
        record = dict(record)
        name = record.pop("name", "")
        image = record["image"]
        if isinstance(image, bytes):
            image = images.open_rgb(image, name)
        if self.name == MOCO:
            for view, key in enumerate(("image", SECOND)):
                record[key] = self._view(image, view, rng)
            return record
        image = self._crop(image, rng, name)
        image = flip(image, rng) if self.flip else image
        if self.name == "finetune":
            image = self._strengthened(image, rng)
        record["image"] = np.ascontiguousarray(image)
        return record

    def _crop(self, image: Picture, rng: np.random.Generator, name: str) -> np.ndarray:
        size = self.image_size
        if self.name == "center_crop":
            return center_crop(image, size, resampling=self.resampling)
        if self.name == "resize_random_crop":
            return resize_random_crop(image, size, rng, resampling=self.resampling)
        if self.name in MIN_SCALES:
            scale = (self.min_scale or MIN_SCALES[self.name], 1.0)
            return random_resized_crop(
                image, size, rng, scale=scale, resampling=self.resampling
            )
        image = np.asarray(image)
        if image.shape != (size, size, 3):
            raise ValueError(
                f"{name or 'An image'} has shape {image.shape}, but the transform "
                f"'none' needs ({size}, {size}, 3). Use center_crop, or prepare the "
                f"data with `rae-jax prepare --size {size} --transform center_crop`."
            )
        return image

    def _view(self, image: Picture, view: int, rng: np.random.Generator) -> np.ndarray:
        picture = _picture(self._crop(image, rng, ""))
        result = np.asarray(augment.byol_view(picture, view, rng))
        return np.ascontiguousarray(flip(result, rng) if self.flip else result)

    def _strengthened(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.magnitude:
            picture = Image.fromarray(np.ascontiguousarray(image))
            image = np.asarray(augment.rand_augment(picture, rng, self.magnitude))
        return augment.random_erasing(image, rng, self.erasing)


def make_transform(
    name: str,
    image_size: int,
    flip: bool = False,
    resampling: str = resizing.PILLOW,
    **strengths: float,
) -> Transform:
    """Returns the transform of records by name.

    Args:
        name: One of `NAMES`. "none" takes images that already have the size.
        image_size: Side of the square results.
        flip: Whether to mirror half of the images.
        resampling: How to resize, see `resizing.resized_window`.
        **strengths: `min_scale`, `magnitude` and `erasing` of a `Transform`.

    Raises:
        ValueError: A name, size or strength cannot be.
        ModuleNotFoundError: A package for the resampling is missing.
    """
    resizing.check_resampling(resampling)
    if name not in NAMES:
        raise ValueError(f"Unknown transform {name!r}; choose from {list(NAMES)}.")
    if image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}.")
    made = Transform(name, image_size, flip, resampling, **strengths)
    limits = dict(min_scale=1.0, magnitude=augment.MAX_MAGNITUDE, erasing=1.0)
    for key, limit in limits.items():
        if not 0 <= getattr(made, key) <= limit:
            raise ValueError(
                f"{key} must be within 0 and {limit:g}, got {getattr(made, key)}."
            )
    return made
