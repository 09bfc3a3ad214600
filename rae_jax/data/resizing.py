"""Windows of resized pictures, without computing what lies outside of them."""

import functools
import importlib
import math
import threading
from types import ModuleType

import numpy as np
from PIL import Image

PILLOW, SIMD = "pillow", "simd"
RESAMPLINGS = (PILLOW, SIMD)

_of_thread = threading.local()

Window = tuple[int, int, int, int]  # left, top, width, height


def check_resampling(name: str) -> None:
    """Raises an error if there is no such way to resize here.

    Raises:
        ValueError: The name is unknown.
        ModuleNotFoundError: The package is missing; says how to install it.
    """
    if name not in RESAMPLINGS:
        raise ValueError(f"Unknown resampling {name!r}; choose from {RESAMPLINGS}.")
    if name == SIMD:
        _package()


def resized_window(
    picture: Image.Image,
    size: tuple[int, int],
    window: Window,
    resampling: str = PILLOW,
) -> np.ndarray:
    """Returns a window of a picture resized to a size (bicubic, antialiased).

    Args:
        picture: In mode "RGB".
        size: Width and height of the whole.
        window: Which part of it, in its pixels.
        resampling: "pillow" is bit for bit `picture.resize(size)`, cropped. "simd" is
            the same filter at a quarter of the time with coefficients of 16 bits, so
            that levels differ by one here and there, at sharp edges by some more.

    Returns:
        Pixels uint8 (height, width, 3) of the window.
    """
    resize = _with_simd if resampling == SIMD else _with_pillow
    return np.array(resize(picture, size, window))


def _with_pillow(
    picture: Image.Image, size: tuple[int, int], window: Window
) -> Image.Image:
    """Leaves out rows in the first pass and columns in the second.

    Pillow filters along rows, rounds to 8 bits, then filters along columns. (Its own
    `box` would leave out more, but is held in single precision: one level of 10,000
    is then off by one.)
    """
    left, top, width, height = window
    shrinks = picture.width - size[0], picture.height - size[1]
    if (width, height) == size or shrinks[1] > max(2 * shrinks[0], 0):
        # Nothing to leave out, or so tall that newer versions turn the passes round.
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        return picture.crop((left, top, left + width, top + height))
    first, last = _rows_read(picture.height, size[1], top, top + height)
    rows = picture.crop((0, first, picture.width, last))
    rows = rows.resize((size[0], last - first), Image.Resampling.BICUBIC)
    columns = rows.crop((left, 0, left + width, last - first))
    if last - first < picture.height:
        whole = Image.new("RGB", (width, picture.height))
        whole.paste(columns, (0, first))
        columns = whole
    columns = columns.resize((width, size[1]), Image.Resampling.BICUBIC)
    return columns.crop((0, top, width, top + height))


def _rows_read(length: int, new: int, start: int, stop: int) -> tuple[int, int]:
    """Returns the range of rows, of `length`, that rows [start, stop) of `new` need."""
    scale = length / new
    reach = 2 * max(scale, 1.0) + 1  # A bicubic filter's support, and one for safety.
    first = math.floor((start + 0.5) * scale - reach)
    last = math.ceil((stop - 0.5) * scale + reach)
    return max(first, 0), min(last, length)


def _with_simd(
    picture: Image.Image, size: tuple[int, int], window: Window
) -> Image.Image:
    package = _package()
    left, top, width, height = window
    x, y = picture.width / size[0], picture.height / size[1]
    options = package.ResizeOptions(
        package.ResizeAlg.convolution(package.FilterType.catmull_rom),
        crop_box=package.CropBox(left * x, top * y, width * x, height * y),
    )
    result = Image.new("RGB", (width, height))
    if not hasattr(_of_thread, "resizer"):
        _of_thread.resizer = package.Resizer()  # It must not be shared by threads.
    _of_thread.resizer.resize_pil(picture, result, options)
    return result


@functools.cache
def _package() -> ModuleType:
    try:
        return importlib.import_module("cykooz_resizer")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'data.resampling = "simd" needs the package cykooz.resizer: pip install '
            '"rae_jax[fast]", or set data.resampling to "pillow".'
        ) from None
