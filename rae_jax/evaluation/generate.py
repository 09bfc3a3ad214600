"""Samples that do not depend on how they are batched.

Every sample has its own key, made of the seed and its index, so the same image comes
out whatever the batch size, the number of devices or the order.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.training import distributed

# Called as sample(index (b,), labels (b,)); returns arrays with the batch first.
Sample = Callable[[jax.Array, jax.Array], Any]

# Folded into the seed of what a stochastic sampler draws; no index is that large.
STEPS = np.uint32(2**32 - 1)


class Drawn(NamedTuple):
    """A batch of samples.

    Attributes:
        index: Their indices (b,).
        images: uint8 (b, h, w, 3).
        latents: Normalised latents (b, h, w, c), or None.
        finite: Whether latents and image are (b,).
    """

    index: jax.Array
    images: jax.Array
    latents: jax.Array | None
    finite: jax.Array


def sample_noise(seed: int, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns noise (b, *shape) for the samples with the given indices (b,)."""
    key = jax.random.key(seed)

    def one(i):
        return jax.random.normal(jax.random.fold_in(key, i), shape)

    return jax.vmap(one)(index)


def sample_keys(seed: int, index: jax.Array) -> jax.Array:
    """Returns keys (b,) for what happens to the samples after `sample_noise`."""
    key = jax.random.fold_in(jax.random.key(seed), STEPS)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def balanced_labels(num_samples: int, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels (num_samples,) int32 with equal counts, in random order.

    A remainder is filled with the first classes.
    """
    labels = np.arange(num_samples, dtype=np.int32) % num_classes
    return np.random.default_rng(seed).permutation(labels)


def random_labels(num_samples: int, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels (num_samples,) int32, each class with equal probability."""
    rng = np.random.default_rng(seed)
    return rng.integers(num_classes, size=num_samples, dtype=np.int32)


def generate(
    sample: Sample,
    labels: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    index: np.ndarray | None = None,
) -> Iterator[Any]:
    """Yields the results of all samples, in order; the last batch is shorter.

    While the host handles a batch, the devices work on the next.

    Args:
        sample: Makes a batch, see `Sample`.
        labels: Class of every sample.
        batch_size: Samples at a time, raised to a multiple of the devices; the last
            batch is filled up and cut.
        sharding: How the rows of a batch are laid out.
        index: Which samples to make, in this order; all if None.
    """
    index = np.arange(len(labels)) if index is None else np.asarray(index)
    total, devices = len(index), sharding.num_devices
    batch_size = math.ceil(batch_size / devices) * devices
    running: list[tuple[Any, int]] = []
    for start in range(0, total, batch_size):
        chosen = index[np.minimum(np.arange(start, start + batch_size), total - 1)]
        rows = (chosen.astype(np.int32), labels[chosen].astype(np.int32))
        arrays = [jax.device_put(jnp.asarray(row), sharding) for row in rows]
        running.append((sample(*arrays), total - start))
        if len(running) > 1:
            yield _fetch(*running.pop(0))
    for batch in running:
        yield _fetch(*batch)


def _fetch(batch: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x[:count], distributed.to_host(batch))


def draw(
    sample: Callable[[jax.Array, jax.Array], Drawn],
    labels: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    index: np.ndarray | None = None,
) -> Iterator[Drawn]:
    """Yields batches like `generate`, whose samples are all finite.

    Raises:
        FloatingPointError: One is not; it would become a black image.
    """
    for drawn in generate(sample, labels, batch_size, sharding, index):
        if not drawn.finite.all():
            bad = drawn.index[~drawn.finite]
            shown = ", ".join(f"{i} (class {labels[i]})" for i in bad[:5])
            more = f" and {len(bad) - 5} more of its batch" if len(bad) > 5 else ""
            raise FloatingPointError(
                f"Not finite: sample {shown}{more}. The latents or the image hold NaN "
                "or infinity. Check the weights; try a lower guidance scale, float32 "
                "products or, where a sampler has max_steps, more of them."
            )
        yield drawn
