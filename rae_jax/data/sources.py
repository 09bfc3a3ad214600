"""Random-access image collections.

A source has a length, `num_classes` and `class_names`; item i is a record with
"image" (encoded bytes or uint8 (h, w, 3)), "label" and "name". Where `waits` is true,
items come over a network.
"""

import difflib
import fnmatch
import glob
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rae_jax import storage
from rae_jax.data import digits, folders, images, photos, records

Record = dict[str, Any]


class Source(Protocol):
    """What every image collection offers."""

    class_names: tuple[str, ...]
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class ClassFolder:
    """Images in one folder per class; the label is the rank of the folder's name.

    Labels and order are those of torchvision's ImageFolder, which the official code
    reads: classes sorted by name, folders inside a class sorted, files sorted. Hidden
    files and folders are left out.

    Raises:
        ValueError: The folder is not laid out so; says what was found instead.
    """

    def __init__(self, path: str | Path):
        self.root = folders.existing(path, "<class name>/<image>.jpg")
        self.waits = storage.is_bucket(self.root)
        found = folders.images_by_class(self.root)
        if not found:
            raise ValueError(folders.no_classes(self.root))
        self.class_names = tuple(found)
        self._files = [file for files in found.values() for file in files]
        self._labels: list[int] = []
        for label, files in enumerate(found.values()):
            self._labels += [label] * len(files)
        empty = [name for name, files in found.items() if not files]
        if empty:
            raise ValueError(
                f"{self.root}: no images in {folders.some(empty)}. Expected every "
                "folder to be a class with files of type "
                f"{', '.join(images.EXTENSIONS)}; remove the others."
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Returns the path of one image relative to the folder."""
        return self._files[index]

    def __getitem__(self, index: int) -> Record:
        return folders.read(self.root, self._files[index], self._labels[index])


class FlatFolder:
    """Images directly in one folder, sorted by name, all with label 0.

    Raises:
        ValueError: The folder has no images; says what was found instead.
    """

    class_names = ("image",)
    num_classes = 1

    def __init__(self, path: str | Path):
        self.root = folders.existing(path, "<image>.jpg")
        self.waits = storage.is_bucket(self.root)
        self._files = folders.images_in(self.root)
        if not self._files:
            raise ValueError(folders.no_images(self.root))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Returns the name of one file in the folder."""
        return self._files[index]

    def __getitem__(self, index: int) -> Record:
        return folders.read(self.root, self._files[index], 0)


class ArrayRecords:
    """Shards that `rae-jax prepare` wrote: their folder, or a glob of some of them.

    Raises:
        ValueError: Shards or their metadata are missing or do not agree.
    """

    def __init__(self, path: str | Path):
        folder, pattern = storage.path(path), "*"
        if glob.has_magic(str(path)):
            folder, pattern = folder.parent, folder.name
        folder = folders.existing(folder, "<shard>.array_record and metadata.json")
        metadata = records.read_metadata(folder)
        counts = metadata["shards"]
        names = [name for name in counts if counts[name]]
        if pattern != "*":  # Of those that are there: some may have been left out.
            there = fnmatch.filter(storage.names_in(folder)[1], pattern)
            names = [name for name in names if name in set(there)]
        if not names:
            raise ValueError(f"{path} names none of the {len(counts)} shards there.")
        self.class_names = tuple(metadata["class_names"])
        self.waits = records.are_remote(folder)
        self._records = records.open_shards(folder, {n: counts[n] for n in names})

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return records.unpack(self._records[index])


class Synthetic:
    """Smooth random colours, brighter for higher classes; image i is always the same.

    For tests and for measuring speed without a data set.
    """

    def __init__(
        self,
        num_images: int = 1024,
        image_size: int = 64,
        num_classes: int = 10,
        seed: int = 0,
    ):
        for name, value in (
            ("num_images", num_images),
            ("image_size", image_size),
            ("num_classes", num_classes),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        self.num_classes = num_classes
        self.class_names = tuple(f"class {k}" for k in range(num_classes))
        self._num_images, self._image_size, self._seed = num_images, image_size, seed

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> Record:
        label = index % self.num_classes
        rng = np.random.default_rng([self._seed, index])
        floor = round(192 * label / self.num_classes)
        coarse = rng.integers(floor, floor + 64, (4, 4, 3), dtype=np.uint8)
        size = (self._image_size, self._image_size)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)
        return {"image": np.array(image), "label": label, "name": f"synthetic {index}"}


Folder = ClassFolder | FlatFolder

SOURCES = {
    "class_folder": ClassFolder,
    "flat_folder": FlatFolder,
    "array_record": ArrayRecords,
    "photos": photos.Photos,
    "digits": digits.Digits,
    "synthetic": Synthetic,
}
_EMBEDDED = ("photos", "digits")  # Travel inside packages and are split already.

# Folder names in which data sets commonly keep a split.
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid")}


def make_source(
    name: str, *, path: str | Path = "", split: str = "train", **options: Any
) -> Source:
    """Returns an image collection by name.

    Args:
        name: One of `SOURCES`.
        path: Folder of the images, on a disk or in a bucket (gs://, s3://); with a
            subfolder "train" and "validation" or "val" the split's is read, and
            without any the folder itself is "train".
        split: "train", "validation", or "all" for the folder itself.
        options: Further arguments of the source's constructor.

    Raises:
        ValueError: A name is unknown, or the folder is not what the source reads.
        OSError: The bucket cannot be read.
        ModuleNotFoundError: The library for this kind of bucket is not installed.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Unknown data source {name!r}; choose from {list(SOURCES)}.{hint}"
        )
    if name in _EMBEDDED:
        return SOURCES[name](split, **options)
    if name == "synthetic":
        return Synthetic(**options)
    if not path:
        raise ValueError(f"The data source {name!r} needs a path.")
    return SOURCES[name](_split_folder(name, storage.path(path), split), **options)


def open_folder(path: str | Path, layout: str = "auto") -> Folder:
    """Returns a folder of images as a source.

    Args:
        path: The folder.
        layout: "class", "flat", or "auto": class if there are subfolders and no image
            beside them.
    """
    if layout == "auto":
        root = folders.existing(path, "images or class folders")
        is_flat = folders.images_in(root) or not folders.subfolders(root)
        layout = "flat" if is_flat else "class"
    if layout not in ("class", "flat"):
        raise ValueError(
            f"Unknown layout {layout!r}; choose from ['auto', 'class', 'flat']."
        )
    return ClassFolder(path) if layout == "class" else FlatFolder(path)


def _split_folder(source: str, path: Path, split: str) -> Path:
    if split == "all" or glob.has_magic(str(path)):
        return path
    if split not in _SPLIT_FOLDERS:
        choices = [*_SPLIT_FOLDERS, "all"]
        raise ValueError(f"Unknown split {split!r}; choose from {choices}.")
    for folder in (path / child for child in _SPLIT_FOLDERS[split]):
        # A class may be called "train": it holds images, a split holds classes.
        is_folder = storage.kind(folder) == "folder"
        if is_folder and (source != "class_folder" or folders.subfolders(folder)):
            return folder
    if split == "train":
        return path
    raise ValueError(
        f"{path} has no folder {' or '.join(_SPLIT_FOLDERS[split])} for the split "
        f"{split!r}. Name the folder of the split itself and set split to 'all'."
    )
