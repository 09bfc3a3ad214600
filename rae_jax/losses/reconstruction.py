"""Losses of an autoencoder's reconstructions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def absolute_error(images: jax.Array, recon: jax.Array) -> jax.Array:
    """Mean absolute error in float32.

    Args:
        images: Targets (b, h, w, 3) in [0, 1].
        recon: Reconstructions of the same shape, not clipped.

    Raises:
        ValueError: If the shapes differ.
    """
    if images.shape != recon.shape:
        raise ValueError(f"Shapes differ: images {images.shape}, recon {recon.shape}.")
    images, recon = images.astype(jnp.float32), recon.astype(jnp.float32)
    return jnp.mean(jnp.abs(recon - images))


def reconstruction_loss(
    images: jax.Array,
    recon: jax.Array,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None,
    perceptual_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean absolute error plus weighted LPIPS, RAE's decoder loss without its critic.

    Args:
        images: Targets (b, h, w, 3) in [0, 1].
        recon: Reconstructions of the same shape, not clipped.
        perceptual: Distances of two batches, (b,); None leaves the term out.
        perceptual_weight: Weight of the mean distance (1 in RAE, arXiv:2510.11690).

    Returns:
        The scalar loss and its parts, unweighted; `loss_lpips` is 0 without
        `perceptual`.
    """
    loss_rec = absolute_error(images, recon)
    images, recon = images.astype(jnp.float32), recon.astype(jnp.float32)
    loss_lpips = jnp.zeros((), jnp.float32)
    if perceptual is not None:
        loss_lpips = jnp.mean(perceptual(images, recon))
    loss = loss_rec + perceptual_weight * loss_lpips
    return loss, {"loss_rec": loss_rec, "loss_lpips": loss_lpips, "loss": loss}
