"""Turning a folder of images into shards or a packed array, in parallel."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rae_jax import storage
from rae_jax.data import folders, images, records, shards, sources, transforms

PACK_LIMIT = 50_000  # Images of a packed reference, as in the official code.
CHUNK = 32  # images per task of a packed array
_READERS = 8  # Images that each process reads from a bucket at a time.

Progress = Callable[[int], None]  # called with the number of images just done


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What becomes of each image.

    Attributes:
        size: Side of a crop, or the most pixels that the shorter side keeps; None
            keeps the encoded file as it is.
        transform: "center_crop" or "none".
        quality: JPEG quality of changed images; None for PNG.
        skip_bad: Whether to leave out unreadable files instead of stopping.
    """

    size: int | None = None
    transform: str = "none"
    quality: int | None = 95
    skip_bad: bool = False

    def pixels(self, record: dict[str, Any]) -> np.ndarray:
        """Returns the decoded and resized image of a record."""
        picture = images.open_rgb(record["image"], record["name"])
        if self.transform == "center_crop":
            return transforms.center_crop(picture, self.size)
        image = np.array(picture)
        if self.size is not None and min(image.shape[:2]) > self.size:
            return transforms.resize_shorter(image, self.size)
        return image

    def encoded(self, record: dict[str, Any]) -> bytes:
        """Returns the image to store; decoding shows that the file can be read."""
        pixels = self.pixels(record)
        if self.size is None:
            return record["image"]
        return images.encode(pixels, self.quality)


class Tree:
    """All images below a folder, sorted by their whole paths, without labels.

    The order and choice of the official packing script; for folders of classes it is
    that of `sources.ClassFolder` unless one class's name begins another's.

    Raises:
        ValueError: There are no images, or no such folder.
    """

    class_names = ("image",)
    num_classes = 1

    def __init__(self, path: str | Path):
        self.root = folders.existing(path, "images")
        self._files = folders.images_below(self.root)
        if not self._files:
            raise ValueError(
                f"{path} holds no images of type {', '.join(images.EXTENSIONS)}, "
                "directly or in its folders."
            )

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Returns the path of one image relative to the folder."""
        return self._files[index]

    def __getitem__(self, index: int) -> sources.Record:
        return folders.read(self.root, self._files[index], 0)


Source = sources.Folder | Tree


class _BadImages(Exception):
    """Images that could not be read, and why, by index."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__()
        self.reasons = reasons


def write_shards(
    source: Source,
    folder: Path,
    recipe: Recipe,
    *,
    num_shards: int | None = None,
    workers: int = 1,
    progress: Progress = lambda count: None,
) -> dict[str, Any]:
    """Writes a source as shards; finished shards of an earlier call are kept.

    Shards keep the order of the source, and `metadata.json` is written last.

    Args:
        folder: Destination; made if it does not exist.
        num_shards: Number of files; see `shards.shard_count`.
        workers: Number of processes.
        progress: Called as images are done.

    Returns:
        The metadata: "shards" (images per file), "skipped" (reasons) and more.

    Raises:
        BadImageError: A file cannot be read and the recipe does not skip it.
        ValueError: The destination was begun with another source or recipe.
        OSError: The destination is full or cannot be written.
    """
    plan = _plan(source, recipe, shards.shard_count(len(source), num_shards))
    if shards.is_complete(folder, plan):
        progress(len(source))
    else:
        shards.begin(folder, plan)
        tasks = shards.tasks(folder, len(source), plan["num_shards"])
        todo = shards.unfinished(tasks)
        progress(len(source) - sum(task.size for task in todo))
        for task in _parallel(_write_shard, todo, workers, source, recipe):
            progress(task.size)
        _finish(folder, plan, tasks)
    shards.forget(folder)
    return records.read_metadata(folder)


def write_pack(
    source: Source,
    path: Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    limit: int | None = None,
    progress: Progress = lambda count: None,
) -> list[str]:
    """Writes images as one array, uint8 (n, size, size, 3), in the source's order.

    The file is an uncompressed .npz with the array "arr_0", as ADM's evaluator and
    the official RAE code use for references of rFID. It is written image by image, so
    it need not fit into memory. Take a `Tree` for the official order.

    Returns:
        Why each skipped file could not be read.
    """
    indices = list(range(min(len(source), limit or len(source))))
    skipped: dict[int, str] = {}
    while True:
        chosen = [index for index in indices if index not in skipped]
        if not chosen:
            raise ValueError(f"None of the {len(indices)} images could be read.")
        try:
            with storage.writing(path) as file:
                _write_npz(source, file, recipe, chosen, workers, progress)
        except _BadImages as found:
            # The array's header tells its length, so it is written anew without them.
            skipped |= found.reasons
            progress(-len(chosen))
        else:
            return list(skipped.values())


def _plan(source: Source, recipe: Recipe, count: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.name(index)}\n".encode())
    return {
        "format": records.FORMAT,
        "class_names": list(source.class_names),
        "source_files": len(source),
        "source_digest": digest.hexdigest(),
        "num_shards": count,
        "size": recipe.size,
        "transform": recipe.transform,
        "quality": recipe.quality,
    }


def _finish(folder: Path, plan: dict[str, Any], tasks: list[shards.Shard]) -> None:
    results = shards.notes(tasks)
    counts = {name: result["count"] for name, result in results.items()}
    if not any(counts.values()):
        raise ValueError(f"None of the {tasks[-1].stop} images could be read.")
    skipped = [line for result in results.values() for line in result["skipped"]]
    metadata = plan | {
        "num_images": sum(counts.values()),
        "shards": counts,
        "skipped": skipped,
    }
    records.write_json(folder / records.METADATA, metadata)


# Set once per process: a source may list millions of files.
_shared: tuple[Source, Recipe]


def _parallel(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    workers: int,
    source: Source,
    recipe: Recipe,
) -> Iterator[Any]:
    """Yields function(task) in order, computed a little ahead by several processes."""
    if workers <= 1:
        _set_shared(source, recipe)
        yield from map(function, tasks)
        return
    executor = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(source, recipe),
    )
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for task in tasks:
            pending.append(executor.submit(function, task))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _set_shared(source: Source, recipe: Recipe) -> None:
    global _shared
    _shared = (source, recipe)


def _start_worker(source: Source, recipe: Recipe) -> None:
    _set_shared(source, recipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends us in good order.
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)  # A killed parent must not leave us writing to its files.

    threading.Thread(target=follow, daemon=True).start()


def _write_shard(task: shards.Shard) -> shards.Shard:
    source, recipe = _shared
    skipped: list[str] = []

    def packed() -> Iterator[bytes]:
        indices = range(task.start, task.stop)
        for index, record in zip(indices, _read(source, indices), strict=True):
            try:
                image = recipe.encoded(record)
            except images.BadImageError as error:
                if not recipe.skip_bad:
                    raise
                skipped.append(_reason(source, index, error))
                continue
            yield records.pack(image, record["label"], source.name(index))

    count = records.write_shard(task.path, packed())
    records.write_json(task.done, {"count": count, "skipped": skipped})
    return task


def _write_npz(
    source: Source,
    path: Path,
    recipe: Recipe,
    indices: list[int],
    workers: int,
    progress: Progress,
) -> None:
    """Writes the images; if some cannot be read, the array is of no use.

    Raises:
        _BadImages: Some were to be skipped.
    """
    shape = (len(indices), recipe.size, recipe.size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    chunks = [indices[k : k + CHUNK] for k in range(0, len(indices), CHUNK)]
    bad: dict[int, str] = {}
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for rows in _parallel(_crop, chunks, workers, source, recipe):
            bad |= {index: row for index, row in rows.items() if isinstance(row, str)}
            if not bad:
                file.write(b"".join(rows.values()))
            progress(len(rows))
    if bad:
        raise _BadImages(bad)


def _crop(indices: list[int]) -> dict[int, bytes | str]:
    """Returns the bytes of each cropped image, or why it could not be read."""
    source, recipe = _shared
    rows: dict[int, bytes | str] = {}
    for index, record in zip(indices, _read(source, indices), strict=True):
        try:
            rows[index] = recipe.pixels(record).tobytes()
        except images.BadImageError as error:
            if not recipe.skip_bad:
                raise
            rows[index] = _reason(source, index, error)
    return rows


def _read(source: Source, indices: Sequence[int]) -> Iterator[sources.Record]:
    """Yields records in order; those of a bucket are read a little ahead."""
    if not storage.is_bucket(source.root):
        yield from map(source.__getitem__, indices)
        return
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        try:
            for index in indices:
                pending.append(pool.submit(source.__getitem__, index))
                if len(pending) > 2 * _READERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _reason(source: Source, index: int, error: images.BadImageError) -> str:
    return f"{source.name(index)}: {error.reason}"
