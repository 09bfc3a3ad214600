"""Frechet distance between two sets of features, from streamed moments.

Everything is float64 on the host: the distance is a small difference of large traces.
"""

import dataclasses

import numpy as np

_BLOCK = 1024
# Of the largest eigenvalue; float32 rounding of a stored covariance is far below.
_NEGATIVE = 1e-5
# scipy's matrix roots are accepted up to this imaginary part, too.
_IMAGINARY = 1e-3


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of a feature set, as .npz references store them.

    Attributes:
        mean: Mean.
        covariance: Unbiased covariance.
        count: Number of features; None if unknown.

    Raises:
        ValueError: They are not the mean and covariance of anything.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self):
        d = self.mean.size
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            raise ValueError(
                "A mean and covariance must be (d,) and (d, d), not "
                f"{self.mean.shape} and {self.covariance.shape}."
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("A mean or covariance is not finite.")
        largest = np.abs(self.covariance).max(initial=0.0)
        if np.abs(self.covariance - self.covariance.T).max() > _NEGATIVE * largest:
            raise ValueError("A covariance is not symmetric.")


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


class MomentsStream:
    """Adds features in blocks of a fixed size, whatever batches they come in.

    So equal features give bit-equal moments, and large matrices are updated rarely.
    """

    def __init__(self, dim: int):
        self._moments = Moments.empty(dim)
        self._block = np.empty((_BLOCK, dim), np.float32)
        self._filled = 0

    def add(self, features: np.ndarray) -> None:
        """Counts the rows of features (n, d).

        Raises:
            ValueError: The width differs; entries are checked block by block.
        """
        dim = self._block.shape[1]
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"Features must be (n, {dim}), not {features.shape}.")
        while len(features):
            part = features[: _BLOCK - self._filled]
            features = features[len(part) :]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == _BLOCK:
                self._flush()

    def result(self) -> Moments:
        """Returns the moments of all features so far.

        Raises:
            ValueError: An entry is not finite.
        """
        self._flush()
        return self._moments

    def _flush(self) -> None:
        self._moments = add(self._moments, self._block[: self._filled])
        self._filled = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A Frechet distance and what it rests on.

    Attributes:
        distance: The distance.
        ranks: Numerical ranks of the two covariances.
        dim: Number of features.
    """

    distance: float
    ranks: tuple[int, int]
    dim: int


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """Frechet distance of two feature sets, each taken as a Gaussian.

    This is the formula of FID (arXiv:1706.08500); the name depends on the features.

    Raises:
        ValueError: A set has fewer than two features, or widths differ.
    """
    return compare(a, b).distance


def compare(a: Moments | Gaussian, b: Moments | Gaussian) -> Comparison:
    """Returns the Frechet distance of two feature sets and the covariances' ranks.

    Raises:
        ValueError: As `frechet_distance`, or a matrix is no covariance.
    """
    return _compare(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    Raises:
        ValueError: Widths differ, or a matrix is no covariance.
    """
    return _compare(mean_a, cov_a, mean_b, cov_b).distance


def _compare(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> Comparison:
    """The trace of the root of cov_a cov_b, without a root of a general matrix.

    It is that of (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2), which is symmetric: its
    eigenvalues are real, also where covariances are singular. What is left to check
    is their sign; a negative one would be the imaginary residue of a general root.
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"Widths differ: {mean_a.size} and {mean_b.size}.")
    root_a, rank_a = _symmetric_root(cov_a)
    rank_b = _rank(np.linalg.eigvalsh(cov_b))
    eigenvalues = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_root = np.sqrt(_without_rounding(eigenvalues)).sum()
    total = np.trace(cov_a) + np.trace(cov_b)
    residue = np.sqrt(np.maximum(-eigenvalues, 0.0)).sum()
    if residue > _IMAGINARY * max(total, 1.0):
        raise ValueError(
            f"The root of the covariances' product has an imaginary part of "
            f"{residue:.3g}, so they are no covariances. Compute the statistics anew."
        )
    distance = np.sum((mean_a - mean_b) ** 2) + total - 2.0 * trace_root
    return Comparison(max(float(distance), 0.0), (rank_a, rank_b), mean_a.size)


def _symmetric_root(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    rank = _rank(eigenvalues)
    kept = _without_rounding(eigenvalues)
    return (vectors * np.sqrt(kept)[None, :]) @ vectors.T, rank


def _rank(eigenvalues: np.ndarray) -> int:
    """Returns how many eigenvalues are not zero up to rounding.

    Raises:
        ValueError: One is negative: the matrix is no covariance.
    """
    smallest, largest = eigenvalues.min(), np.abs(eigenvalues).max()
    if smallest < -_NEGATIVE * largest:
        raise ValueError(
            f"A covariance has the negative eigenvalue {smallest:.3g} (largest "
            f"{largest:.3g}). Compute the statistics anew, in float64."
        )
    return int(np.count_nonzero(_without_rounding(eigenvalues)))


def _without_rounding(eigenvalues: np.ndarray) -> np.ndarray:
    """Sets to zero what rounding left of the zero eigenvalues of a singular matrix.

    Their roots would be eight orders of magnitude larger than they are.
    """
    rounding = np.finfo(np.float64).eps * eigenvalues.size * np.abs(eigenvalues).max()
    return np.where(eigenvalues > rounding, eigenvalues, 0.0)
