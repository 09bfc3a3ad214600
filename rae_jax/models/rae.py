"""The representation autoencoder: frozen encoder, trained decoder, latent statistics.

arXiv:2510.11690 section 3. Latents are channel-last grids (b, h, w, c).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rae_jax.layers import resize

NOISES = ("uniform", "half_normal")
Stats = dict[str, jax.Array]


def encode(encoder: Any, images: jax.Array) -> jax.Array:
    """Maps images (b, H, W, 3) in [0, 1] of any size to raw latents (b, h, w, c).

    Resizes as the official code does (bicubic without antialiasing), normalises
    and encodes. No gradient flows back.
    """
    size = encoder.input_size
    if images.shape[1:3] != (size, size):
        images = resize.resize_bicubic(images, size, size)
    mean, std = _channels(encoder.image_mean), _channels(encoder.image_std)
    tokens = encoder((images.astype(jnp.float32) - mean) / std)
    b, n, c = tokens.shape
    grid = math.isqrt(n)
    z = tokens.astype(jnp.float32).reshape(b, grid, grid, c)
    return jax.lax.stop_gradient(z)


def decode(decoder: Any, z: jax.Array, encoder: Any) -> jax.Array:
    """Maps raw latents (b, h, w, c) to images (b, H, W, 3), not clipped.

    The decoder works in the pixel space that the encoder normalises to.
    """
    b, h, w, c = z.shape
    images = decoder(z.reshape(b, h * w, c))
    return images * _channels(encoder.image_std) + _channels(encoder.image_mean)


def add_noise(
    z: jax.Array, key: jax.Array, tau: float, distribution: str = "uniform"
) -> jax.Array:
    """Adds sigma eps to raw latents (b, h, w, c), one sigma per sample.

    Args:
        z: Raw latents.
        key: Randomness.
        tau: Strength; 0 returns z.
        distribution: Of sigma: "uniform" is tau U(0, 1), the released code;
            "half_normal" is |N(0, tau^2)|, the paper's text.

    Raises:
        ValueError: For another distribution.
    """
    if distribution not in NOISES:
        raise ValueError(f"Unknown noise {distribution!r}; choose from {NOISES}.")
    if tau == 0:
        return z
    sigma_key, eps_key = jax.random.split(key)
    shape = (z.shape[0], 1, 1, 1)
    if distribution == "uniform":
        sigma = jax.random.uniform(sigma_key, shape)
    else:
        sigma = jnp.abs(jax.random.normal(sigma_key, shape))
    return z + tau * sigma * jax.random.normal(eps_key, z.shape)


def normalize(z: jax.Array, stats: Stats, eps: float = 1e-5) -> jax.Array:
    """Maps raw latents to those that the diffusion model sees."""
    return (z - stats["mean"][None]) / jnp.sqrt(stats["var"][None] + eps)


def denormalize(z: jax.Array, stats: Stats, eps: float = 1e-5) -> jax.Array:
    """Inverts `normalize`."""
    return z * jnp.sqrt(stats["var"][None] + eps) + stats["mean"][None]


def _channels(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[None, None, None, :]


class RAE(nnx.Module):
    """Encoder, decoder and latent statistics as one autoencoder.

    Args:
        encoder: See `models.encoders`.
        decoder: See `models.decoder`.
        latent_shape: Shape (h, w, c) of a latent; statistics start as 0 and 1.
        eps: Added to the variance (1e-5 in the official code).
    """

    def __init__(
        self,
        encoder: nnx.Module,
        decoder: nnx.Module,
        latent_shape: tuple[int, int, int],
        *,
        eps: float = 1e-5,
    ):
        self.encoder, self.decoder, self.eps = encoder, decoder, eps
        self.latent_mean = nnx.Param(jnp.zeros(latent_shape))
        self.latent_var = nnx.Param(jnp.ones(latent_shape))

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps images (b, H, W, 3) in [0, 1] to normalised latents (b, h, w, c)."""
        return normalize(encode(self.encoder, images), self._stats(), self.eps)

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps normalised latents (b, h, w, c) to images (b, H, W, 3), not clipped."""
        z = denormalize(z, self._stats(), self.eps)
        return decode(self.decoder, z, self.encoder)

    def _stats(self) -> Stats:
        return {"mean": self.latent_mean[...], "var": self.latent_var[...]}
