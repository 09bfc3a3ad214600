"""Logs that grow, on a disk or in a bucket, where a file cannot be appended to."""

import shutil
import tempfile
import time
from concurrent import futures
from pathlib import Path

from rae_jax import storage

SECONDS = 30.0  # Between two copies of what has grown.


class Spool:
    """A folder on a disk to write logs in: the workdir itself, or one copied to it.

    What has grown in a folder of the second kind is copied from time to time, and
    before every checkpoint, so that a run that goes on finds all that came before.

    Args:
        workdir: Folder of the run.
    """

    def __init__(self, workdir: Path):
        self._target, self._threads = workdir, None
        self.folder = workdir
        if storage.is_bucket(workdir):
            self.folder = Path(tempfile.mkdtemp(prefix="rae_jax_"))
            self._threads = futures.ThreadPoolExecutor(1)
        self._copied: dict[str, tuple[int, int]] = {}
        self._last = 0.0
        self._pending: futures.Future[None] | None = None

    def grown(self) -> None:
        """Copies what has changed, in the background, if the last time is long ago."""
        if self._threads is not None and time.monotonic() - self._last > SECONDS:
            self._last = time.monotonic()
            if self._pending is None or self._pending.done():
                self._pending = self._threads.submit(self._copy)

    def sync(self) -> str:
        """Copies what has changed, now; returns what prevents it, or nothing."""
        if self._threads is None:
            return ""
        try:
            self._threads.submit(self._copy).result()
        except OSError as error:  # The next time may do it.
            return str(error)
        return ""

    def close(self) -> str:
        """Copies what has changed and ends; returns what prevents it, or nothing."""
        if self._threads is None:
            return ""
        problem = self.sync()
        self._threads.shutdown()
        if not problem:
            shutil.rmtree(self.folder, ignore_errors=True)
        return f"{problem} It lies in {self.folder}." if problem else ""

    def _copy(self) -> None:
        for name in storage.files_below(self.folder):
            facts = (self.folder / name).stat()
            mark = (facts.st_size, facts.st_mtime_ns)
            if self._copied.get(name) != mark:
                storage.upload(self.folder / name, self._target / name)
                self._copied[name] = mark
