"""Samples that do not depend on how they are batched.

Every sample has its own key, made of the seed and its index, so the same image comes
out whatever the batch size, the number of devices or the order.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

Sample = Callable[[jax.Array, jax.Array], jax.Array]


def sample_noise(seed: int, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns noise (b, *shape) for the samples with the given indices (b,)."""
    key = jax.random.key(seed)

    def one(i):
        return jax.random.normal(jax.random.fold_in(key, i), shape)

    return jax.vmap(one)(index)


def balanced_labels(num_samples: int, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels (num_samples,) int32 with equal counts, in random order.

    A remainder is filled with the first classes.
    """
    labels = np.arange(num_samples, dtype=np.int32) % num_classes
    return np.random.default_rng(seed).permutation(labels)


def generate(
    sample: Sample, labels: np.ndarray, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[np.ndarray]:
    """Yields images (b, h, w, 3) of all labels, in order; the last batch is shorter.

    Args:
        sample: Called as sample(index (b,), labels (b,)) -> images in [0, 1].
        labels: Class of every sample.
        batch_size: Samples at a time, raised to a multiple of the devices; the last
            batch is filled up and cut.
        sharding: How the rows of a batch are laid out.
    """
    total, devices = len(labels), sharding.num_devices
    batch_size = math.ceil(batch_size / devices) * devices
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        rows = (index.astype(np.int32), labels[index].astype(np.int32))
        arrays = [jax.device_put(jnp.asarray(row), sharding) for row in rows]
        yield np.asarray(sample(*arrays))[: total - start]
