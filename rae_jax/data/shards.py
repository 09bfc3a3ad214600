"""Writing many files in a way that an interrupted run continues.

A run begins with its plan; every finished file leaves a note; the metadata comes last.
So a folder without metadata is unfinished, and what was finished is not done again.
"""

import dataclasses
import math
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from rae_jax import storage
from rae_jax.data import records

IMAGES_PER_SHARD = 2048
MAX_SHARDS = 1024

_UNFINISHED = "unfinished"  # subfolder with the state of a run
_READERS = 16  # Notes that are read at a time: each may be a request.


@dataclasses.dataclass(frozen=True)
class Shard:
    """One task: the images [start, stop) of a source become one file."""

    path: Path
    done: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of images."""
        return self.stop - self.start


def shard_count(num_images: int, asked: int | None = None) -> int:
    """Returns the number of shards: as asked, or enough to resume and to share."""
    by_size = min(MAX_SHARDS, math.ceil(num_images / IMAGES_PER_SHARD))
    return min(asked or by_size, num_images)


def tasks(folder: Path, total: int, count: int, prefix: str = "images") -> list[Shard]:
    """Returns the tasks that `total` images in `count` files come to."""
    state = folder / _UNFINISHED
    bounds = [round(k * total / count) for k in range(count + 1)]
    return [
        Shard(folder / name, state / f"{name}.json", bounds[k], bounds[k + 1])
        for k, name in enumerate(records.shard_names(count, prefix))
    ]


def unfinished(tasks: Sequence[Shard]) -> list[Shard]:
    """Returns those of a run's tasks that have left no note.

    Raises:
        OSError: The bucket cannot be read.
    """
    there: set[str] = set()
    if tasks and storage.kind(tasks[0].done.parent) == "folder":
        there.update(storage.names_in(tasks[0].done.parent)[1])
    return [task for task in tasks if task.done.name not in there]


def notes(tasks: Sequence[Shard]) -> dict[str, Any]:
    """Returns what the notes of finished tasks say, by the names of their files.

    Raises:
        ValueError: A note is damaged.
        OSError: One cannot be read.
    """
    with futures.ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda task: records.read_json(task.done), tasks))
    return {task.path.name: note for task, note in zip(tasks, found, strict=True)}


def has_metadata(folder: Path) -> bool:
    """Returns whether a folder holds a finished result, of whatever plan."""
    return bool(storage.kind(folder / records.METADATA))


def is_complete(folder: Path, plan: dict[str, Any]) -> bool:
    """Returns whether a folder holds the result of just this plan.

    Raises:
        ValueError: It holds that of another plan.
    """
    if not has_metadata(folder):
        return False
    check_same(folder, plan, records.read_metadata(folder, plan["format"]))
    return True


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Stores the plan of a run, or compares it with that of the run to continue."""
    path = folder / _UNFINISHED / "plan.json"
    if storage.kind(path):
        check_same(folder, plan, records.read_json(path))
    records.write_json(path, plan)


def forget(folder: Path) -> None:
    """Deletes the state of a run, once its result is complete."""
    storage.remove_tree(folder / _UNFINISHED)


def check_same(folder: Path, plan: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raises a ValueError that names what differs between two plans."""
    changed = [key for key, value in plan.items() if earlier.get(key) != value]
    if changed:
        raise ValueError(
            f"{folder} was prepared with other {', '.join(changed)}. Delete it, choose "
            "another destination, or repeat the earlier options to resume."
        )
