"""Weighted nearest-neighbour classification of features, as DINO measures it.

arXiv:1805.01978, arXiv:2104.14294: features are normalised to length 1, and the k
training images of the highest cosine vote with exp(cosine / T) for their class.
Training features are streamed; of each query only its best neighbours so far are kept.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = (10, 20)  # DINO's.
TEMPERATURE = 0.07
_ROWS = 4096  # Queries at a time.


class Neighbours:
    """The nearest training features of a set of queries.

    Args:
        queries: Features (q, d).
        count: Neighbours that are kept, the largest k of interest.

    Raises:
        ValueError: The queries are no features, or `count` is not positive.
    """

    def __init__(self, queries: np.ndarray, count: int):
        if queries.ndim != 2 or not len(queries):
            raise ValueError(f"Queries must be (q, d), got {queries.shape}.")
        if count < 1:
            raise ValueError(f"At least 1 neighbour must be kept, not {count}.")
        self.seen = 0
        self._count = count
        parts = [queries[i : i + _ROWS] for i in range(0, len(queries), _ROWS)]
        self._queries = [_normalised(jnp.asarray(part)) for part in parts]
        self._best = [
            (jnp.full((len(p), count), -jnp.inf), jnp.zeros((len(p), count), jnp.int32))
            for p in parts
        ]

    def add(
        self, features: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None
    ) -> None:
        """Takes in training features.

        Args:
            features: (n, d); batches of one size are compiled once.
            labels: Their classes (n,).
            mask: Nonzero for rows that count (n,), zero for padding.

        Raises:
            ValueError: Their width is not that of the queries.
        """
        width = self._queries[0].shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"Features must be (n, {width}), got {features.shape}.")
        mask = np.ones(len(features)) if mask is None else np.asarray(mask)
        self.seen += int((mask > 0).sum())
        new = (jnp.asarray(features), jnp.asarray(labels, jnp.int32), mask > 0)
        self._best = [
            _merge(queries, best, *new)
            for queries, best in zip(self._queries, self._best, strict=True)
        ]

    def top1(
        self,
        labels: np.ndarray,
        num_classes: int,
        neighbours: Sequence[int] = NEIGHBOURS,
        temperature: float = TEMPERATURE,
    ) -> dict[int, float]:
        """Returns the share of queries whose class wins the vote, for each k.

        Args:
            labels: True classes of the queries (q,).
            num_classes: Number of classes.
            neighbours: Numbers of voters.
            temperature: T of the weights exp(cosine / T).

        Raises:
            ValueError: A k is larger than what is kept or than what was seen.
        """
        most = min(self._count, self.seen)
        wrong = [k for k in neighbours if not 1 <= k <= most]
        if wrong:
            raise ValueError(
                f"k = {wrong} are not within 1 and {most}: {self.seen} training "
                f"features were seen and {self._count} neighbours are kept."
            )
        found = {}
        for k in neighbours:
            votes = [_winners(b, k, num_classes, temperature) for b in self._best]
            found[k] = float(np.mean(np.concatenate(votes) == np.asarray(labels)))
        return found


@jax.jit
def _normalised(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@jax.jit
def _merge(queries, best, features, labels, mask):
    """Merges the best neighbours so far with more training features."""
    highest = jax.lax.Precision.HIGHEST
    cosines = jnp.matmul(queries, _normalised(features).T, precision=highest)
    cosines = jnp.where(mask[None, :], cosines, -jnp.inf)
    values, classes = best
    labels = jnp.broadcast_to(labels[None, :], cosines.shape)
    values = jnp.concatenate([values, cosines], axis=1)
    classes = jnp.concatenate([classes, labels], axis=1)
    values, chosen = jax.lax.top_k(values, best[0].shape[1])
    return values, jnp.take_along_axis(classes, chosen, axis=1)


def _winners(best, k: int, num_classes: int, temperature: float) -> np.ndarray:
    """Returns the class (q,) with most of the weight of the first k neighbours."""
    cosines, classes = (np.asarray(x)[:, :k] for x in best)
    # Weights relative to the nearest: the same winner, and no overflow.
    weights = np.exp((cosines - cosines[:, :1]).astype(np.float64) / temperature)
    votes = np.zeros((len(cosines), num_classes))
    np.add.at(votes, (np.arange(len(cosines))[:, None], classes), weights)
    return votes.argmax(axis=1)
