"""Improved precision and recall (arXiv:1904.06991).

A set's manifold is the union of balls around its features that reach to the k-th
nearest other one. Precision is the share of samples inside the reference's manifold,
recall the share of reference images inside the samples'.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rae_jax.training import distributed, sharding

NEIGHBOURS = 3  # ADM's evaluator.
_ROWS, _COLUMNS = 2048, 8192


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    mesh: Mesh | None = None,
) -> tuple[float, float]:
    """Returns precision and recall of two feature sets.

    Distances are computed block by block and never kept, so memory does not grow
    beyond the features themselves.

    Args:
        reference: Features of real images (n, d).
        samples: Features of generated images (m, d).
        neighbours: k; 3 in ADM's evaluator and the paper.
        mesh: Devices that share the work; all there are if None.

    Raises:
        ValueError: Widths differ, or a set has no more than k features.
    """
    if (
        reference.ndim != 2
        or samples.ndim != 2
        or (reference.shape[1] != samples.shape[1])
    ):
        raise ValueError(
            f"Features must be (n, d) of one width d, got {reference.shape} and "
            f"{samples.shape}."
        )
    fewest = min(len(reference), len(samples))
    if fewest <= neighbours:
        raise ValueError(
            f"Precision and recall with k = {neighbours} need more than {neighbours} "
            f"images per set, not {fewest}."
        )
    mesh = sharding.make_mesh(-1) if mesh is None else mesh
    # Distances do not change, but lose less to rounding.
    centre = reference.mean(axis=0, dtype=np.float64)[None, :]
    reference, samples = ((x - centre).astype(np.float32) for x in (reference, samples))
    reach = [_squared_radii(x, neighbours, mesh) for x in (reference, samples)]
    precision = _share_inside(samples, reference, reach[0], mesh)
    recall = _share_inside(reference, samples, reach[1], mesh)
    return precision, recall


def _squared_radii(x: np.ndarray, neighbours: int, mesh: Mesh) -> np.ndarray:
    """Squared distance of each feature to its k-th nearest other one, (n,)."""
    found = []
    for rows, count in _row_blocks(x, mesh):
        # A feature is its own nearest neighbour, hence one more.
        best = jnp.full((len(rows), neighbours + 1), jnp.inf)
        for columns, valid in _column_blocks(x):
            best = _smallest(rows, columns, valid, best)
        found.append(distributed.to_host(best[:, -1])[:count])
    return np.concatenate(found)


def _share_inside(
    points: np.ndarray, centres: np.ndarray, reach: np.ndarray, mesh: Mesh
) -> float:
    inside = 0
    for rows, count in _row_blocks(points, mesh):
        hit = jnp.zeros(len(rows), bool)
        for k, (columns, valid) in enumerate(_column_blocks(centres)):
            part = reach[k * _COLUMNS : (k + 1) * _COLUMNS]
            limit = np.pad(part, (0, len(columns) - len(part)))
            hit = hit | _inside(rows, columns, valid, limit)
        inside += int(distributed.to_host(hit)[:count].sum())
    return inside / len(points)


def _row_blocks(x: np.ndarray, mesh: Mesh):
    """Yields blocks of equal size on the devices, and how many rows are no padding."""
    size = min(_ROWS, len(x))
    size = -(-size // mesh.size) * mesh.size
    rows = sharding.batch_sharding(mesh)
    for start in range(0, len(x), size):
        block = x[start : start + size]
        padded = np.pad(block, ((0, size - len(block)), (0, 0)))
        yield jax.device_put(padded, rows), len(block)


def _column_blocks(x: np.ndarray):
    """Yields blocks of equal size, and which of their rows are no padding."""
    size = min(_COLUMNS, len(x))
    for start in range(0, len(x), size):
        block = x[start : start + size]
        valid = np.arange(size) < len(block)
        yield np.pad(block, ((0, size - len(block)), (0, 0))), valid


def _distances(rows: jax.Array, columns: jax.Array, valid: jax.Array) -> jax.Array:
    """Squared distances (n, m); infinite to padding."""
    highest = jax.lax.Precision.HIGHEST
    product = jnp.matmul(rows, columns.T, precision=highest)
    norms = jnp.sum(rows**2, axis=1)[:, None] + jnp.sum(columns**2, axis=1)[None, :]
    return jnp.where(valid[None, :], jnp.maximum(norms - 2.0 * product, 0.0), jnp.inf)


@jax.jit
def _smallest(rows, columns, valid, best):
    """Merges the smallest distances so far (n, k) with those to more columns."""
    both = jnp.concatenate([best, _distances(rows, columns, valid)], axis=1)
    return -jax.lax.top_k(-both, best.shape[1])[0]


@jax.jit
def _inside(rows, columns, valid, limit):
    return jnp.any(_distances(rows, columns, valid) <= limit[None, :], axis=1)
