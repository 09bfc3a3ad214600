"""Images and labels mixed in pairs: mixup and cutmix, and the loss of soft labels.

mixup (arXiv:1710.09412) blends two images, cutmix (arXiv:1905.04899) pastes a rectangle
of one into the other; a batch draws one of them and one ratio for all its pairs, as
timm does for DeiT and MAE. An image's partner is the one as far from the batch's end as
it is from the beginning.
"""

import jax
import jax.numpy as jnp
import optax


def mix(
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    num_classes: int,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    label_smoothing: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Returns mixed images and their soft labels (b, num_classes).

    Args:
        images: Any float images (b, h, w, c).
        labels: Classes (b,).
        key: Randomness.
        num_classes: Number of classes.
        mixup: alpha of the ratio's Beta distribution; 0 for no mixup.
        cutmix: The same of cutmix; 0 for no cutmix.
        switch: Probability of cutmix where both are on.
        label_smoothing: Share of a label that is spread over all classes.

    Raises:
        ValueError: A number is negative, or a probability above 1.
    """
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
    for name, value in (("switch", switch), ("label_smoothing", label_smoothing)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be within 0 and 1, got {value}.")
    soft = smooth(labels, num_classes, label_smoothing)
    if not mixup and not cutmix:
        return images, soft
    choice, of_blend, of_box = jax.random.split(key, 3)

    def blend():
        share = jax.random.beta(of_blend, mixup, mixup)
        return share * images + (1 - share) * images[::-1], share

    def paste():
        keys = jax.random.split(of_box)
        inside = box(keys[0], jax.random.beta(keys[1], cutmix, cutmix), images.shape)
        share = 1 - jnp.mean(inside.astype(jnp.float32))
        return jnp.where(inside[None, :, :, None], images[::-1], images), share

    if not cutmix:
        images, share = blend()
    elif not mixup:
        images, share = paste()
    else:
        is_cut = jax.random.bernoulli(choice, switch)
        images, share = jax.lax.cond(is_cut, paste, blend)
    return images, share * soft + (1 - share) * soft[::-1]


def smooth(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Returns labels (b,) as distributions (b, num_classes)."""
    hard = jax.nn.one_hot(labels, num_classes)
    return hard * (1 - smoothing) + smoothing / num_classes


def box(key: jax.Array, share: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws a rectangle of about 1 - share of the area, cut off at the border.

    Args:
        key: Randomness of its centre, uniform over the image.
        share: What is left of the image.
        shape: Of images (b, h, w, c).

    Returns:
        Whether a pixel is inside (h, w).
    """
    inside = []
    for axis_key, size in zip(jax.random.split(key), shape[1:3], strict=True):
        half = jnp.floor(size * jnp.sqrt(1 - share)) // 2
        centre = jax.random.randint(axis_key, (), 0, size)
        at = jnp.arange(size)
        inside.append((at >= centre - half) & (at < centre + half))
    return inside[0][:, None] & inside[1][None, :]


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of logits and distributions (b, classes)."""
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))
