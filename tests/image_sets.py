"""Small image sets, and a small feature network in Inception's place."""

import functools

import jax.numpy as jnp
import numpy as np

from rae_jax.evaluation import extractors
from rae_jax.training import sharding

WIDTHS = {"pool": 12, "spatial": 5, "logits": 6}


def _projections():
    rng = np.random.default_rng(7)
    return {k: rng.standard_normal((48, d), np.float32) for k, d in WIDTHS.items()}


def _features(params, images):
    b, h, w, _ = images.shape
    x = images.astype(jnp.float32).reshape(b, 4, h // 4, 4, w // 4, 3) / 255.0
    x = jnp.mean(x, axis=(2, 4)).reshape(b, -1) - 0.5
    return {name: jnp.tanh(x @ kernel) for name, kernel in params.items()}


def on_host(images):
    """Returns the features in numpy, float64."""
    b, h, w, _ = images.shape
    x = images.astype(np.float64).reshape(b, 4, h // 4, 4, w // 4, 3) / 255.0
    x = x.mean(axis=(2, 4)).reshape(b, -1) - 0.5
    return {k: np.tanh(x @ w.astype(np.float64)) for k, w in _projections().items()}


@functools.cache  # Every network is compiled anew.
def network(batch_size=8, devices=1, name="inception"):
    """Returns the extractor; images are (b, h, w, 3), h and w multiples of 4."""
    mesh = sharding.make_mesh(devices)
    options = dict(batch_size=batch_size, mesh=mesh)
    return extractors.Extractor(name, _features, _projections(), **options)


def pictures(count, seed=0, low=0, high=256, side=8):
    """Returns uint8 noise (count, side, side, 3)."""
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (count, side, side, 3), dtype=np.uint8)


def parts(images, size):
    """Yields the rows in batches."""
    return (images[i : i + size] for i in range(0, len(images), size))


def shares_by_brute_force(reference, samples, k=3):
    """Improved precision and recall from all distances at once."""

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))

    def inside(points, centres):
        radii = np.sort(distances(centres, centres), axis=1)[:, k]
        return (distances(points, centres) <= radii[None]).any(axis=1).mean()

    return inside(samples, reference), inside(reference, samples)
