"""Batches of a source: shuffled without end for training, in order for evaluation.

Batch k of a run is a function of the source, the transform, the seed and k alone. So
neither the number of workers nor the number of processes changes what is seen, and
the position of a run is one number.
"""

import gc
import math
import os
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Self

import grain
import jax
import numpy as np
from absl import flags

from rae_jax.data import sources, transforms

Batch = dict[str, np.ndarray]

_WAITING_THREADS = 8  # Of a process; each makes a batch of its own.


def train_batches(
    source: sources.Source,
    transform: transforms.Transform,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    start: int = 0,
) -> "Batches":
    """Returns this process's rows of endless shuffled batches.

    Every epoch has its own order and shows each image once; batches may span epochs.

    Args:
        source: The images.
        transform: See `transforms.make_transform`.
        batch_size: Rows of the global batch, b times the number of processes.
        seed: Determines the order, the crops and the flips; 0 to 2**32 - 1.
        num_workers: Worker processes that decode; 0 for threads of this process.
        process_index: Which rows to return; defaults to JAX's, as does the next.
        process_count: Among how many processes the rows are shared.
        start: The batch to begin with.

    Returns:
        An iterator over {"image": uint8 (b, h, w, 3), "label": int32 (b,), "index":
        int64 (b,), the position in the source}.
    """
    rows, share = _share(source, batch_size, process_index, process_count)
    examples = (
        grain.MapDataset.range(len(source))
        .shuffle(seed=seed)
        .map(partial(_read, source))
        .random_map(transform, seed=seed)
        .repeat()
    )
    # Dealing runs of rows to the processes in turn cuts global batches evenly.
    batches = examples.batch(rows)[share]
    return Batches(batches, num_workers=num_workers, start=start, waits=_waits(source))


def eval_batches(
    source: sources.Source,
    transform: transforms.Transform,
    *,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    seed: int = 0,
) -> "Batches":
    """Returns this process's rows of one pass through the source, in order.

    Copies of the last image fill the last batch; all processes get as many batches.

    Args:
        source: The images.
        transform: See `transforms.make_transform`.
        batch_size: Rows of the global batch, over all processes.
        num_workers: Worker processes that decode; 0 for threads of this process.
        limit: Number of images to show; all of them if None.
        process_index: Which rows to return; defaults to JAX's, as does the next.
        process_count: Among how many processes the rows are shared.
        seed: Determines the crops and flips of random transforms.

    Returns:
        An iterator over batches as from `train_batches`, with "mask": float32 (b,),
        1 for images and 0 for copies.
    """
    rows, share = _share(source, batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive or None, got {limit}.")
    count = min(len(source), limit or len(source))
    examples = (
        grain.MapDataset.range(math.ceil(count / batch_size) * batch_size)
        .map(partial(_read_or_pad, source, count))
        .random_map(transform, seed=seed)
    )
    batches = examples.batch(rows)[share]
    return Batches(batches, num_workers=num_workers, waits=_waits(source))


class Batches(Iterator[Batch]):
    """An iterator over batches that are prepared ahead, with a position to save.

    Use it in a `with` statement or call `close`, which ends its threads and workers.

    Args:
        batches: All of them, by position.
        num_workers: See `train_batches`.
        start: The batch to begin with.
        waits: Whether examples come over a network, so that more of them are asked for
            at a time than there are cores.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        *,
        num_workers: int,
        start: int = 0,
        waits: bool = False,
    ):
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}.")
        self._batches = batches
        self._num_workers, self._waits = num_workers, waits
        self._running: list[grain.DatasetIterator] = []  # At most one.
        # Also at exit and when forgotten: left to themselves, workers leak.
        weakref.finalize(self, _end, self._running)
        self.set_state({"batches": start})

    def __next__(self) -> Batch:
        if self._position >= len(self._batches):
            self.close()
            raise StopIteration
        if not self._running:
            self._running.append(self._start())
        try:
            batch = next(self._running[0])
        except Exception:
            self.close()  # Trying again must not skip the batch.
            raise
        self._position += 1
        if not self._num_workers:
            return batch
        # Workers pass batches in shared memory, which must not outlive them.
        return {key: np.array(rows) for key, rows in batch.items()}

    def get_state(self) -> dict[str, int]:
        """Returns the position, the number of batches so far, for a checkpoint."""
        return {"batches": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues as if exactly the batches before the position had been taken."""
        if state["batches"] < 0:
            raise ValueError(f"A position must not be negative, got {state}.")
        self.close()
        self._position = int(state["batches"])

    def close(self) -> None:
        """Ends the threads and worker processes; the next batch starts them anew."""
        _end(self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _start(self) -> grain.DatasetIterator:
        # Whole batches are the unit of work, so that the number of threads and
        # workers cannot change their content. Pillow works outside Python's lock.
        threads = 2 if self._num_workers else min(8, os.cpu_count() or 1)
        threads = _WAITING_THREADS if self._waits else threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        batches = self._batches[self._position :].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags.
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(self._num_workers)
            batches = batches.mp_prefetch(workers)
        return iter(batches)


def _end(running: list[grain.DatasetIterator]) -> None:
    if running:
        running.pop().close()
        # Grain keeps the last batches, and so shared memory, in reference cycles.
        gc.collect()


def to_global(batch: Batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Joins the rows of all processes to arrays over all devices.

    Args:
        batch: This process's rows.
        sharding: How the leading axis is laid out; the same for all entries.
    """
    return {
        # Device indices are 32-bit, as JAX is used here; sources are smaller.
        key: jax.make_array_from_process_local_data(
            sharding, rows.astype(np.int32) if rows.dtype == np.int64 else rows
        )
        for key, rows in batch.items()
    }


def _share(
    source: sources.Source,
    batch_size: int,
    process_index: int | None,
    process_count: int | None,
) -> tuple[int, slice]:
    """Returns the rows per process, and which runs of so many rows are its own."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise ValueError(f"process_index must be in [0, {count}), got {index}.")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {count} processes, "
            f"got {batch_size}."
        )
    if not len(source):
        raise ValueError("The data source is empty.")
    return batch_size // count, slice(index, None, count)


def _waits(source: sources.Source) -> bool:
    return getattr(source, "waits", False)


def _read(source: sources.Source, index: int) -> dict[str, Any]:
    record = source[index]
    return record | {"label": np.int32(record["label"]), "index": np.int64(index)}


def _read_or_pad(source: sources.Source, count: int, index: int) -> dict[str, Any]:
    record = _read(source, min(index, count - 1))
    return record | {"mask": np.float32(index < count)}
