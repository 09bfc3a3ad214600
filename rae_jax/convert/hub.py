"""Finds weights on this machine, in the cache of huggingface_hub, or on its hub."""

import fnmatch
import os
import pathlib
import re
from collections.abc import Callable, Sequence

from rae_jax import copies, storage
from rae_jax.convert import files, sources

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(.+))?")
_TIMEOUT = 10.0  # Seconds; the hub is asked once before anything is downloaded.
_LONGEST_REASON = 300  # Characters.


class _NeedsFileName(FileNotFoundError):
    """A repository whose weights lie in folders: which are wanted, nobody said."""


def locate(source: str | os.PathLike[str], *, allow: Sequence[str]) -> pathlib.Path:
    """Returns the local path of weights, which are downloaded if they must be.

    Args:
        source: A local file or folder; one in a bucket, of which a copy is kept;
            "owner/name", a repository of the hub; or
            "owner/name:path/in/repo", one file of it. What exists here comes first,
            then the cache, then the hub unless HF_HUB_OFFLINE is set.
        allow: Patterns of the files that a whole repository is wanted for.

    Raises:
        FileNotFoundError: It is nowhere; the message says what is missing and the
            command that downloads it.
    """
    if storage.is_bucket(source):
        return copies.local(source, allow)
    local = pathlib.Path(source).expanduser()
    if local.exists():
        return local
    match = _HUB_ID.fullmatch(os.fspath(source))
    if match is None:
        raise FileNotFoundError(
            f"There is no file or folder {os.fspath(source)!r}, and it is no hub id "
            "(owner/name, or owner/name:path/in/repo for one file)."
        )
    repo, file = match.groups()
    if file is None:
        steps = (lambda: _cached_folder(repo, allow), lambda: _download(repo, allow))
    else:
        steps = (lambda: _cached_file(repo, file), lambda: _download_file(repo, file))
    return _first(steps, repo, file)


def _first(
    steps: Sequence[Callable[[], str]], repo: str, file: str | None
) -> pathlib.Path:
    """What the cache has, or else what the hub gives; errors become one message."""
    problems = []
    for step in steps:
        try:
            return pathlib.Path(step())
        except _NeedsFileName:
            raise
        except Exception as error:  # The hub's library has many, of several bases.
            problems.append(_reason(error))
    target = repo if file is None else f"{repo} {file}"
    what = f"the repository {repo}" if file is None else f"{file} of {repo}"
    raise FileNotFoundError(
        f"Weights are missing: {what} is not in the cache ({problems[0]}) and cannot "
        f"be downloaded now ({problems[1]}). Run\n    hf download {target}\nwhere "
        "there is a connection, or give a local file or folder in its place."
    )


def _cached_file(repo: str, file: str) -> str:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repo, file)
    if not isinstance(found, str):
        raise FileNotFoundError("it has no such file")
    return found


def _cached_folder(repo: str, allow: Sequence[str]) -> str:
    """The cached snapshot, if it has weights and every shard that it should have."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=list(allow), local_files_only=True
        )
    except FileNotFoundError as error:
        if "incomplete" in str(error):
            raise
        raise FileNotFoundError("it has nothing of it") from error
    names = [path.name for path in pathlib.Path(folder).iterdir()]
    if not _weights_among(names, allow):
        raise FileNotFoundError(f"it has only {files.listed(names) or 'a folder'}")
    for name in fnmatch.filter(names, f"*{sources.INDEX_SUFFIX}"):
        _require_shards(pathlib.Path(folder, name))
    return folder


def _require_shards(index: pathlib.Path) -> None:
    missing = sources.missing_shards(index)
    if missing:
        raise FileNotFoundError(f"it lacks {files.listed(missing)}")


def _download(repo: str, allow: Sequence[str]) -> str:
    import huggingface_hub

    names = _hub_files(repo)
    if not _weights_among([name for name in names if "/" not in name], allow):
        others = [f"{repo}:{name}" for name in _weights_among(names, allow)]
        raise _NeedsFileName(
            f"{repo} has no weights outside of its folders; give one of its files: "
            f"{files.listed(others) or 'it has none'}"
        )
    return huggingface_hub.snapshot_download(
        repo, allow_patterns=list(allow), etag_timeout=_TIMEOUT
    )


def _download_file(repo: str, file: str) -> str:
    import huggingface_hub

    if file not in (names := _hub_files(repo)):
        weights = _weights_among(names, ["*"])
        raise _NeedsFileName(
            f"{repo} has no file {file!r}; weights: {files.listed(weights) or 'none'}"
        )
    return huggingface_hub.hf_hub_download(repo, file, etag_timeout=_TIMEOUT)


def _hub_files(repo: str) -> list[str]:
    """Asks the hub for file names; fails soon where a download retries for minutes."""
    import huggingface_hub

    setting = os.environ.get("HF_HUB_OFFLINE", "").upper()
    if setting in ("1", "ON", "YES", "TRUE") or huggingface_hub.is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE is set")
    info = huggingface_hub.HfApi().repo_info(repo, timeout=_TIMEOUT)
    return [file.rfilename for file in info.siblings or []]


def _weights_among(names: Sequence[str], allow: Sequence[str]) -> list[str]:
    """The weight files that the patterns allow."""
    weights = [name for name in names if name.endswith(sources.WEIGHT_SUFFIXES)]
    return [name for name in weights if any(fnmatch.fnmatch(name, p) for p in allow)]


def _reason(error: Exception) -> str:
    """An error's text in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
