"""Separable image resizing, exact to PyTorch's definitions (align_corners=False).

Each direction is one product with a small matrix, built in float64.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np


def _keys_cubic(u: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter `a`."""
    u = np.abs(u)
    near = (a + 2) * u**3 - (a + 3) * u**2 + 1
    far = a * u**3 - 5 * a * u**2 + 8 * a * u - 4 * a
    return np.where(u <= 1, near, np.where(u < 2, far, 0.0))


@lru_cache(maxsize=32)
def bicubic_matrix(n: int, m: int) -> np.ndarray:
    """Operator (m, n) float64: bicubic without antialiasing, a = -0.75.

    Taps beyond the border fall on the border entry.
    """
    centers = (np.arange(m) + 0.5) * (n / m) - 0.5
    matrix = np.zeros((m, n))
    for offset in range(-1, 3):
        taps = np.floor(centers) + offset
        weights = _keys_cubic(centers - taps, -0.75)
        indices = np.clip(taps, 0, n - 1).astype(int)
        np.add.at(matrix, (np.arange(m), indices), weights)
    return matrix


@lru_cache(maxsize=32)
def bicubic_antialias_matrix(n: int, m: int) -> np.ndarray:
    """Operator (m, n) float64: bicubic with antialiasing, a = -0.5.

    Weights are normalised over the taps inside the border.
    """
    scale = n / m
    width = max(scale, 1.0)
    centers = ((np.arange(m) + 0.5) * scale)[:, None]
    first = np.maximum(np.trunc(centers - 2 * width + 0.5), 0)
    last = np.minimum(np.trunc(centers + 2 * width + 0.5), n)
    taps = np.arange(n)[None, :]
    weights = _keys_cubic((taps - centers + 0.5) / width, -0.5)
    weights = np.where((taps >= first) & (taps < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


@lru_cache(maxsize=32)
def bilinear_matrix(n: int, m: int) -> np.ndarray:
    """Operator (m, n) float64: bilinear without antialiasing."""
    centers = np.maximum((np.arange(m) + 0.5) * (n / m) - 0.5, 0)
    low = np.floor(centers).astype(int)
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m), low), 1 - (centers - low))
    np.add.at(matrix, (np.arange(m), np.minimum(low + 1, n - 1)), centers - low)
    return matrix


def resize_bicubic(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes (b, h, w, c) to (b, height, width, c) float32 with `bicubic_matrix`.

    This is what the official code of RAE does to images, and what MAE and SigLIP2
    do to their position tables. Results can leave the range of the input.
    """
    return _resize(images, height, width, bicubic_matrix)


def resize_bicubic_antialias(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes (b, h, w, c) to (b, height, width, c) float32, antialiased.

    DINOv2 resamples its position table like this.
    """
    return _resize(images, height, width, bicubic_antialias_matrix)


def resize_bilinear(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes (b, h, w, c) to (b, height, width, c) float32 with `bilinear_matrix`."""
    return _resize(images, height, width, bilinear_matrix)


def _resize(images, height, width, make_matrix):
    images = images.astype(jnp.float32)
    _, h, w, _ = images.shape
    # An accelerator's default precision would round pixels to eight bits.
    highest = jax.lax.Precision.HIGHEST
    if h != height:
        rows = jnp.asarray(make_matrix(h, height), jnp.float32)
        images = jnp.einsum("ih,bhwc->biwc", rows, images, precision=highest)
    if w != width:
        columns = jnp.asarray(make_matrix(w, width), jnp.float32)
        images = jnp.einsum("jw,bhwc->bhjc", columns, images, precision=highest)
    return images
