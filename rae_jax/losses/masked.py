"""The loss of masked autoencoders (arXiv:2111.06377 section 3)."""

import jax
import jax.numpy as jnp

EPS = 1e-6


def targets(
    patches: jax.Array, *, norm_pixels: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what patches are predicted as, with the mean and the deviation taken out.

    Args:
        patches: (b, n, p).
        norm_pixels: Whether each patch is normalised by its own mean and unbiased
            deviation; else by 0 and 1.

    Returns:
        Targets (b, n, p), means (b, n, 1) and deviations (b, n, 1).
    """
    if not norm_pixels:
        mean = jnp.zeros((*patches.shape[:2], 1))
        return patches, mean, mean + 1
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    std = jnp.sqrt(jnp.var(patches, axis=-1, keepdims=True, ddof=1) + EPS)
    return (patches - mean) / std, mean, std


def masked_loss(
    predicted: jax.Array, target: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of the patches that were not seen.

    Args:
        predicted: (b, n, p).
        target: (b, n, p).
        mask: (b, n), 1 where a patch was not seen and 0 elsewhere.

    Returns:
        The loss, and its share per image (b,).
    """
    error = jnp.mean((predicted - target) ** 2, axis=-1) * mask
    return jnp.sum(error) / jnp.sum(mask), jnp.sum(error, 1) / jnp.sum(mask, 1)
