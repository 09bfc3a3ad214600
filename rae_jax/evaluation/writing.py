"""Generated images on disk, in constant memory, such that a killed run goes on.

An output knows from settings what it belongs to. Those of an unfinished array lie with
its rows in a hidden folder beside it, those of a finished one inside it.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rae_jax import config as configs
from rae_jax import copies, storage
from rae_jax.evaluation import pictures, streaming

SETTINGS = "settings"
LABELS_NAME = "labels.json"
_SETTINGS_NAME = ".settings.json"
_THREADS = 4

Settings = Mapping[str, Any]


class Output(Protocol):
    """Rows by index, written as they come."""

    def missing(self) -> np.ndarray:
        """Returns the indices of the rows that are still to be made, ascending."""

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Writes rows (b, ...) of these indices; those it has already are left."""

    def finish(self) -> None:
        """Puts the complete output in its place."""


class ArrayFile:
    """An .npz archive whose largest array comes row by row.

    While it is incomplete, rows are appended to an .npy file in the hidden folder
    ".NAME.partial" beside it.

    Args:
        path: The archive; replaced when the new one is complete.
        name: Name of the array.
        total: Its number of rows.
        others: The other arrays.
        settings: What the content belongs to; stored as the array "settings".

    Raises:
        ValueError: The partial array was begun with other settings.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        total: int,
        others: Mapping[str, np.ndarray],
        settings: Settings,
    ):
        self._path, self._name, self._total = path, name, total
        self._others, self._settings = others, _canonical(settings)
        self._folder = path.with_name(f".{path.name}.partial")
        self._rows = self._folder / "rows.npy"
        self._complete = _finished_settings(path) == self._settings
        self._done = total if self._complete else self._count()
        if not self._complete and self._done:
            _check_settings(self._folder, self._settings, path)

    def missing(self) -> np.ndarray:
        return np.arange(self._done, self._total)

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Appends rows; see `Output`.

        Raises:
            ValueError: They do not follow those that are there, or differ in shape.
        """
        rows = np.ascontiguousarray(rows[index >= self._done])
        if not len(rows):
            return
        if index[-len(rows)] != self._done:
            raise ValueError(f"Row {self._done} of {self._path} has been left out.")
        if not self._done:
            self._begin(rows)
        elif self._header() != (rows.shape[1:], rows.dtype):
            raise ValueError(
                f"{self._path} was begun with rows {self._header()}, now they are "
                f"{(rows.shape[1:], rows.dtype)}; delete {self._folder}."
            )
        with self._rows.open("ab") as file:
            file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())
        self._done += len(rows)

    def finish(self) -> None:
        """Streams the rows into the archive; see `Output`."""
        if self._complete:
            return
        archive = self._folder / "archive"
        text = np.asarray(json.dumps(self._settings, sort_keys=True))
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
            with self._rows.open("rb") as rows, _member(file, self._name) as member:
                shutil.copyfileobj(rows, member, 2**20)
            for name, array in {**self._others, SETTINGS: text}.items():
                with _member(file, name) as member:
                    np.lib.format.write_array(member, np.asarray(array))
        os.replace(archive, self._path)
        shutil.rmtree(self._folder)
        self._complete = True

    def _begin(self, rows: np.ndarray) -> None:
        """Writes the settings and the header of the whole array."""
        _store_settings(self._folder, self._settings)
        header = np.lib.format.header_data_from_array_1_0(rows)
        header["shape"] = (self._total, *rows.shape[1:])
        temporary = self._folder / "header"
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
        os.replace(temporary, self._rows)

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        return self._read_header()[:2]

    def _read_header(self) -> tuple[tuple[int, ...], np.dtype, int]:
        with self._rows.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return shape[1:], dtype, file.tell()

    def _count(self) -> int:
        """Returns the number of whole rows, and cuts off what follows them."""
        if not self._rows.is_file():
            return 0
        shape, dtype, start = self._read_header()
        size = int(np.prod(shape)) * dtype.itemsize
        count = min((self._rows.stat().st_size - start) // size, self._total)
        os.truncate(self._rows, start + count * size)
        return count


class Folder:
    """One PNG per index, 000123.png, with labels.json. Existing ones are kept.

    Args:
        path: The folder.
        labels: Class of every image (n,).
        settings: What the images belong to; stored as ".settings.json".

    Raises:
        ValueError: The folder has such images with other settings, or without.
    """

    def __init__(self, path: Path, labels: np.ndarray, settings: Settings):
        self._path, self._total, self._labels = path, len(labels), labels
        self._settings = _canonical(settings)
        names = {p.name for p in path.glob("*.png")} if path.is_dir() else set()
        self._existing = {i for i in range(self._total) if _png_name(i) in names}
        if self._existing and not (path / _SETTINGS_NAME).is_file():
            raise configs.ConfigError(
                f"{path} holds {_png_name(min(self._existing))} and no record of what "
                "made it; give another folder."
            )
        if self._existing:
            _check_settings(path, self._settings, path)

    def missing(self) -> np.ndarray:
        left = set(range(self._total)) - self._existing
        return np.asarray(sorted(left), np.int64)

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Writes images, and before the first what they are; see `Output`."""
        if not self._existing:
            _store_settings(self._path, self._settings)
            classes = {_png_name(i): int(y) for i, y in enumerate(self._labels)}
            text = json.dumps(classes).encode()
            storage.write_atomically(self._path / LABELS_NAME, text)
        new = [(i, row) for i, row in zip(index.tolist(), rows, strict=True)]
        new = [(i, row) for i, row in new if i not in self._existing]
        with futures.ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(self._save, new))
        self._existing |= {i for i, _ in new}

    def finish(self) -> None:
        """Nothing is left to do."""

    def _save(self, item: tuple[int, np.ndarray]) -> None:
        with storage.writing(self._path / _png_name(item[0])) as file:
            Image.fromarray(item[1]).save(file, format="PNG")


class Grid:
    """All images in one picture, which is made anew each time."""

    def __init__(self, path: Path, total: int):
        self._path, self._total = path, total
        self._rows: list[np.ndarray] = []

    def missing(self) -> np.ndarray:
        return np.arange(self._total)

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Keeps the images; see `Output`."""
        self._rows.append(rows)

    def finish(self) -> None:
        """Writes the picture; see `Output`."""
        columns = max(1, round(self._total**0.5))
        pictures.save_grid(self._path, np.concatenate(self._rows), columns)


class Uploaded:
    """An output on a disk that is copied into a bucket when it is complete.

    It lies in the cache meanwhile, so that an interrupted command goes on there; what
    the bucket has already is where it begins.

    Args:
        out: The address.
        open_here: Opens the output at a path of a disk.

    Raises:
        ConfigError: What is there was begun with other settings.
    """

    def __init__(self, out: Path, open_here: Callable[[Path], Output]):
        digest = hashlib.sha256(str(out).encode()).hexdigest()[:20]
        self._out, self._here = out, copies.cache() / "outputs" / digest / out.name
        self._here.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._here.exists()
        if is_new and out.exists():
            found = copies.local(out)
            copy = shutil.copytree if found.is_dir() else shutil.copyfile
            copy(found, self._here)
        try:
            self._output = open_here(self._here)
        except configs.ConfigError as error:
            if is_new:
                storage.remove_tree(self._here.parent)
            text = str(error).replace(str(self._here), str(out)) if is_new else error
            raise configs.ConfigError(text) from None

    def missing(self) -> np.ndarray:
        return self._output.missing()

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Keeps the rows on the disk; see `Output`."""
        self._output.add(index, rows)

    def finish(self) -> None:
        """Completes the output and copies it; see `Output`.

        Raises:
            OSError: The bucket cannot be written; the output is kept.
        """
        self._output.finish()
        if self._here.is_dir():
            storage.upload_tree(self._here, self._out)
        else:
            storage.upload(self._here, self._out)
        storage.remove_tree(self._here.parent)


def open_images(out: Path, labels: np.ndarray, settings: Settings) -> Output:
    """Returns where uint8 images (n, h, w, 3) go.

    Args:
        out: A picture (.png), an archive (.npz) as ADM's evaluator reads it, with
            "arr_0" and "labels", or a folder.
        labels: Class of every image (n,).
        settings: What the images belong to.

    Raises:
        ValueError: Something there was begun with other settings.
    """
    if storage.is_bucket(out):
        return Uploaded(out, lambda here: open_images(here, labels, settings))
    if out.suffix == ".png":
        return Grid(out, len(labels))
    if out.suffix == ".npz":
        others = {"labels": labels}
        return ArrayFile(out, streaming.ARRAY, len(labels), others, settings)
    return Folder(out, labels, settings)


def open_latents(
    out: Path, labels: np.ndarray, stats: Mapping[str, np.ndarray], settings: Settings
) -> Output:
    """Returns where normalised latents (n, h, w, c) go, with their mean and variance.

    Raises:
        ValueError: The file is no .npz, or was begun with other settings.
    """
    if out.suffix != ".npz":
        raise configs.ConfigError(f"Latents are written to an .npz file, not to {out}.")
    if storage.is_bucket(out):
        return Uploaded(out, lambda here: open_latents(here, labels, stats, settings))
    others = {"labels": labels, "mean": stats["mean"], "var": stats["var"]}
    return ArrayFile(out, "latents", len(labels), others, settings)


def _store_settings(folder: Path, settings: Settings) -> None:
    text = json.dumps(settings, indent=2, sort_keys=True)
    storage.write_atomically(folder / _SETTINGS_NAME, text.encode())


def _check_settings(folder: Path, settings: Settings, out: Path) -> None:
    """Raises a ConfigError that names what differs from stored settings."""
    stored = json.loads((folder / _SETTINGS_NAME).read_text())
    changes = configs.differences(stored, settings)
    if changes:
        lines = "\n  ".join(changes)
        raise configs.ConfigError(
            f"{out} was begun with other settings:\n  {lines}\nUndo the change, give "
            f"another output, or delete {folder} to begin anew."
        )


def _canonical(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _finished_settings(path: Path) -> Any:
    """Returns the settings inside an archive, or None."""
    if not zipfile.is_zipfile(path) or SETTINGS not in streaming.array_names(path):
        return None
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file[SETTINGS]))


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    # A fixed date: equal content gives equal files.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _png_name(index: int) -> str:
    return f"{index:06d}.png"
