"""Files of buckets, copied to a cache for libraries that read disks alone."""

import fnmatch
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from rae_jax import storage

_LARGE = 2**30  # Bytes whose copying is worth a line.
_COPIES = 8  # Files that are copied at a time.


def local(name: str | os.PathLike[str], allow: Sequence[str] = ("*",)) -> Path:
    """Returns a file or folder on a disk with the content of `name`.

    That of a bucket is copied once to a cache (`RAE_CACHE`, default ~/.cache/rae_jax)
    and again when it has changed.

    Args:
        name: The file or folder.
        allow: Patterns of the names of files that a folder is wanted for.

    Raises:
        FileNotFoundError: There is no such file or folder, or it has no such file.
        OSError: The disk has no room for it, or the bucket cannot be read.
    """
    source = storage.path(name)
    if not storage.is_bucket(source):
        return source
    files, key = storage.system(source)
    with storage.errors_naming(source):
        found = files.find(key, detail=True)
        found = {n: x for n, x in found.items() if n == key or _matches(n, allow)}
        if not found:
            raise FileNotFoundError(f"{source} does not exist.")
    copy, size = _place(source, key, found)
    _copy(source, copy, sorted(found), size)
    return copy


def local_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Returns files of one folder as `local` does, several copied at a time.

    Raises:
        FileNotFoundError: One of them does not exist.
        OSError: The disk has no room for all, or the bucket cannot be read.
    """
    if not storage.is_bucket(folder):
        return [folder / name for name in names]
    files, key = storage.system(folder)
    with storage.errors_naming(folder):
        found = files.find(key, detail=True)
    copies = []
    for name in names:
        file = f"{key}/{name}"
        if file not in found:
            raise FileNotFoundError(f"{folder / name} does not exist.")
        copy, size = _place(folder / name, file, {file: found[file]})
        copies.append((folder / name, copy, [file], size))
    _check_room(folder, sum(size for _, copy, _, size in copies if not copy.exists()))
    with futures.ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(lambda copy: _copy(*copy), copies))
    return [copy for _, copy, _, _ in copies]


def cache() -> Path:
    """Returns the folder for what can be fetched or made again."""
    default = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(
        os.environ.get("RAE_CACHE") or os.path.join(default, "rae_jax")
    ).expanduser()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(os.path.basename(name), p) for p in patterns)


def _facts(root: str, name: str, info: dict[str, Any]) -> tuple[str, int, str]:
    """What tells one content of a file in a bucket from another."""
    marks = [info.get(key) for key in ("generation", "ETag", "etag", "md5Hash")]
    mark = next((str(value) for value in marks if value), str(info.get("mtime")))
    return name[len(root) :], int(info.get("size") or 0), mark


def _place(
    source: Path, root: str, found: dict[str, dict[str, Any]]
) -> tuple[Path, int]:
    """Returns where the cache keeps a file or folder, and its size."""
    facts = sorted(_facts(root, name, info) for name, info in found.items())
    digest = hashlib.sha256(f"{source} {facts}".encode()).hexdigest()[:20]
    place = cache() / "files" / digest / source.name
    return place, sum(fact[1] for fact in facts)


def _check_room(source: Path, size: int) -> None:
    """Refuses a copy that the disk has no room for, and announces a large one."""
    cache().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache()).free
    if free < size:
        raise OSError(
            f"{source} has {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are "
            f"free in {cache()}. Make room or set RAE_CACHE to another disk."
        )
    if size > _LARGE:
        text = f"copying {size / 1e9:.1f} GB from {source} to {cache()}"
        print(text, file=sys.stderr, flush=True)


def _copy(source: Path, copy: Path, names: list[str], size: int) -> None:
    import filelock

    files, key = storage.system(source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(copy.parent / ".lock"):  # Processes of one machine.
        if copy.exists():
            return
        _check_room(source, size)
        partial = copy.parent / "partial"
        for name in names:
            target = partial / os.path.relpath(name, key)
            target = partial if name == key else target
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage.errors_naming(source):
                files.get_file(name, os.fspath(target))
        os.replace(partial, copy)
