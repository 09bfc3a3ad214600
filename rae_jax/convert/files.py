"""What the readers and writers of weight files share.

Errors that name the file, foreign formats recognised by their first bytes, reading of
one span of a file, and writing that leaves either a whole file or none.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

import numpy as np

Path = str | os.PathLike[str]
# Shape and type of a tensor that is to be written.
Spec = tuple[tuple[int, ...], np.dtype]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LISTED = 8


@contextlib.contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong with a file's content into a ValueError."""
    try:
        yield
    except OSError:
        raise  # The system's message names the file already.
    except EOFError as error:
        raise ValueError(f"{os.fspath(path)}: the file is truncated") from error
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read: {error}") from error


def first_bytes(path: Path) -> bytes:
    """Returns the start of a file that may hold weights.

    Raises:
        ValueError: The file is empty, a Git LFS pointer, a web page or another text.
    """
    with errors_naming(path), open(path, "rb") as file:
        start = file.read(512)
        if not start:
            raise ValueError("the file is empty")
        if start.startswith(_LFS_POINTER):
            raise ValueError(
                "it is a Git LFS pointer, not the weights: run `git lfs pull` in its "
                "repository or download the file itself"
            )
        if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:5].lower() in (b"<!doc", b"<html"):
            raise ValueError("it is a web page (HTML), perhaps of a failed download")
        if _is_text(start):
            raise ValueError(f"it is a text file, which starts with {start[:40]!r}")
        return start


def read_span(path: Path, start: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Reads `count` entries from byte `start` on, and nothing else of the file.

    Raises:
        EOFError: The file ends before.
    """
    entries = np.empty(count, dtype)
    with open(path, "rb") as file:
        file.seek(start)
        read = file.readinto(entries.view(np.uint8).data)
    if read != entries.nbytes:
        raise EOFError
    return entries


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when the block ends well.

    Until then it lies beside it under another name; an error removes it.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checked(
    items: Iterable[tuple[str, np.ndarray]], specs: Mapping[str, Spec], path: Path
) -> Iterator[tuple[str, memoryview]]:
    """Yields name and raw little-endian bytes of each item, one at a time.

    Raises:
        ValueError: An item is not in `specs`, comes twice, or has another shape or
            type; or, at the end, items are missing. The message names the file.
    """
    missing = dict.fromkeys(specs)
    for name, array in items:
        if name not in missing:
            reason = "comes twice" if name in specs else "was not announced"
            raise ValueError(f"{os.fspath(path)}: tensor {name!r} {reason}")
        del missing[name]
        array = np.asarray(array)
        shape, dtype = specs[name]
        if array.shape != tuple(shape) or array.dtype != dtype:
            raise ValueError(
                f"{os.fspath(path)}: tensor {name!r} has shape {array.shape} and type "
                f"{array.dtype}, not {tuple(shape)} and {np.dtype(dtype)}"
            )
        yield name, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        del array
    if missing:
        raise ValueError(f"{os.fspath(path)}: no array came for {listed(missing)}")


def listed(names: Iterable[str]) -> str:
    """The names for a message, the first few of many."""
    names = [repr(name) for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _is_text(start: bytes) -> bool:
    # The last character may be cut.
    text = start.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(start) - 3:
        return False
    return bool(text) and all(char.isprintable() or char.isspace() for char in text)
