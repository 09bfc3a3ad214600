"""Tokenizers of l-DAE: the latent space in which its noise is added.

All of them map images (b, h, w, 3) in [-1, 1] to tokens (b, n, latent_dim) and back.
Patch PCA and pixels are here; `learned_tokenizers` has those that are trained.
"""

import math
from pathlib import Path
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import blas

from rae_jax import config, copies, storage
from rae_jax.layers import patches

LINEAR = ("pca", "pixels")  # Those with `components`, orthonormal and complete.
PATCHWISE = (*LINEAR, "patch_ae", "patch_vae")
CONVOLUTIONAL = ("conv_vae", "sd_vae")
NAMES = (*PATCHWISE, *CONVOLUTIONAL)
NORMS = ("global", "per_channel", "none")
_MIN_VARIANCE = 1e-12  # Of a direction that is never used.
_HALF_RANGE = 127.5  # Of uint8 pixels, which become [-1, 1].
_CENTER = np.float32(128)  # Subtracted from them, to keep sums small.
_EXACT_ROWS = 1024


class Tokenizer(Protocol):
    """What l-DAE asks of a tokenizer, a pytree that its step takes as an argument.

    Attributes:
        scale: What latents are divided by, (latent_dim,).
        latent_dim: Values of a token.
        patch_size: Pixels per token and side.
    """

    scale: jax.Array
    latent_dim: int
    patch_size: int

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps images to means and variances of latents, each (b, n, latent_dim).

        They are not divided by `scale`; variances are 0 where nothing is random.
        """

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps images (b, h, w, 3) in [-1, 1] to latents (b, n, latent_dim).

        Args:
            images: Sides are multiples of `patch_size`.
            key: Draws latents that are random given the image; None for their means.
        """

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to images (b, h, w, 3), not clipped."""


def draw(
    moments: tuple[jax.Array, jax.Array], scale: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Returns latents of these moments, scaled: their means without a key."""
    z, variance = moments
    if key is not None:
        z = z + jnp.sqrt(variance) * jax.random.normal(key, z.shape)
    return z / row(scale)


def row(values: jax.Array) -> jax.Array:
    """Shapes (d,) as (1, 1, d)."""
    return values[None, None, :]


@flax.struct.dataclass
class PatchPCA:
    """Principal components of image patches, arXiv:2401.14404 section 4.2.

    Pixels as latents are the special case of the identity as basis and no mean.

    Attributes:
        mean: Mean patch (p,), p = patch_size^2 * 3, of pixels in [-1, 1].
        basis: All components (p, p), one per row, by falling variance.
        scale: What latents are divided by, (latent_dim,).
        latent_dim: Number of components that make the latent.
        patch_size: Pixels per patch and side.
    """

    mean: jax.Array
    basis: jax.Array
    scale: jax.Array
    latent_dim: int = flax.struct.field(pytree_node=False)
    patch_size: int = flax.struct.field(pytree_node=False)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Tokenizer`; variances are 0."""
        z = self._project(patches.patchify(images, self.patch_size))
        return z, jnp.zeros_like(z)

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps images (b, h, w, 3) to latents (b, n, latent_dim); nothing is drawn."""
        del key
        return self.encode_patches(patches.patchify(images, self.patch_size))

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to images (b, h, w, 3)."""
        return patches.unpatchify(self.decode_patches(z), self.patch_size)

    def encode_patches(self, x: jax.Array) -> jax.Array:
        """Maps patches (b, n, p) to latents (b, n, latent_dim)."""
        return self._project(x) / row(self.scale)

    def decode_patches(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to patches (b, n, p)."""
        x = _product(z * row(self.scale), self.basis[: self.latent_dim])
        return x + row(self.mean)

    def components(self, residual: jax.Array) -> jax.Array:
        """Expresses differences of patches (b, n, p) in the full basis."""
        return _product(residual, self.basis.T)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel (p, latent_dim) and bias of the map of patches to latents."""
        kernel = self.basis[: self.latent_dim].T / self.scale[None, :]
        return kernel, -self.mean @ kernel

    def inverse_affine(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel (latent_dim, p) and bias of the map of latents to patches."""
        return self.scale[:, None] * self.basis[: self.latent_dim], self.mean

    def _project(self, x: jax.Array) -> jax.Array:
        return _product(x - row(self.mean), self.basis[: self.latent_dim].T)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies in float32 also where the default is less, as on a TPU.

    Components of low variance are differences of values much larger than themselves.
    """
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


class PatchMoments:
    """Streaming mean and covariance of patches.

    Of pixels as they are in files, uint8, both sums are exact: they are of integers,
    so neither the order nor the size of the parts changes a bit of them. Floats are
    summed up in float64.
    """

    def __init__(self, dim: int):
        self.count = 0
        self._sum = np.zeros(dim)
        self._products = np.zeros((dim, dim))  # Its upper triangle.

    def add(self, patches: np.ndarray) -> None:
        """Adds patches (n, p), uint8, or float in [-1, 1]."""
        self.count += len(patches)
        if patches.dtype != np.uint8:
            values = _HALF_RANGE * patches.astype(np.float64) + (_HALF_RANGE - _CENTER)
            self._sum += values.sum(axis=0)
            self._products += values.T @ values
            return
        for start in range(0, len(patches), _EXACT_ROWS):
            values = patches[start : start + _EXACT_ROWS].astype(np.float32) - _CENTER
            self._sum += values.sum(axis=0)
            # Half of a product, at the speed of float32: each entry is a sum of at
            # most 2^10 integers up to 2^14, and float32 holds those up to 2^24.
            self._products += blas.ssyrk(1.0, values.T)

    def components(self) -> dict[str, np.ndarray]:
        """Returns mean, basis and variances, with fixed signs, by falling variance.

        Raises:
            ValueError: If fewer patches than dimensions were added.
        """
        dim = len(self._sum)
        if self.count <= dim:
            raise ValueError(
                f"{self.count} patches cannot determine {dim} components; "
                "raise tokenizer.num_images."
            )
        mean = self._sum / self.count
        products = np.triu(self._products) + np.triu(self._products, 1).T
        covariance = products / self.count - np.outer(mean, mean)
        covariance /= _HALF_RANGE**2
        variances, vectors = np.linalg.eigh(covariance)
        basis = vectors[:, ::-1].T
        # An eigenvector's sign is arbitrary; make its largest entry positive.
        largest = basis[np.arange(dim), np.abs(basis).argmax(axis=1)]
        basis = basis * np.sign(largest)[:, None]
        return {
            "mean": (mean + _CENTER) / _HALF_RANGE - 1.0,
            "basis": basis,
            "variances": np.maximum(variances[::-1], 0.0),
        }


def latent_scale(norm: str, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Returns what latents are divided by, (d,).

    Args:
        norm: "global" divides by one scalar so that all entries jointly have standard
            deviation 1, "per_channel" each by its own, "none" by 1.
        mean: Means of the latents (d,).
        variance: Their variances (d,).

    Raises:
        ValueError: For an unknown norm, or latents that are all the same.
    """
    if norm not in NORMS:
        raise ValueError(config.suggest(norm, NORMS, "latent norm"))
    if norm == "none":
        return np.ones(len(variance))
    if norm == "per_channel":
        return np.sqrt(np.maximum(variance, _MIN_VARIANCE))
    joint = np.mean(variance + (mean - np.mean(mean)) ** 2)
    if joint < _MIN_VARIANCE:
        raise ValueError("All latents are the same, so they have no scale.")
    return np.full(len(variance), np.sqrt(joint))


def make_pca(
    components: dict[str, np.ndarray], latent_dim: int, norm: str = "global"
) -> PatchPCA:
    """Builds the tokenizer from fitted components.

    Args:
        components: As from `PatchMoments.components` or `load_components`.
        latent_dim: Number of components to keep.
        norm: See `latent_scale`; "per_channel" whitens.

    Raises:
        ValueError: For an unknown norm or more latent dimensions than pixels.
    """
    dim = len(components["mean"])
    check_latent_dim(latent_dim, dim)
    kept = components["variances"][:latent_dim]
    scale = latent_scale(norm, np.zeros(latent_dim), kept)
    return _with_basis(components["mean"], components["basis"], scale)


def make_pixels(patch_size: int, scale: np.ndarray | None = None) -> PatchPCA:
    """Returns the tokenizer whose latents are pixels, divided by a scale (p,)."""
    dim = 3 * patch_size**2
    scale = np.ones(dim) if scale is None else scale
    return _with_basis(np.zeros(dim), np.eye(dim), scale)


def check_latent_dim(latent_dim: int, patch_dim: int) -> None:
    """Raises a ValueError unless a patch has as many dimensions."""
    if not 1 <= latent_dim <= patch_dim:
        raise ValueError(
            f"tokenizer.latent_dim = {latent_dim} is not within 1 and the {patch_dim} "
            "values of a patch; lower it, or raise tokenizer.patch_size."
        )


def _with_basis(mean: np.ndarray, basis: np.ndarray, scale: np.ndarray) -> PatchPCA:
    size = math.isqrt(len(mean) // 3)
    arrays = (jnp.asarray(a, jnp.float32) for a in (mean, basis, scale))
    return PatchPCA(*arrays, latent_dim=len(scale), patch_size=size)


def save_components(path: Path, components: dict[str, np.ndarray]) -> None:
    """Writes fitted components as .npz, atomically."""
    with storage.writing(path) as file:
        np.savez(file, **components)


def load_components(path: Path) -> dict[str, np.ndarray]:
    """Reads what `save_components` wrote."""
    with np.load(copies.local(path)) as data:
        return {name: data[name] for name in ("mean", "basis", "variances")}
