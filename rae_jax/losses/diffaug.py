"""Differentiable augmentation of what a critic sees (arXiv:2006.10738).

As in RAE's official code: images are (b, h, w, 3) in [-1, 1], where 0 is mid-grey.
Each policy is on or off for the whole batch; its strength is drawn per sample.
"""

import jax
import jax.numpy as jnp

_MAX_SHIFT = 0.125  # Of the image's sides.
NUM_POLICIES = 3  # Translation, colour, cutout.
NUM_STRENGTHS = 7


def augment(
    images: jax.Array, key: jax.Array, *, prob: float = 1.0, cutout: float = 0.0
) -> jax.Array:
    """Returns randomly shifted, recoloured and cut images of the same shape, float32.

    Results are not clipped.

    Args:
        images: (b, h, w, 3) in [-1, 1].
        key: Randomness; draws for reals and fakes should be independent.
        prob: Probability of each policy.
        cutout: Sides of the grey box relative to the image's; 0 for none.
    """
    on_key, strength_key = jax.random.split(key)
    on = jax.random.uniform(on_key, (NUM_POLICIES,))
    strengths = jax.random.uniform(strength_key, (NUM_STRENGTHS, images.shape[0]))
    return augment_with(images, on, strengths, prob=prob, cutout=cutout)


def augment_with(
    images: jax.Array,
    on: jax.Array,
    strengths: jax.Array,
    *,
    prob: float,
    cutout: float,
) -> jax.Array:
    """Augments with given uniform draws; see `augment`.

    Args:
        images: (b, h, w, 3) in [-1, 1].
        on: Draws (3,) in [0, 1); translation, colour and cutout apply where they are
            at most `prob`.
        strengths: Draws (7, b) in [0, 1): row and column shift, brightness,
            saturation, contrast, row and column of the box.
        prob: Probability of each policy.
        cutout: Sides of the box relative to the image's.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"Images must be (b, h, w, 3), not {images.shape}.")
    x = images.astype(jnp.float32)
    applies = on <= prob
    x = jnp.where(applies[0], translated(x, *strengths[:2]), x)
    x = jnp.where(applies[1], recoloured(x, *strengths[2:5]), x)
    if cutout > 0:
        x = jnp.where(applies[2], cut_out(x, *strengths[5:], ratio=cutout), x)
    return x


def translated(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Shifts by up to an eighth of the image, filling with 0, from draws (b,)."""
    _, h, w, c = images.shape
    d_h, d_w = round(_MAX_SHIFT * h), round(_MAX_SHIFT * w)
    padded = jnp.pad(images, ((0, 0), (d_h, d_h), (d_w, d_w), (0, 0)))

    def window(image, row, column):
        return jax.lax.dynamic_slice(image, (row, column, 0), (h, w, c))

    # Position d in the padded image is no shift.
    starts = [_integer(u, 2 * d + 1) for u, d in ((rows, d_h), (columns, d_w))]
    return jax.vmap(window)(padded, *starts)


def recoloured(
    images: jax.Array, brightness: jax.Array, saturation: jax.Array, contrast: jax.Array
) -> jax.Array:
    """Changes brightness, saturation and contrast, in this order, from draws (b,)."""
    x = images + (_per_sample(brightness) - 0.5)
    grey = jnp.mean(x, axis=-1, keepdims=True)
    x = (x - grey) * (2.0 * _per_sample(saturation)) + grey
    mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    return (x - mean) * (_per_sample(contrast) + 0.5) + mean


def cut_out(
    images: jax.Array, rows: jax.Array, columns: jax.Array, *, ratio: float
) -> jax.Array:
    """Sets a box of `ratio` times the sides to 0, its centre from draws (b,)."""
    _, h, w, _ = images.shape
    inside_h = _inside(rows, h, round(ratio * h))
    inside_w = _inside(columns, w, round(ratio * w))
    inside = inside_h[:, :, None] & inside_w[:, None, :]  # (b, h, w)
    return jnp.where(inside[..., None], 0.0, images)


def _inside(u: jax.Array, size: int, length: int) -> jax.Array:
    """Which of `size` positions lie in each sample's interval, (b, size).

    Centres go from 0 to `size` for even lengths; what leaves the image is lost.
    """
    first = _integer(u, size + 1 - length % 2) - length // 2
    positions = jnp.arange(size)[None, :]
    return (positions >= first[:, None]) & (positions < first[:, None] + length)


def _integer(u: jax.Array, count: int) -> jax.Array:
    """Maps draws from [0, 1) to integers below `count`."""
    return jnp.floor(u * count).astype(jnp.int32)


def _per_sample(u: jax.Array) -> jax.Array:
    return u[:, None, None, None]
