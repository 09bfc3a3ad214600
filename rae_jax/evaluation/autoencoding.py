"""Scores of reconstructions over a stream of images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rae_jax.data import loader
from rae_jax.evaluation import extractors, quality, reconstruction
from rae_jax.training import distributed

Batch = Mapping[str, np.ndarray]
Arrays = Mapping[str, jax.Array]
Versions = Callable[[Arrays], Iterable[tuple[Any, jax.Array]]]
Score = Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]]


def score_versions(
    batches: Iterable[Batch],
    rows: jax.sharding.Sharding,
    versions: Versions,
    score: Score,
    *,
    networks: Iterable[extractors.Extractor] = (),
    references: Mapping[str, quality.Measured] | None = None,
    progress: quality.Progress = lambda count: None,
) -> dict[Any, quality.Result]:
    """Scores several reconstructions of the same images in one pass.

    Only moments and sums are kept, so memory does not grow with the images, and
    neither batches nor devices change the scores.

    Args:
        batches: {"image": uint8 (b, h, w, 3), "mask": (b,)}, zero for padding, and
            what `versions` reads.
        rows: How the rows of a batch are laid out.
        versions: Maps a batch on the devices to (key, images (b, h, w, 3) in [0, 1]),
            one after the other.
        score: (uint8 images, reconstructions) -> scores (b,) by name.
        networks: Features for Frechet distances.
        references: Measured reference by the network's name; where it is missing, the
            images themselves are the reference.
        progress: Called with the number of images just done.

    Returns:
        Means of the scores and distances ("rfid_50k") by key, with "num_images".
    """
    networks, references = tuple(networks), dict(references or {})
    real = {n.name: quality.Collector(n, "the images") for n in networks}
    real = {k: v for k, v in real.items() if k not in references}
    means: dict[Any, reconstruction.ReconstructionScores] = {}
    sets: dict[tuple[Any, str], quality.Collector] = {}
    for batch in batches:
        arrays = loader.to_global(dict(batch), rows)
        mask = distributed.to_host(arrays["mask"])
        for collector in real.values():
            _collect(collector, arrays["image"], mask)
        for key, recon in versions(arrays):
            values = distributed.to_host(score(arrays["image"], recon))
            before = means.get(key, reconstruction.ReconstructionScores())
            means[key] = before.add(values, mask)
            for network in networks:
                name = (key, network.name)
                if name not in sets:
                    sets[name] = quality.Collector(network, "the reconstructions")
                _collect(sets[name], reconstruction.to_uint8(recon), mask)
        progress(int(np.count_nonzero(mask)))
    references |= {name: collector.finish() for name, collector in real.items()}
    found = {}
    for key, mean in means.items():
        measured = (c.finish() for (k, _), c in sets.items() if k == key)
        distances = [
            quality.compare(m, references[m.extractor], prefix="r", full=False)
            for m in measured
        ]
        found[key] = _joined(mean, distances)
    return found


def array_batches(
    parts: Iterable[np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Makes batches of `batch_size` as the loader's from uint8 images of a stream.

    Copies of the last image fill the last batch and are masked out.
    """
    start = 0
    for part in parts:
        count = len(part)
        row = np.minimum(np.arange(batch_size), count - 1)
        yield {
            "image": part[row],
            "index": (start + row).astype(np.int32),
            "mask": (np.arange(batch_size) < count).astype(np.float32),
        }
        start += count


def _collect(collector: quality.Collector, images: jax.Array, mask: np.ndarray) -> None:
    if jax.process_count() == 1:  # In the network's own batches, which are small.
        collector.add(np.asarray(images)[mask != 0])
    else:
        features = collector.extractor(images)
        collector.add_features(distributed.to_host(features), mask)


def _joined(
    mean: reconstruction.ReconstructionScores, distances: list[quality.Result]
) -> quality.Result:
    scores = mean.means() | {"num_images": mean.count}
    notes: list[str] = []
    for result in distances:
        scores |= result.scores
        notes += [note for note in result.notes if note not in notes]
    return quality.Result(scores, tuple(notes))
