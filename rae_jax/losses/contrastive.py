"""The contrastive loss of MoCo v3 (arXiv:2104.02057 section 3)."""

import jax
import jax.numpy as jnp
import optax

MIN_NORM = 1e-12


def info_nce(
    queries: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of telling each query's own key from those of the whole batch.

    A batch that is split over devices is one batch: its keys are all negatives.

    Args:
        queries: (b, d), of any length.
        keys: (b, d); row i belongs to query i. They receive no gradient.
        temperature: What the cosines are divided by.

    Returns:
        The loss, multiplied by twice the temperature as in the official code, so that
        learning rates need not follow it; and the share of queries whose own key is
        the nearest.

    Raises:
        ValueError: The temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    keys = jax.lax.stop_gradient(keys)
    highest = jax.lax.Precision.HIGHEST
    cosines = jnp.matmul(unit(queries), unit(keys).T, precision=highest)
    labels = jnp.arange(len(queries))
    loss = optax.softmax_cross_entropy_with_integer_labels(
        cosines / temperature, labels
    )
    accuracy = jnp.mean((jnp.argmax(cosines, axis=1) == labels).astype(jnp.float32))
    return 2 * temperature * jnp.mean(loss), accuracy


def symmetric_loss(
    queries: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Adds up `info_nce` of each view's queries with the other view's keys.

    Args:
        queries: (b, 2, d).
        keys: (b, 2, d).
        temperature: See `info_nce`.

    Returns:
        The loss and the metrics: beside it `accuracy`, and `query_std`, the deviation
        over the batch of normalised queries times sqrt(d), 1 where they spread evenly
        and 0 where all are one.
    """
    first, accuracy_first = info_nce(queries[:, 0], keys[:, 1], temperature)
    second, accuracy_second = info_nce(queries[:, 1], keys[:, 0], temperature)
    spread = jnp.std(unit(queries), axis=0) * queries.shape[-1] ** 0.5
    loss = first + second
    return loss, {
        "loss": loss,
        "accuracy": (accuracy_first + accuracy_second) / 2,
        "query_std": jnp.mean(spread),
    }


def unit(x: jax.Array) -> jax.Array:
    """Divides vectors (..., d) by their length."""
    # The bound is inside the root, where the gradient of a zero vector stays finite.
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, MIN_NORM**2))
