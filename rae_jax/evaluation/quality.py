"""How far a set of images is from a reference: FID, sFID, IS, precision and recall.

The protocol of ADM's evaluator, for sets of any size: features are counted batch by
batch into float64 moments, so neither batches nor devices change the result. Precision
and recall alone need all features, 8 kB per image.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from rae_jax import copies, storage
from rae_jax.evaluation import (
    extractors,
    frechet,
    inception_features,
    inception_score,
    precision_recall,
    streaming,
)
from rae_jax.training import distributed

Progress = Callable[[int], None]

ENOUGH = 10_000
_NETWORK = "network"  # Name of what the statistics are of.
# Arrays of ADM's reference files, by our feature names.
_STATISTICS = {
    extractors.POOL: ("mu", "sigma"),
    extractors.SPATIAL: ("mu_s", "sigma_s"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of an image set.

    Attributes:
        origin: What messages call it.
        extractor: Name of the features.
        count: Number of images; None for statistics that do not tell it.
        gaussians: Mean and covariance by feature name.
        pool: All features (count, d), if they were kept.
        inception_score: Mean and deviation over splits, of Inception features.
        size: Height and width of the images, if known.
    """

    origin: str
    extractor: str
    count: int | None
    gaussians: Mapping[str, frechet.Gaussian | frechet.Moments]
    pool: np.ndarray | None = None
    inception_score: tuple[float, float] | None = None
    size: tuple[int, int] | None = None


class Collector:
    """Counts images, or features computed elsewhere, into a `Measured`.

    Args:
        extractor: The feature network.
        origin: What messages call the set.
        keep: Whether to keep all pooled features, for precision and recall.
    """

    def __init__(
        self, extractor: extractors.Extractor, origin: str, *, keep: bool = False
    ):
        self.extractor, self.origin, self.keep = extractor, origin, keep
        self._moments: dict[str, frechet.MomentsStream] = {}
        self._kept: list[np.ndarray] = []
        self._score = inception_score.InceptionScore()
        self._count = 0
        self._held: list[np.ndarray] = []  # Not a whole batch yet.
        self._size: tuple[int, int] | None = None

    def add(self, images: np.ndarray) -> None:
        """Counts uint8 images (b, h, w, 3) of any number.

        Raises:
            ValueError: They differ in size from those before.
        """
        if self._size not in (None, images.shape[1:3]):
            raise ValueError(
                f"{self.origin}: images of {images.shape[1:3]} follow images of "
                f"{self._size}; all must have one size."
            )
        self._size = images.shape[1:3]
        self._held.append(images)
        size = self.extractor.batch_size
        if sum(map(len, self._held)) < size:
            return
        images = np.concatenate(self._held)
        whole = len(images) // size * size
        for start in range(0, whole, size):
            self._extract(images[start : start + size])
        self._held = [images[whole:]]

    def _extract(self, images: np.ndarray) -> None:
        self.add_features(distributed.to_host(self.extractor(images)))

    def add_features(
        self, features: Mapping[str, np.ndarray], mask: np.ndarray | None = None
    ) -> None:
        """Counts features (b, d) by name, of the rows where `mask` is not zero."""
        for name, values in features.items():
            values = values if mask is None else values[np.asarray(mask) != 0]
            if name == extractors.LOGITS:
                self._score.add(values)
                continue
            if name not in self._moments:
                self._moments[name] = frechet.MomentsStream(values.shape[1])
            self._moments[name].add(values)
            if name == extractors.POOL:
                self._count += len(values)
                self._kept += [np.array(values)] if self.keep else []

    def finish(self) -> Measured:
        """Returns what was counted.

        Raises:
            ValueError: Fewer than two images were counted.
        """
        if any(map(len, self._held)):
            self._extract(np.concatenate(self._held))
        self._held = []
        if self._count < 2:
            raise ValueError(
                f"{self.origin}: a distance needs 2 images or more, not {self._count}."
            )
        gaussians = {name: m.result() for name, m in self._moments.items()}
        is_inception = self.extractor.name == inception_features.NAME
        return Measured(
            self.origin,
            self.extractor.name,
            self._count,
            gaussians,
            np.concatenate(self._kept) if self.keep else None,
            self._score.result() if is_inception else None,
            self._size,
        )


def measure(
    extractor: extractors.Extractor,
    batches: Iterable[np.ndarray],
    origin: str,
    *,
    keep: bool = False,
    progress: Progress = lambda count: None,
) -> Measured:
    """Measures uint8 images (b, h, w, 3) that come in batches of any size."""
    collector = Collector(extractor, origin, keep=keep)
    for batch in batches:
        collector.add(batch)
        progress(len(batch))
    return collector.finish()


def read_reference(
    extractor: extractors.Extractor,
    path: Path,
    *,
    keep: bool = False,
    progress: Progress = lambda count: None,
) -> Measured:
    """Reads or measures a reference.

    Args:
        extractor: The feature network.
        path: An .npz with statistics (mu, sigma and for sFID mu_s, sigma_s), images
            (arr_0) or both, as ADM released them; or a folder of images. Statistics
            are those of Inception, unless `save_statistics` wrote which they are of.
        keep: Whether features are needed for precision and recall; they come from
            the images alone.
        progress: Called with the number of images just done.

    Raises:
        ValueError: The file holds neither, or what it holds does not fit.
        FileNotFoundError: There is no such file.
    """
    path = storage.path(path).expanduser()
    names = streaming.array_names(path) if path.is_file() else []
    stored = {}
    if _network(path, names) == extractor.name:
        stored = _read_statistics(path, names)
    has_images = path.is_dir() or streaming.ARRAY in names
    if not has_images and not stored and path.is_file():
        raise ValueError(_no_reference(extractor, path, names))
    if stored and not (has_images and keep):
        return Measured(str(path), extractor.name, _count(stored), stored)
    images = streaming.open_images(path)
    found = measure(
        extractor, images.batches(), str(path), keep=keep, progress=progress
    )
    if not stored:
        return found
    gaussians = dict(found.gaussians) | stored
    return dataclasses.replace(found, gaussians=gaussians, count=_count(stored))


def save_statistics(path: Path, measured: Measured) -> None:
    """Writes mean and covariance with the names of ADM's references.

    Beside them "count", and "network": the name of what measured the images.
    """
    arrays = {
        "count": np.asarray(measured.count or 0),
        _NETWORK: np.asarray(measured.extractor),
    }
    for name, (mean, covariance) in _STATISTICS.items():
        if name in measured.gaussians:
            found = measured.gaussians[name]
            arrays |= {mean: found.mean, covariance: found.covariance}
    with storage.writing(path) as file:
        np.savez(file, **arrays)


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores by name, and sentences that their reader must know."""

    scores: dict[str, float]
    notes: tuple[str, ...] = ()


def compare(
    found: Measured, reference: Measured, *, prefix: str = "", full: bool = True
) -> Result:
    """Returns the scores of a set.

    Args:
        found: The set.
        reference: The set it is compared with, in the same features.
        prefix: "g" for generated images, "r" for reconstructions.
        full: Whether to return more than the Frechet distance.

    Returns:
        With Inception, "gfid_50k" (the number of images in its name) and, where both
        sets allow it, "sfid_50k", "inception_score", "inception_score_std",
        "precision" and "recall". With other networks the distance under their name.

    Raises:
        ValueError: The features differ.
    """
    if found.extractor != reference.extractor:
        raise ValueError(
            f"{found.origin} was measured by {found.extractor}, {reference.origin} by "
            f"{reference.extractor}; they cannot be compared."
        )
    pools = [x.gaussians[extractors.POOL] for x in (found, reference)]
    frechet_pool = frechet.compare(*pools)
    notes = tuple(_notes(found, reference, frechet_pool))
    if found.extractor != inception_features.NAME:
        return Result({found.extractor: frechet_pool.distance}, notes)
    label = count_label(found.count)
    scores = {f"{prefix}fid_{label}": frechet_pool.distance}
    if full:
        scores |= _more(found, reference, label)
    return Result(scores, notes)


def _more(found: Measured, reference: Measured, label: str) -> dict[str, float]:
    """Returns what ADM's evaluator reports beside the FID."""
    scores = {}
    if all(extractors.SPATIAL in x.gaussians for x in (found, reference)):
        spatial = [x.gaussians[extractors.SPATIAL] for x in (found, reference)]
        scores[f"sfid_{label}"] = frechet.frechet_distance(*spatial)
    if found.inception_score is not None:
        mean, deviation = found.inception_score
        scores |= {"inception_score": mean, "inception_score_std": deviation}
    if found.pool is not None and reference.pool is not None:
        share = precision_recall.precision_recall(reference.pool, found.pool)
        scores |= {"precision": share[0], "recall": share[1]}
    return scores


def _notes(
    found: Measured, reference: Measured, comparison: frechet.Comparison
) -> Iterator[str]:
    sets = ((found, "The set has"), (reference, "The reference has"))
    for (measured, subject), rank in zip(sets, comparison.ranks, strict=True):
        count = measured.count
        if count is not None and count < ENOUGH:
            yield (
                f"{subject} {count} images, fewer than {ENOUGH}. Frechet distances "
                "grow as a set shrinks: compare this one only with distances of as "
                "many images."
            )
        if rank < comparison.dim:
            yield (
                f"{subject} a covariance of rank {rank} in {comparison.dim} features: "
                "it says nothing about the other directions. More images than "
                "features are needed."
            )
    sizes = found.size, reference.size
    if None not in sizes and sizes[0] != sizes[1]:
        yield (
            f"The images are {sizes[0][1]} x {sizes[0][0]} pixels, those of the "
            f"reference {sizes[1][1]} x {sizes[1][0]}; scores depend on the size."
        )


def count_label(count: int | None) -> str:
    """Returns a number of images for a score's name: 50k for 50,000, else in full."""
    if count and count % 1_000 == 0:
        return f"{count // 1_000}k"
    return str(count)


def _network(path: Path, names: list[str]) -> str:
    """Returns of which network a file's statistics are."""
    if _NETWORK not in names:
        return inception_features.NAME
    with np.load(copies.local(path), allow_pickle=False) as file:
        name = file[_NETWORK]
    return str(name) if name.dtype.kind == "U" else inception_features.NAME


def _read_statistics(path: Path, names: list[str]) -> dict[str, frechet.Gaussian]:
    found = {}
    for feature, (mean, covariance) in _STATISTICS.items():
        if not {mean, covariance} <= set(names):
            continue
        with np.load(copies.local(path), allow_pickle=False) as file:
            count = int(file["count"]) if "count" in names else 0
            moments = [file[key].astype(np.float64) for key in (mean, covariance)]
        try:
            found[feature] = frechet.Gaussian(*moments, count or None)
        except ValueError as error:
            raise ValueError(f"{path}, {mean} and {covariance}: {error}") from None
    return found


def _count(gaussians: Mapping[str, frechet.Gaussian]) -> int | None:
    return next(iter(gaussians.values())).count


def _no_reference(extractor: extractors.Extractor, path: Path, names: list[str]) -> str:
    if "mu" in names and _network(path, names) != extractor.name:
        return (
            f"{path} holds statistics of {_network(path, names)} features, which "
            f"{extractor.name} cannot be compared with. Give reference images, a "
            f"folder or an .npz with {streaming.ARRAY!r}; or statistics of them, made "
            "by rae-jax evaluate --save-statistics with the same network."
        )
    return (
        f"{path} holds {sorted(names)}: neither statistics (mu, sigma) nor images "
        f"({streaming.ARRAY}). Make a reference with `rae-jax prepare IMAGES --pack "
        "OUT.npz --size 256`, or fetch one of ADM's, such as "
        "VIRTUAL_imagenet256_labeled.npz."
    )
