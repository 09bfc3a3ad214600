"""Ten photographs that come with scikit-image and scikit-learn, cut into crops."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rae_jax.data import images

SPLITS = ("train", "validation")

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photograph and the corner of it that is kept for validation.

    Attributes:
        name: Class name.
        package: The package whose folder holds the file.
        file: Path inside the package.
        held_out: Left, top, right, bottom as shares of width and height.
    """

    name: str
    package: str
    file: str
    held_out: tuple[float, float, float, float]


# About a quarter of each photograph is held out: a corner with real content but
# without the subject, so that training crops show what the photograph is of.
PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png", (0.6, 0.4, 1.0, 1.0)),
    Photo("cat", "skimage", "data/chelsea.png", (0.0, 0.4, 0.4, 1.0)),
    Photo("china", "sklearn", "datasets/images/china.jpg", (0.6, 0.4, 1.0, 1.0)),
    Photo("coffee", "skimage", "data/coffee.png", (0.0, 0.4, 0.4, 1.0)),
    Photo("flower", "sklearn", "datasets/images/flower.jpg", (0.55, 0.45, 1.0, 1.0)),
    Photo("galaxies", "skimage", "data/hubble_deep_field.jpg", (0.6, 0.4, 1.0, 1.0)),
    Photo("motorcycle", "skimage", "data/motorcycle_left.png", (0.0, 0.0, 0.4, 0.6)),
    Photo("retina", "skimage", "data/retina.jpg", (0.6, 0.4, 1.0, 1.0)),
    Photo("rocket", "skimage", "data/rocket.jpg", (0.66, 0.3, 1.0, 1.0)),
    Photo("tissue", "skimage", "data/ihc.png", (0.0, 0.4, 0.4, 1.0)),
)


class Photos:
    """A fixed list of square windows of the photographs; the class is the photograph.

    Validation windows lie inside the held-out corner of each photograph and training
    windows do not touch it, so no pixel is in both splits. Record i shows photograph
    i % 10, so any run of records has all classes.
    """

    class_names = tuple(photo.name for photo in PHOTOS)
    num_classes = len(PHOTOS)

    def __init__(self, split: str = "train", crops_per_photo: int = 128, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose from {list(SPLITS)}.")
        if crops_per_photo < 1:
            raise ValueError(
                f"crops_per_photo must be positive, got {crops_per_photo}."
            )
        self._paths = [locate(photo) for photo in PHOTOS]
        self._windows = [
            _draw_windows(path, photo, split, crops_per_photo, [seed, k])
            for k, (path, photo) in enumerate(zip(self._paths, PHOTOS, strict=True))
        ]

    def __len__(self) -> int:
        return sum(len(windows) for windows in self._windows)

    def window(self, index: int) -> tuple[int, Box]:
        """Returns the photograph's number and the window of one record."""
        crop, photo = divmod(index, len(PHOTOS))
        return photo, self._windows[photo][crop]

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo, (left, top, right, bottom) = self.window(index)
        pixels = _load(self._paths[photo])[top:bottom, left:right]
        return {
            "image": pixels,
            "label": photo,
            "name": f"{PHOTOS[photo].name} {index}",
        }


def locate(photo: Photo) -> Path:
    """Returns the file of a photograph without importing the package that has it.

    Raises:
        ModuleNotFoundError: The package or the file is missing; says what to install.
    """
    spec = importlib.util.find_spec(photo.package)
    path = Path(spec.origin).parent / photo.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            f"The photographs come with scikit-image and scikit-learn, but "
            f"{photo.package} has no {photo.file} here. "
            'Install them with: pip install "rae_jax[demo]"'
        )
    return path


def held_out_box(photo: Photo, width: int, height: int) -> Box:
    """Returns the validation corner in pixels of a photograph of that size."""
    left, top, right, bottom = photo.held_out
    return (
        round(left * width),
        round(top * height),
        round(right * width),
        round(bottom * height),
    )


@functools.lru_cache(maxsize=len(PHOTOS))
def _load(path: Path) -> np.ndarray:
    pixels = images.decode(path)
    pixels.flags.writeable = False
    return pixels


def _draw_windows(
    path: Path, photo: Photo, split: str, count: int, seed: list[int]
) -> list[Box]:
    with Image.open(path) as image:
        width, height = image.size
    box = held_out_box(photo, width, height)
    bands = [box] if split == "validation" else _bands_around(box, width, height)
    # Corners are smaller than what is around them: larger shares keep scales alike.
    smallest = 0.6 if split == "validation" else 0.85
    rng = np.random.default_rng([*seed, SPLITS.index(split)])
    return [_draw_window(bands, smallest, rng) for _ in range(count)]


def _bands_around(box: Box, width: int, height: int) -> list[Box]:
    """Returns the four rectangles left, above, right and below of a box."""
    left, top, right, bottom = box
    return [
        (0, 0, left, height),
        (0, 0, width, top),
        (right, 0, width, height),
        (0, bottom, width, height),
    ]


def _draw_window(bands: list[Box], smallest: float, rng: np.random.Generator) -> Box:
    """Draws a square in a band, its side relative to the largest that fits."""
    sizes = np.array(
        [(right - left, bottom - top) for left, top, right, bottom in bands]
    )
    largest = sizes.min(axis=1).max()
    side = int(rng.integers(round(smallest * largest), largest + 1))
    # Bands count by their number of positions; those that are too thin have none.
    positions = np.maximum(sizes - side + 1, 0).prod(axis=1)
    band = rng.choice(len(bands), p=positions / positions.sum())
    left = bands[band][0] + int(rng.integers(sizes[band, 0] - side + 1))
    top = bands[band][1] + int(rng.integers(sizes[band, 1] - side + 1))
    return left, top, left + side, top + side
