"""ArrayRecord shards of encoded images, and the metadata file beside them."""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def shard_names(count: int) -> list[str]:
    """Returns the file names of `count` shards, in order."""
    return [f"images-{k:05d}-of-{count:05d}.array_record" for k in range(count)]


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


def read_metadata(folder: Path) -> dict[str, Any]:
    """Returns the metadata that `rae-jax prepare` writes after the last shard.

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
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `rae-jax prepare` ({FORMAT}).")
    return metadata
