"""What noise in a tokenizer's space looks like, and which patterns make that space."""

from typing import Any

import jax
import jax.numpy as jnp


def side_by_side(
    tokenizer: Any, images: jax.Array, sigma: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds noise to pixels and, of the same energy, to latents.

    Args:
        tokenizer: One of `models.tokenizers`.
        images: Images (b, h, w, 3) in [0, 1].
        sigma: Deviation of the noise in units of the scaled latents.
        key: Randomness of both.

    Returns:
        Images with noise on their pixels, and with noise on their latents, both
        (b, h, w, 3) and not clipped.
    """
    latent_key, pixel_key = jax.random.split(key)
    z = tokenizer.encode(2 * images - 1)
    eps = jax.random.normal(latent_key, z.shape)
    clean, noisy = tokenizer.decode(z), tokenizer.decode(z + sigma * eps)
    deviation = jnp.sqrt(jnp.mean((noisy - clean) ** 2)) / 2  # Pixels are in [0, 1].
    on_pixels = images + deviation * jax.random.normal(pixel_key, images.shape)
    return on_pixels, (noisy + 1) / 2


def patterns(tokenizer: Any, count: int) -> jax.Array:
    """Returns the patches that the first latent dimensions stand for.

    Args:
        tokenizer: One that maps each patch by itself, linearly.
        count: At most this many.

    Returns:
        Patches (k, p, p, 3) in [0, 1]: grey is nothing, and the strongest value of each
        patch is 0 or 1.
    """
    units = jnp.eye(tokenizer.latent_dim)[:count, None, :]
    found = tokenizer.decode(units) - tokenizer.decode(jnp.zeros_like(units))
    largest = jnp.max(jnp.abs(found), axis=(1, 2, 3), keepdims=True)
    return 0.5 + 0.5 * found / jnp.maximum(largest, 1e-12)
