"""PSNR and SSIM of reconstructions, per image, and their running means."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

_RADIUS = 5  # A window of 11 taps.
_SIGMA = 1.5


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [0, 1] as uint8: clipped, times 255, truncated (not rounded).

    The official RAE code saves its images so; rounding gives other scores. What is
    uint8 already is returned as it is.
    """
    if images.dtype == jnp.uint8:
        return images
    return (jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images (b, h, w, c) in [0, 1], (b,).

    Equal images give 100: the mean squared error counts as 1e-10 at least.
    """
    _check_pair(a, b)
    error = jnp.mean((a - b) ** 2, axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of images (b, h, w, c) in [0, 1], (b,).

    Wang et al. 2004: Gaussian window of 11 taps and sigma 1.5, k1 = 0.01, k2 = 0.03,
    averaged over channels and all pixels; the image is mirrored beyond its border, as
    in torchmetrics. Implementations that leave the border out give other values.

    Raises:
        ValueError: Shapes differ, or a side is too short to mirror.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) <= _RADIUS:
        raise ValueError(f"SSIM needs sides over {_RADIUS} pixels, not {a.shape}.")
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = jnp.maximum(_window_mean(a * a) - mean_a**2, 0.0)
    var_b = jnp.maximum(_window_mean(b * b) - mean_b**2, 0.0)
    cov = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def image_scores(images: jax.Array, recon: jax.Array) -> dict[str, jax.Array]:
    """Scores (b,) of reconstructions as the official evaluation computes them.

    Both sides are compared as 8-bit images.

    Args:
        images: Originals (b, h, w, 3), uint8, or float in [0, 1].
        recon: Reconstructions of the same shape, likewise; floats are clipped.
    """
    a, b = _quantised(images), _quantised(recon)
    return {"psnr": psnr(a, b), "ssim": ssim(a, b)}


@dataclasses.dataclass(frozen=True)
class ReconstructionScores:
    """Running means of per-image scores; they do not depend on the batch size."""

    count: int = 0
    sums: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def add(
        self, scores: Mapping[str, np.ndarray], mask: np.ndarray | None = None
    ) -> "ReconstructionScores":
        """Returns the means that also count a batch of scores.

        Args:
            scores: Values (b,) by name, the same names in every batch.
            mask: Rows to count (b,), nonzero for images and zero for padding.

        Raises:
            ValueError: The names changed, lengths differ or a value is not finite.
        """
        if self.count and set(scores) != set(self.sums):
            raise ValueError(f"Scores {sorted(scores)} are not {sorted(self.sums)}.")
        size = len(next(iter(scores.values())))
        keep = np.ones(size, bool) if mask is None else np.asarray(mask) != 0
        sums = dict(self.sums)
        for name, values in scores.items():
            values = np.asarray(values, np.float64)
            if values.shape != keep.shape:
                raise ValueError(
                    f"Score {name!r} has shape {values.shape}, the mask {keep.shape}."
                )
            if not np.isfinite(values[keep]).all():
                raise ValueError(f"Score {name!r} is not finite.")
            sums[name] = sums.get(name, 0.0) + float(values[keep].sum())
        return ReconstructionScores(self.count + int(keep.sum()), sums)

    def means(self) -> dict[str, float]:
        """Returns the mean of each score.

        Raises:
            ValueError: No image was counted.
        """
        if not self.count:
            raise ValueError("No image was counted.")
        return {name: total / self.count for name, total in self.sums.items()}


def _check_pair(a: jax.Array, b: jax.Array) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"Expected two (b, h, w, c), got {a.shape} and {b.shape}.")


def _quantised(images: jax.Array) -> jax.Array:
    if images.dtype != jnp.uint8:
        images = to_uint8(images)
    return images.astype(jnp.float32) / 255.0


def _window_mean(x: jax.Array) -> jax.Array:
    """Gaussian means around every pixel of (b, h, w, c), which is mirrored outside.

    Two products with banded matrices: faster on CPUs than one-channel convolutions.
    """
    _, h, w, _ = x.shape
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", _window_matrix(h), x, precision=highest)
    return jnp.einsum("jw,bhwc->bhjc", _window_matrix(w), x, precision=highest)


@functools.lru_cache(maxsize=32)
def _window_matrix(size: int) -> np.ndarray:
    """Operator (size, size) float32 of the window along one side."""
    weights = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * _SIGMA**2))
    sources = np.pad(np.arange(size), _RADIUS, mode="reflect")
    matrix = np.zeros((size, size))
    for tap, weight in enumerate(weights / weights.sum()):
        np.add.at(matrix, (np.arange(size), sources[tap : tap + size]), weight)
    return matrix.astype(np.float32)
