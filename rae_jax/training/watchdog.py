"""Ends a run that hangs, and tells where.

A collective that waits for a lost machine waits forever, and so does a dead network
drive: the process lives and burns its reservation.
"""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from rae_jax import storage
from rae_jax.training import interrupts

STACKS_NAME = "stacks.txt"
# What compiles, evaluates or writes takes longer than a step.
ALLOWANCE = 20
_PATIENCE = 20.0  # Seconds for writing the stacks.


class Watchdog:
    """Context that ends the process when no step has been made for a while.

    It writes the stacks of all threads to the log and to `stacks.txt` in the workdir
    and exits with `interrupts.EXIT_HANGING`; nothing is saved, because what hangs may
    be the saving.

    Args:
        seconds: Longest time between two steps; 0 for no watch.
        workdir: Folder of the run.
    """

    def __init__(self, seconds: float, workdir: Path):
        self.seconds, self.workdir = seconds, storage.path(workdir)
        self._limit = seconds * ALLOWANCE
        self._last, self._what = time.monotonic(), "starting"
        self._end = threading.Event()

    def step(self, step: int) -> None:
        """Notes that a step has been made."""
        self._last, self._limit = time.monotonic(), self.seconds
        self._what = f"step {step + 1}"

    @contextlib.contextmanager
    def longer(self, what: str) -> Iterator[None]:
        """Context of something that may take `ALLOWANCE` times as long."""
        before = self._limit, self._what
        self._last, self._limit = time.monotonic(), self.seconds * ALLOWANCE
        self._what = what
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._limit, self._what = before

    def __enter__(self) -> Self:
        if self.seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(min(self.seconds / 4, 10.0)):
            waited = time.monotonic() - self._last
            if waited > self._limit:
                self._stop(waited)

    def _stop(self, waited: float) -> None:
        text = (
            f"\nNothing has moved for {waited:.0f} s, more than config.watchdog allows "
            f"({self._limit:g} s for {self._what}). The run ends with status "
            f"{interrupts.EXIT_HANGING}; the same command goes on from the newest "
            "checkpoint. Where its threads are:\n"
        )
        try:
            # Not where the run's files are: that may be what hangs.
            with tempfile.TemporaryFile("w+") as file:
                for output in (sys.__stderr__, file):
                    if output is not None:
                        print(text, file=output, flush=True)
                        faulthandler.dump_traceback(output, all_threads=True)
                file.seek(0)
                self._store(file.read())
        finally:
            os._exit(interrupts.EXIT_HANGING)

    def _store(self, text: str) -> None:
        """Writes the stacks, unless that hangs too."""
        path = self.workdir / STACKS_NAME
        arguments = (path, text.encode())
        store = threading.Thread(
            target=storage.write_atomically, args=arguments, daemon=True
        )
        store.start()
        store.join(_PATIENCE)
