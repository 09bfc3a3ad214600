"""Losses of autoencoders with Gaussian latents, as in latent diffusion.

Errors and divergences are sums over an image and means over the batch
(arXiv:2112.10752), so that the weight of the divergence is that of the papers.
"""

import jax
import jax.numpy as jnp
import numpy as np

ERRORS = ("l1", "l2")


def pixel_error(images: jax.Array, recon: jax.Array, kind: str) -> jax.Array:
    """Returns the mean absolute ("l1") or squared ("l2") error of all values.

    Raises:
        ValueError: The kind is unknown or the shapes differ.
    """
    if kind not in ERRORS:
        raise ValueError(f"Unknown error {kind!r}; choose from {ERRORS}.")
    if images.shape != recon.shape:
        raise ValueError(f"Shapes differ: images {images.shape}, recon {recon.shape}.")
    difference = (recon - images).astype(jnp.float32)
    return jnp.mean(jnp.abs(difference) if kind == "l1" else difference**2)


def kl_divergence(mean: jax.Array, log_variance: jax.Array | None) -> jax.Array:
    """Returns KL(N(mean, variance) | N(0, 1)) in nats, summed over a sample, (b,).

    0 where latents are not random, log_variance None.
    """
    if log_variance is None:
        return jnp.zeros(mean.shape[0])
    terms = mean**2 + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * jnp.sum(terms, axis=tuple(range(1, mean.ndim)))


def draw(mean: jax.Array, log_variance: jax.Array | None, key: jax.Array) -> jax.Array:
    """Draws latents of these moments; their means where they are not random."""
    if log_variance is None:
        return mean
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


def num_values(images: jax.Array) -> int:
    """Returns the values of one image: what makes a sum of a mean."""
    return int(np.prod(images.shape[1:]))
