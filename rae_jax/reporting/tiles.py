"""Pictures as data URIs, cut into the images that they are made of."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from rae_jax import config as configs
from rae_jax import copies

_MIN_TILE = 8


def load(path: Path) -> np.ndarray:
    """Reads a picture as uint8 (h, w, 3).

    Raises:
        ConfigError: The file is no picture.
    """
    try:
        with Image.open(copies.local(path)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise configs.ConfigError(
            f"{str(path)!r} is not a readable picture ({error}). Delete it and run "
            "the quickstart again."
        ) from error


def cut(pixels: np.ndarray) -> list[list[np.ndarray]] | None:
    """Cuts a contact sheet of square images with white gaps into rows of images.

    Args:
        pixels: uint8 (h, w, 3); gaps are equally wide, also around the sheet.

    Returns:
        Images by row and column, without the white ones that fill up short rows;
        None if the picture is not such a sheet.
    """
    white = (pixels == 255).all(axis=-1)
    rows, columns = white.all(axis=1), white.all(axis=0)
    gap = min(_leading(rows), _leading(columns))
    sizes = range(_MIN_TILE, min(white.shape) - 2 * gap + 1) if gap else ()
    for size in sizes:
        if _is_period(rows, size, gap) and _is_period(columns, size, gap):
            return _tiles(pixels, size, gap)
    return None


def _leading(line: np.ndarray) -> int:
    return len(line) if line.all() else int(np.argmin(line))


def _is_period(line: np.ndarray, size: int, gap: int) -> bool:
    """Whether white gaps repeat every size + gap pixels, to the very end."""
    if (len(line) - gap) % (size + gap):
        return False
    return bool(line[np.arange(len(line)) % (size + gap) < gap].all())


def _tiles(pixels: np.ndarray, size: int, gap: int) -> list[list[np.ndarray]]:
    tops = range(gap, pixels.shape[0] - gap, size + gap)
    lefts = range(gap, pixels.shape[1] - gap, size + gap)
    rows = [[pixels[y : y + size, x : x + size] for x in lefts] for y in tops]
    for row in rows:
        while row and (row[-1] == 255).all():
            row.pop()
    return rows


def data_uri(pixels: np.ndarray) -> str:
    """Encodes uint8 (h, w, 3) without loss, as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        buffer, "WEBP", lossless=True, method=2
    )
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
