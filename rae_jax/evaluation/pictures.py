"""Images side by side in one PNG, and maps of their errors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rae_jax import storage
from rae_jax.training import distributed

GAP = 2
ZOOM = 2
ERROR_LIMIT = 0.25


def save_rows(path: Path, rows: Sequence[np.ndarray], *, zoom: int = ZOOM) -> None:
    """Writes one row of pictures per array, atomically.

    Args:
        path: PNG file.
        rows: Arrays (b, h, w, 3), uint8 or float in [0, 1] (clipped).
        zoom: Size of a pixel in the file.
    """
    strips = [_strip(to_pixels(row)) for row in rows]
    if not distributed.is_main():
        return
    width = max(strip.shape[1] for strip in strips)
    gap = np.full((GAP, width, 3), 255, np.uint8)
    parts = [gap]
    for strip in strips:
        pad = ((0, 0), (0, width - strip.shape[1]), (0, 0))
        parts += [np.pad(strip, pad, constant_values=255), gap]
    pixels = np.concatenate(parts)
    image = Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))
    with storage.writing(path) as file:
        image.save(file, format="PNG", optimize=True)


def save_grid(
    path: Path, images: np.ndarray, columns: int, *, zoom: int = ZOOM
) -> None:
    """Writes pictures (b, h, w, 3) row by row."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    save_rows(path, rows, zoom=zoom)


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Maps floats in [0, 1] to uint8 by rounding, for eyes; uint8 stays."""
    images = distributed.to_host(images)
    if images.dtype == np.uint8:
        return images
    return np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def error_map(
    images: np.ndarray, recon: np.ndarray, *, limit: float = ERROR_LIMIT
) -> np.ndarray:
    """Returns the error of every pixel as colours, uint8 (b, h, w, 3).

    The scale is the same for all images, so maps can be compared: black is no error,
    the lightest yellow an error of `limit` or more.

    Args:
        images: Originals (b, h, w, 3), uint8 or float in [0, 1].
        recon: Reconstructions of the same shape, likewise.
        limit: Absolute error, averaged over the colours, at the end of the scale.

    Raises:
        ValueError: Shapes differ.
    """
    import matplotlib

    if images.shape != recon.shape:
        raise ValueError(f"Shapes differ: {images.shape} and {recon.shape}.")
    a, b = (to_pixels(x).astype(np.float32) / 255.0 for x in (images, recon))
    error = np.abs(a - b).mean(axis=-1) / limit
    colours = matplotlib.colormaps["inferno"](np.clip(error, 0.0, 1.0))
    return to_pixels(colours[..., :3])


def _strip(images: np.ndarray) -> np.ndarray:
    gap = np.full((images.shape[1], GAP, 3), 255, np.uint8)
    parts = [gap]
    for image in images:
        parts += [image, gap]
    return np.concatenate(parts, axis=1)
