"""ArrayRecord shards of encoded images, and the metadata file beside them."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
from array_record.python import array_record_module

from rae_jax import copies, storage

METADATA = "metadata.json"
FORMAT = "rae_jax-images-1"

_HEADER = struct.Struct("<iH")  # label, length of the name


def pack(image: bytes, label: int, name: str) -> bytes:
    """Returns one record: an encoded image, its label and where it came from."""
    encoded = name.encode()
    return _HEADER.pack(label, len(encoded)) + encoded + image


def unpack(record: bytes) -> dict[str, Any]:
    """Returns "image" (encoded bytes), "label" and "name" of one record."""
    label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    name = record[_HEADER.size : start].decode()
    return {"image": record[start:], "label": label, "name": name}


def shard_names(count: int, prefix: str = "images") -> list[str]:
    """Returns the file names of `count` shards, in order."""
    return [f"{prefix}-{k:05d}-of-{count:05d}.array_record" for k in range(count)]


def write_shard(path: Path, packed: Iterable[bytes]) -> int:
    """Writes records to a file that appears under its name only when complete.

    Returns:
        The number of records.

    Raises:
        OSError: The destination is full or cannot be written.
    """
    if storage.is_bucket(path):
        with storage.writing(path) as file:  # The library writes to disks alone.
            return write_shard(file, packed)
    unfinished = path.with_name(path.name + ".partial")
    # Encoded images do not compress; groups of one are read at random fastest.
    writer = array_record_module.ArrayRecordWriter(
        str(unfinished), "group_size:1,uncompressed"
    )
    count = 0
    try:
        for record in packed:
            writer.write(record)
            count += 1
        writer.close()
    except RuntimeError as error:  # What the writer raises for any failed write.
        raise OSError(f"cannot read or write: {error}") from None
    if not unfinished.exists():
        raise OSError(f"cannot read or write: {unfinished} could not be created")
    os.replace(unfinished, path)
    return count


def are_remote(folder: Path) -> bool:
    """Returns whether shards of a folder are read over a network; see `open_shards`."""
    return storage.is_bucket(folder) and not os.fspath(folder).startswith("s3://")


def open_shards(
    folder: Path, counts: Mapping[str, int]
) -> grain.sources.ArrayRecordDataSource:
    """Opens shards for random access, as one sequence of records.

    Those in gs:// are read there, those in s3:// are copied to the cache first, which
    the library cannot read.

    Args:
        folder: Where they are.
        counts: The names of the files and how many records each holds.

    Raises:
        ValueError: A file is missing or damaged, or holds another number.
        OSError: The bucket cannot be read, or the disk has no room for the copies.
    """
    names = [name for name, count in counts.items() if count]
    there = set(storage.names_in(folder)[1])
    missing = [name for name in names if name not in there]
    if missing:
        others = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        shown = ", ".join(map(repr, missing[:5]))
        raise ValueError(f"{folder} lacks {shown}{others}; prepare it again.")
    paths = [folder / name for name in names]
    if storage.is_bucket(folder) and not are_remote(folder):
        paths = copies.local_files(folder, names)
    try:
        found = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        length = len(found)
    except (RuntimeError, ValueError) as error:
        damaged = [n for n, path in zip(names, paths, strict=True) if not _opens(path)]
        which = f"{folder / damaged[0]}" if damaged else f"A shard in {folder}"
        raise ValueError(f"{which} is damaged; prepare it again. {error}") from None
    expected = sum(counts.values())
    if length != expected:
        raise ValueError(
            f"{folder} has {length} records, but {METADATA} counts {expected}; "
            "prepare it again."
        )
    return found


def _opens(path: Path) -> bool:
    try:
        array_record_module.ArrayRecordReader(str(path)).close()
    except (RuntimeError, ValueError):
        return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears under its name only when complete.

    Raises:
        OSError: The destination is full or cannot be written.
    """
    storage.write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is damaged.
    """
    try:
        return json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from None


def read_metadata(folder: Path, kind: str = FORMAT) -> dict[str, Any]:
    """Returns the metadata that `rae-jax prepare` writes after the last shard.

    Args:
        folder: Where the shards are.
        kind: The format that they must have.

    Raises:
        ValueError: The file is missing, damaged or of another format.
    """
    path = folder / METADATA
    try:
        metadata = read_json(path)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(
            f"{folder} has no {METADATA}. `rae-jax prepare` writes it last: if it "
            "was interrupted, run the same command again to finish."
        ) from None
    if not isinstance(metadata, dict) or metadata.get("format") != kind:
        raise ValueError(f"{path} was not written by `rae-jax prepare` ({kind}).")
    return metadata
