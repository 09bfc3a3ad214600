"""Frechet distance between two sets of features, from streamed moments.

Everything is float64 on the host: the distance is a small difference of large traces.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and scatter (d, d) = sum of outer products about the mean.

    The scatter, unlike the second moment about zero, merges without cancellation.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """Returns the moments of no features of `dim` entries."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (d, d), with divisor count - 1.

        Raises:
            ValueError: There are fewer than two features.
        """
        if self.count < 2:
            raise ValueError(
                f"A covariance needs 2 features or more, not {self.count}."
            )
        return self.scatter / (self.count - 1)


def add(moments: Moments, features: np.ndarray) -> Moments:
    """Returns moments that also count the rows of features (n, d).

    Raises:
        ValueError: The width differs or an entry is not finite.
    """
    features = np.asarray(features, np.float64)
    dim = moments.mean.size
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"Features must be (n, {dim}), not {features.shape}.")
    if not np.isfinite(features).all():
        rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise ValueError(f"Features are not finite in rows {rows[:10].tolist()}.")
    if not len(features):
        return moments
    mean = features.mean(axis=0)
    centred = features - mean[None, :]
    return merge(moments, Moments(len(features), mean, centred.T @ centred))


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of both sets together (Chan, Golub and LeVeque, 1983)."""
    if a.mean.size != b.mean.size:
        raise ValueError(f"Widths differ: {a.mean.size} and {b.mean.size}.")
    if not a.count or not b.count:
        return a if a.count else b
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    between = np.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + between)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two feature sets, each taken as a Gaussian.

    This is the formula of FID (arXiv:1706.08500); the name depends on the features.

    Raises:
        ValueError: A set has fewer than two features, or widths differ.
    """
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    The trace of the last root is that of (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2), which
    is symmetric: its eigenvalues are real and need no general matrix root.
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"Widths differ: {mean_a.size} and {mean_b.size}.")
    root_a = _symmetric_root(cov_a)
    eigenvalues = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_root = np.sqrt(_without_rounding(eigenvalues)).sum()
    shift = np.sum((mean_a - mean_b) ** 2)
    distance = shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * trace_root
    return max(float(distance), 0.0)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(_without_rounding(eigenvalues))[None, :]) @ vectors.T


def _without_rounding(eigenvalues: np.ndarray) -> np.ndarray:
    """Sets to zero what rounding left of the zero eigenvalues of a singular matrix.

    Their roots would be eight orders of magnitude larger than they are.
    """
    rounding = np.finfo(np.float64).eps * eigenvalues.size * np.abs(eigenvalues).max()
    return np.where(eigenvalues > rounding, eigenvalues, 0.0)
