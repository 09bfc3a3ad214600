"""Alignment of a network's tokens with an encoder's features (REPA)."""

import jax
import jax.numpy as jnp

MIN_NORM = 1e-6


def alignment_loss(projected: jax.Array, features: jax.Array) -> jax.Array:
    """Returns minus the mean cosine of projected tokens and features, both (b, n, d).

    arXiv:2410.06940, equation 8 without its weight. No gradient flows to the features.

    Raises:
        ValueError: If the shapes differ.
    """
    if projected.shape != features.shape:
        raise ValueError(
            f"The projected tokens are {projected.shape}, the features to align them "
            f"with {features.shape}: choose an encoder with as many tokens per image."
        )
    features = jax.lax.stop_gradient(features)
    return -jnp.mean(jnp.sum(_unit(projected) * _unit(features), axis=-1))


def _unit(x: jax.Array) -> jax.Array:
    # The bound is inside the root, where the gradient of a zero token stays finite.
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, MIN_NORM**2))
