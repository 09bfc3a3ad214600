"""What lies in folders of images, on a disk or in a bucket.

Hidden files and folders count for nothing. A bucket is asked as seldom as possible: it
answers in tens of milliseconds, and lists a thousand names at a time.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_jax import storage
from rae_jax.data import images


def existing(path: str | Path, expected: str) -> Path:
    """Returns a folder as a path.

    Args:
        path: The folder.
        expected: What it should hold, for the error.

    Raises:
        ValueError: There is no such folder.
        OSError: The bucket cannot be read.
    """
    found = storage.path(path).expanduser()
    kind = storage.kind(found)
    if kind != "folder":
        problem = "is a file" if kind else "does not exist"
        raise ValueError(f"{found} {problem}; expected a folder with {expected}.")
    return found


def subfolders(root: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted."""
    if storage.is_bucket(root):
        return [name for name in storage.names_in(root)[0] if name[0] != "."]
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")


def images_in(root: Path) -> list[str]:
    """Returns the names of the images directly in a folder, sorted."""
    if storage.is_bucket(root):
        return [name for name in storage.names_in(root)[1] if _is_image(name)]
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if _is_image(e.name) and e.is_file())


def images_below(root: Path) -> list[str]:
    """Returns all images of a folder and its folders, hidden ones too, by their paths.

    They are relative to the folder and sorted as a whole.
    """
    return [f for f in storage.files_below(root) if _is_image(os.path.basename(f))]


def images_by_class(root: Path) -> dict[str, list[str]]:
    """Returns the images in and below each folder of a folder, relative to the latter.

    Classes are sorted, in each the folders, and in these the files.
    """
    if not storage.is_bucket(root):
        return {name: _images_of(root, name) for name in subfolders(root)}
    found: dict[str, list[str]] = {}
    for file in storage.files_below(root):  # One listing for all classes.
        *parents, name = file.split("/")
        if parents and not any(parent.startswith(".") for parent in parents):
            found.setdefault(parents[0], []).extend([file] if _is_image(name) else [])
    return {name: sorted(found[name], key=os.path.split) for name in sorted(found)}


def read(root: Path, file: str, label: int) -> dict[str, Any]:
    """Returns the record of an image.

    Raises:
        OSError: The file cannot be read.
    """
    path = root / file
    return {"image": storage.read_bytes(path), "label": label, "name": str(path)}


def no_classes(root: Path) -> str:
    """Returns what to say of a folder that holds no folders."""
    expected = f"{root}: expected one folder per class, <class name>/<image>.jpg, "
    if images_in(root):
        return expected + "but found images. Use the source 'flat_folder'."
    return expected + _what_else(root)


def no_images(root: Path) -> str:
    """Returns what to say of a folder that holds no images."""
    expected = f"{root}: expected images ({', '.join(images.EXTENSIONS)}), "
    if subfolders(root):
        return expected + "but found folders. Use the source 'class_folder'."
    return expected + _what_else(root)


def some(names: Sequence[str]) -> str:
    """Returns names for an error, a few of them if there are many."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(images.EXTENSIONS)


def _images_of(root: Path, name: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root / name, followlinks=True):
        folders[:] = [child for child in folders if child[0] != "."]
        found.append((folder, sorted(child for child in names if _is_image(child))))
    return [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, files in sorted(found)
        for file in files
    ]


def _what_else(root: Path) -> str:
    names = sorted(name for group in storage.names_in(root) for name in group)
    if any(name.endswith(".array_record") for name in names):
        return "but found shards. Use the source 'array_record'."
    return f"but found only {some(names)}." if names else "but the folder is empty."
