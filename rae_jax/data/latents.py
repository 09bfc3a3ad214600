"""Cached latents: ArrayRecord shards of what a frozen encoder makes of images.

Image i of a data set is record i, or with mirror images the records 2 i (as it is)
and 2 i + 1 (mirrored), so that only the one that is used is read.
"""

import dataclasses
import io
import itertools
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np

from rae_jax import storage
from rae_jax.data import records, shards, transforms

FORMAT = "rae_jax-latents-1"
LABELS = "labels.npy"
DTYPE = np.dtype(ml_dtypes.bfloat16)
FLIPS = ("never", "random", "both")

_HEADER = struct.Struct("<qii")  # index of the image, its label, 1 if mirrored

# Of one image: the label and (h, w, m) for each variant.
Row = tuple[int, list[np.ndarray]]
# The latents of images with these indices, in this order; one range per shard.
Encode = Callable[[list[np.ndarray]], Iterator[Row]]
Progress = Callable[[int], None]  # called with the number of images just done


def num_bytes(num_images: int, shape: tuple[int, ...], flip: bool) -> int:
    """Returns how much space latents of a shape take on a disk."""
    record = _HEADER.size + math.prod(shape) * DTYPE.itemsize
    return num_images * (1 + flip) * record


class Latents:
    """Latents that `rae-jax prepare --latents` wrote, in the order of the images.

    Item i tells the label and `position`; `Choose` reads the latent itself.

    Raises:
        ValueError: The folder, shards or metadata are missing or do not agree.
        OSError: The bucket cannot be read, or there is no room for copies of it.
    """

    def __init__(self, path: str | Path):
        self.folder = folder = storage.path(path).expanduser()
        if storage.kind(folder) != "folder":
            raise ValueError(
                f"{path} does not exist; `rae-jax prepare --latents {path} --config "
                "FILE.py:VARIANT` makes it."
            )
        self.metadata = records.read_metadata(folder, FORMAT)
        self.class_names = tuple(self.metadata["class_names"])
        self.shape = tuple(self.metadata["shape"])
        self.flip = self.metadata["flip"]
        variants = 1 + self.flip
        counts = {name: n * variants for name, n in self.metadata["shards"].items()}
        self.waits = records.are_remote(folder)
        self._records = records.open_shards(folder, counts)
        self._labels = _read_labels(folder, sum(self.metadata["shards"].values()))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"position": index, "label": int(self._labels[index])}

    def latent(self, index: int, mirrored: bool = False) -> np.ndarray:
        """Reads one latent, bfloat16 (h, w, m).

        Raises:
            ValueError: The record is not that of the image, or of another size.
        """
        record = self._records[index * (1 + self.flip) + mirrored]
        size = _HEADER.size + math.prod(self.shape) * DTYPE.itemsize
        found = _HEADER.unpack_from(record)
        if len(record) != size or found != (index, self._labels[index], mirrored):
            raise ValueError(
                f"{self.folder} is damaged: the record of image {index} holds "
                f"{len(record)} bytes (expected {size}) of image {found[0]}. Delete "
                "the folder and prepare it again."
            )
        values = np.frombuffer(record, DTYPE, offset=_HEADER.size)
        return values.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Choose(grain.transforms.RandomMap):
    """Reads the latent of a record, of the image or of its mirror image.

    Attributes:
        source: The latents.
        flip: "never"; "random" as `transforms.Transform` draws it, so that the same
            seed mirrors the same images; or "both", stacked in this order.
    """

    source: Latents
    flip: str = "never"

    def __post_init__(self):
        if self.flip not in FLIPS:
            raise ValueError(f"Unknown flip {self.flip!r}; choose from {list(FLIPS)}.")
        if self.flip != "never" and not self.source.flip:
            raise ValueError(
                f"{self.source.folder} holds no latents of mirror images. Prepare it "
                "again with data.flip=True, or do without them (data.flip=False, "
                "both_orientations=False)."
            )

    def random_map(
        self, record: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Returns the record with "latent" as bfloat16 (h, w, m) or (2, h, w, m)."""
        record = dict(record)
        index = record.pop("position")
        if self.flip == "both":
            latents = [self.source.latent(index, mirrored) for mirrored in (0, 1)]
            return record | {"latent": np.stack(latents)}
        mirrored = self.flip == "random" and transforms.draws_flip(rng)
        return record | {"latent": self.source.latent(index, mirrored)}


def write(
    folder: Path, plan: dict[str, Any], encode: Encode, progress: Progress
) -> dict[str, Any]:
    """Writes latents as shards; finished shards of an earlier call are kept.

    Args:
        folder: Destination; made if it does not exist.
        plan: The metadata, without "shards", but with "format", "num_images",
            "num_shards", "shape" and "flip".
        encode: Makes the latents; called once.
        progress: Called as images are done.

    Returns:
        The metadata.

    Raises:
        ValueError: The destination was begun with another plan.
        OSError: The destination is full or cannot be written.
    """
    if shards.is_complete(folder, plan):
        progress(plan["num_images"])
    else:
        shards.begin(folder, plan)
        todo = unfinished(folder, plan)
        progress(plan["num_images"] - sum(task.size for task in todo))
        rows = encode([np.arange(task.start, task.stop) for task in todo])
        for task in todo:
            _write_shard(task, plan, itertools.islice(rows, task.size), progress)
        _finish(folder, plan)
    shards.forget(folder)
    return records.read_metadata(folder, FORMAT)


def unfinished(folder: Path, plan: dict[str, Any]) -> list[shards.Shard]:
    """Returns the shards of a plan that are still to be written."""
    if shards.has_metadata(folder):
        return []
    return shards.unfinished(_tasks(folder, plan))


def _tasks(folder: Path, plan: dict[str, Any]) -> list[shards.Shard]:
    return shards.tasks(folder, plan["num_images"], plan["num_shards"], "latents")


def _write_shard(
    task: shards.Shard, plan: dict[str, Any], rows: Iterator[Row], progress: Progress
) -> None:
    labels: list[int] = []
    shape = (1 + plan["flip"], *plan["shape"])

    def packed() -> Iterator[bytes]:
        for index, (label, variants) in enumerate(rows, task.start):
            found = np.shape(variants)
            if found != shape:
                raise ValueError(f"Latents have shape {found}, expected {shape}.")
            for mirrored, latent in enumerate(variants):
                header = _HEADER.pack(index, label, mirrored)
                yield header + np.asarray(latent, DTYPE).tobytes()
            labels.append(label)
            progress(1)

    records.write_shard(task.path, packed())
    if len(labels) != task.size:
        raise ValueError(f"{task.path.name}: {len(labels)} of {task.size} latents.")
    records.write_json(task.done, {"labels": labels})


def _finish(folder: Path, plan: dict[str, Any]) -> None:
    notes = shards.notes(_tasks(folder, plan))
    labels = [label for note in notes.values() for label in note["labels"]]
    with storage.writing(folder / LABELS) as path:
        np.save(path, np.asarray(labels, np.int32))
    counts = {name: len(note["labels"]) for name, note in notes.items()}
    records.write_json(folder / records.METADATA, plan | {"shards": counts})


def _read_labels(folder: Path, count: int) -> np.ndarray:
    path = folder / LABELS
    try:
        labels = np.load(io.BytesIO(storage.read_bytes(path)))
    except FileNotFoundError:
        labels = np.zeros(0, np.int32)
    if len(labels) != count:
        raise ValueError(
            f"{path} has {len(labels)} labels, but {records.METADATA} counts {count} "
            "images; delete the folder and prepare it again."
        )
    return labels
