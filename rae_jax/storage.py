"""Files and folders on a disk or in a bucket (gs://, s3://), by one set of calls.

On a disk a path is a `pathlib.Path`; in a bucket it is an `etils.epath.Path`, which has
the same methods. Both are annotated as `Path`. What a path alone cannot do the same way
in both places is here, such as files that appear under their names complete. See
`copies` for libraries that read disks alone.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMES = {"gs://": "gcsfs", "s3://": "s3fs"}
EXTRAS = {"gs://": "gcs", "s3://": "s3"}


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path lies in a bucket."""
    return os.fspath(path).startswith(tuple(SCHEMES))


def path(name: str | os.PathLike[str]) -> Path:
    """Returns a name as a path of a disk or of a bucket.

    Raises:
        ModuleNotFoundError: The library for this kind of bucket is not installed.
        ValueError: An address names no bucket.
    """
    text = os.fspath(name)
    if not is_bucket(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if not rest.split("/")[0]:
        raise ValueError(f"{text} names no bucket; addresses look like gs://NAME/PATH.")
    _prepare(f"{scheme}://")
    from etils import epath

    return epath.Path(text)


def absolute(name: str | os.PathLike[str]) -> Path:
    """Returns a path that the current folder does not matter for, `..` resolved."""
    found = path(name)
    if is_bucket(found):
        return found
    return Path(os.path.abspath(found.expanduser()))


def join(folder: Path, name: str | os.PathLike[str]) -> Path:
    """Returns a name as seen from a folder, `..` resolved; addresses stand alone."""
    if is_bucket(name) or os.path.isabs(name):
        return path(name)
    scheme, colon, rest = os.fspath(folder).partition("://")
    if not colon:
        return Path(os.path.normpath(folder / name))
    bucket, _, key = rest.partition("/")
    inside = os.path.normpath(os.path.join("/", key, name)).lstrip("/")
    return path(f"{scheme}://{bucket}/{inside}")


def write_atomically(target: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old or the new one, never a part."""
    with writing(target) as file:
        file.write_bytes(data)


@contextlib.contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Context that yields a file on a disk to write; `target` is it once it is whole.

    Folders above it are made. If the context ends by an error, nothing is left.
    """
    target = path(target)
    if is_bucket(target):
        with tempfile.TemporaryDirectory(prefix="rae_jax_") as folder:
            file = Path(folder) / target.name
            yield file
            upload(file, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing_folder(target: Path, last: str) -> Iterator[Path]:
    """Context that yields a folder on a disk to fill; `target` is it afterwards.

    Args:
        target: The folder, which replaces one of before.
        last: The file that tells that the folder is whole: where folders cannot be
            renamed, it is removed first and comes last.
    """
    if is_bucket(target):
        with tempfile.TemporaryDirectory(prefix="rae_jax_") as temporary:
            folder = Path(temporary)
            yield folder
            remove(target / last)
            remove_tree(target)
            upload_tree(folder, target, last)
        return
    partial = target.with_name(f".{target.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    yield partial
    remove_tree(target)
    partial.rename(target)


@contextlib.contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Context that yields a folder on a disk; what it holds is added to `target`."""
    if not is_bucket(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="rae_jax_") as folder:
        yield Path(folder)
        upload_tree(Path(folder), target)


def upload_tree(folder: Path, target: Path, last: str = "") -> None:
    """Copies the files of a folder into one of a bucket, the one named `last` last."""
    for name in sorted(files_below(folder), key=lambda name: (name == last, name)):
        upload(folder / name, target / name)


def upload(file: Path, target: Path) -> None:
    """Copies a file of a disk into a bucket; it appears there as a whole.

    Raises:
        OSError: The bucket cannot be written.
    """
    files, key = system(target)
    try:
        with errors_naming(target):
            files.put_file(os.fspath(file), key)
    except FileNotFoundError:
        raise FileNotFoundError(f"{target}: there is no such bucket.") from None


def kind(name: Path) -> str:
    """Returns "folder", "file", or "" where there is neither.

    Raises:
        OSError: The bucket cannot be read.
    """
    if not is_bucket(name):
        return "folder" if name.is_dir() else "file" if name.exists() else ""
    files, key = system(name)
    try:
        with errors_naming(name):
            found = files.info(key)["type"]
    except FileNotFoundError:
        return ""
    return "folder" if found == "directory" else "file"


def read_bytes(file: Path) -> bytes:
    """Returns the content of a file; that of a bucket by a single request.

    So it is the old or the new content if another process replaces the file meanwhile.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
    """
    if not is_bucket(file):
        return file.read_bytes()
    files, key = system(file)
    # Otherwise s3fs asks for the size first.
    options = {"max_concurrency": 1} if os.fspath(file).startswith("s3") else {}
    with errors_naming(file):
        return files.cat_file(key, **options)


def remove(file: Path) -> None:
    """Deletes a file, if it exists."""
    if not is_bucket(file):
        file.unlink(missing_ok=True)
        return
    files, key = system(file)
    with contextlib.suppress(FileNotFoundError), errors_naming(file):
        files.rm_file(key)


def remove_tree(folder: Path) -> None:
    """Deletes a folder with all that is in it, if it exists."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    files, key = system(folder)
    with contextlib.suppress(FileNotFoundError), errors_naming(folder):
        files.rm(key, recursive=True)


def move_tree(folder: Path, target: Path) -> None:
    """Moves a folder to a place beside it, instead of what is there."""
    remove_tree(target)
    if not is_bucket(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return
    files, _ = system(folder)
    for name in files_below(folder):
        with errors_naming(folder / name):
            files.cp_file(system(folder / name)[1], system(target / name)[1])
    remove_tree(folder)


def files_below(folder: Path) -> list[str]:
    """Returns all files of a folder and its folders, relative to it, sorted."""
    if is_bucket(folder):
        files, key = system(folder)
        with errors_naming(folder):
            # An empty object with the name of a folder is how some tools make one.
            found = (name[len(key) :].lstrip("/") for name in files.find(key))
            return sorted(name for name in found if name and not name.endswith("/"))
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def names_in(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the files in a folder, sorted."""
    if is_bucket(folder):
        files, key = system(folder)
        with errors_naming(folder):
            infos = [info for info in files.ls(key, detail=True)]
        entries = [
            (os.path.basename(info["name"].rstrip("/")), info["type"] == "directory")
            for info in infos
            if info["name"].rstrip("/") != key.rstrip("/")
        ]
    else:
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found]
    folders = sorted({name for name, is_folder in entries if is_folder})
    return folders, sorted(name for name, is_folder in entries if not is_folder)


@functools.cache
def _prepare(scheme: str) -> None:
    """Sets up the library of a kind of bucket."""
    library = SCHEMES[scheme]
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(
            f"{scheme} addresses need the package {library}: "
            f'pip install "rae_jax[{EXTRAS[scheme]}]". Or mount the bucket and give a '
            "path in the mounted folder."
        )
    import fsspec

    # etils would import TensorFlow for this if it were there, and gcsfs would ask of
    # each bucket whether its folders can be renamed, for which many accounts may not.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Other processes write too, so what a folder held before says nothing.
    protocol = scheme.removesuffix("://")
    for name in {protocol, "gcs"} if protocol == "gs" else {protocol}:
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def system(address: Path) -> tuple[Any, str]:
    """Returns the file system of an address, and what it calls the path."""
    import fsspec

    path(address)  # Prepares the library.
    return fsspec.core.url_to_fs(os.fspath(address))


@contextlib.contextmanager
def errors_naming(address: Path) -> Iterator[None]:
    """Turns what the libraries of buckets raise into OSErrors with the address."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{address} does not exist.") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"{address} cannot be read or written: {reason}") from error
