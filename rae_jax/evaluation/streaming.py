"""Image sets of any size, read batch by batch: folders, .npz arrays, generators."""

import zipfile
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from rae_jax import copies, storage
from rae_jax.data import images

ARRAY = "arr_0"  # Where ADM's evaluator and `rae-jax prepare --pack` keep images.
CHUNK = 64
_THREADS = 4


class ImageSet(Protocol):
    """uint8 images (n, h, w, 3) of one size.

    Attributes:
        origin: Where they are, for messages.
        size: Their height and width.
    """

    origin: str
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the images in order, uint8 (b, h, w, 3), in batches of any size."""


class ArrayRows:
    """Rows of one array of an .npz archive, of which few are in memory at a time.

    Args:
        path: The archive, compressed or not.
        name: The array.
        limit: Only the first `limit` rows.

    Raises:
        ValueError: The file is no .npz archive or damaged, lacks the array or has no
            rows in it.
    """

    def __init__(self, path: Path, name: str = ARRAY, limit: int | None = None):
        self.origin, self.name, self._path = str(path), name, copies.local(path)
        names = array_names(self._path)
        if name not in names:
            raise ValueError(f"{path} has no array {name!r}, only {sorted(names)}.")
        with zipfile.ZipFile(self._path) as archive:
            self.shape, self.dtype = self._header(archive)
        rows = self.shape[0] if self.shape else 0
        if not rows:
            raise ValueError(f"{path}: the array {name!r} is empty {self.shape}.")
        self._count = rows if limit is None else min(limit, rows)

    def __len__(self) -> int:
        return self._count

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the rows in order, `CHUNK` at a time.

        Raises:
            ValueError: The file ends early or is damaged.
        """
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with zipfile.ZipFile(self._path) as archive, self._open(archive) as file:
            self._read_header(file)
            for start in range(0, self._count, CHUNK):
                count = min(CHUNK, self._count - start)
                data = self._read(file, count * row)
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _read(self, file: IO[bytes], size: int) -> bytes:
        try:
            data = file.read(size)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"{self.origin} is damaged: {error}.") from None
        if len(data) < size:
            raise ValueError(
                f"{self.origin} ends before the {self.shape[0]} rows of {self.name!r} "
                "that it announces; make or fetch it again."
            )
        return data

    def _open(self, archive: zipfile.ZipFile) -> IO[bytes]:
        return archive.open(f"{self.name}.npy")

    def _header(self, archive: zipfile.ZipFile) -> tuple[tuple[int, ...], np.dtype]:
        with self._open(archive) as file:
            shape, fortran, dtype = self._read_header(file)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise ValueError(
                f"{self.origin}: the array {self.name!r} cannot be read row by row "
                f"({dtype}, {'columns' if fortran else 'rows'} first). Save it again "
                "with np.savez(file, np.ascontiguousarray(array))."
            )
        return shape, dtype

    def _read_header(self, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(file)
            return np.lib.format.read_array_header_2_0(file)
        except (zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{self.origin} is damaged: {error}") from None


class Packed(ArrayRows):
    """The images of an .npz archive, as ADM's samples and references are stored.

    Raises:
        ValueError: As `ArrayRows`, or the array does not hold uint8 images.
    """

    def __init__(self, path: Path, limit: int | None = None):
        super().__init__(path, ARRAY, limit)
        if self.dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3:
            raise ValueError(
                f"{path}: {ARRAY!r} must hold uint8 images (n, h, w, 3), not "
                f"{self.dtype} {self.shape}. Images in [0, 1] are clipped, multiplied "
                "by 255 and truncated: (x.clip(0, 1) * 255).astype('uint8')."
            )
        self.size = self.shape[1:3]


class Folder:
    """The images below a folder, sorted by path, all of one size.

    Raises:
        ValueError: The folder has no images.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.origin, root = str(path), copies.local(path)
        found = (p for p in root.rglob("*") if p.suffix.lower() in images.EXTENSIONS)
        files = sorted(p for p in found if p.is_file() and p.name[0] != ".")
        if not files:
            raise ValueError(
                f"{path} holds no images of type {', '.join(images.EXTENSIONS)}, "
                "directly or in its folders."
            )
        self._files = files[:limit]
        self.size = images.decode(self._files[0]).shape[:2]

    def __len__(self) -> int:
        return len(self._files)

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the images in order, `CHUNK` at a time.

        Raises:
            ValueError: An image cannot be read, or has another size than the first.
        """
        with futures.ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(self._files), CHUNK):
                files = self._files[start : start + CHUNK]
                yield np.stack(list(threads.map(self._decode, files)))

    def _decode(self, file: Path) -> np.ndarray:
        pixels = images.decode(file)
        if pixels.shape[:2] != self.size:
            (h, w), first = self.size, self._files[0]
            raise ValueError(
                f"{file} has {pixels.shape[1]} x {pixels.shape[0]} pixels, {first} has "
                f"{w} x {h}. Images that are compared need one size: crop them with "
                f"`rae-jax prepare {self.origin} --pack OUT.npz --size {min(h, w)}`."
            )
        return pixels


def open_images(path: Path, limit: int | None = None) -> ImageSet:
    """Opens a folder of images, or an .npz archive with an array "arr_0" of them.

    Args:
        path: Folder or file.
        limit: Only the first `limit` images.

    Raises:
        ValueError: There are no images, or they are not uint8 (n, h, w, 3).
        FileNotFoundError: There is no such file or folder.
    """
    path = storage.path(path).expanduser()
    if limit is not None and limit < 1:
        raise ValueError(f"A limit must be at least 1, got {limit}.")
    if path.is_dir():
        return Folder(path, limit)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a folder of images or an .npz file."
        )
    return Packed(path, limit)


def array_names(path: Path) -> list[str]:
    """Returns the names of the arrays in an .npz archive.

    Raises:
        ValueError: The file is not one.
    """
    if not zipfile.is_zipfile(copies.local(path)):
        raise ValueError(
            f"{path} is not a whole .npz file; expected an archive that np.savez or "
            "`rae-jax prepare --pack` wrote."
        )
    with zipfile.ZipFile(copies.local(path)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the same rows in batches of exactly `size`, the last one shorter."""
    held: list[np.ndarray] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        while count >= size:
            rows = held[0] if len(held) == 1 else np.concatenate(held)
            yield rows[:size]
            held, count = [rows[size:]], count - size
    if count:
        yield np.concatenate(held)
