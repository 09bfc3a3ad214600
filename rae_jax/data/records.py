"""ArrayRecord shards of encoded images, and the metadata file beside them."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
from array_record.python import array_record_module

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


def partial(path: Path) -> Path:
    """Returns the name that a file has while it is written."""
    return path.with_name(path.name + ".partial")


def write_shard(path: Path, packed: Iterable[bytes]) -> int:
    """Writes records to a file that appears under its name only when complete.

    Returns:
        The number of records.

    Raises:
        OSError: The destination is full or cannot be written.
    """
    unfinished = partial(path)
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
        raise OSError(str(error)) from None
    if not unfinished.exists():
        raise OSError(f"{unfinished} could not be created")
    os.replace(unfinished, path)
    return count


def open_shards(
    folder: Path, counts: Mapping[str, int]
) -> grain.sources.ArrayRecordDataSource:
    """Opens shards for random access, as one sequence of records.

    Args:
        folder: Where they are.
        counts: The names of the files and how many records each holds.

    Raises:
        ValueError: A file is missing or damaged, or holds another number.
    """
    names = [name for name, count in counts.items() if count]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        shown = ", ".join(map(repr, missing[:5]))
        raise ValueError(f"{folder} lacks {shown}{others}; prepare it again.")
    paths = [str(folder / name) for name in names]
    try:
        found = grain.sources.ArrayRecordDataSource(paths)
        length = len(found)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"A shard is damaged; prepare it again. {error}") from None
    expected = sum(counts.values())
    if length != expected:
        raise ValueError(
            f"{folder} has {length} records, but {METADATA} counts {expected}; "
            "prepare it again."
        )
    return found


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears under its name only when complete."""
    partial(path).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial(path), path)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
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
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {METADATA}. `rae-jax prepare` writes it last: if it "
            "was interrupted, run the same command again to finish."
        )
    metadata = read_json(path)
    if not isinstance(metadata, dict) or metadata.get("format") != kind:
        raise ValueError(f"{path} was not written by `rae-jax prepare` ({kind}).")
    return metadata
