"""Termination signals, turned into a request that the loop reads; exit statuses.

Until a run has made a step there is nothing to save, and signals end it at once. Then
the first asks it to save and stop, and a second one ends it at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

import jax
from jax._src import distributed

EXIT_INTERRUPTED = 130  # Ctrl-C: someone wanted it to stop.
EXIT_PREEMPTED = 75  # EX_TEMPFAIL. SIGTERM: the same command goes on.
EXIT_HANGING = 79  # See `watchdog`.
_STOP_KEY = "rae_jax/stop_after_step"
_NOTICE = b"\nStopping after this step and a checkpoint; once more stops at once.\n"
_SHOW_CURSOR = b"\x1b[?25h"  # The progress bar hides it.


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, message: str, exit_status: int = EXIT_INTERRUPTED):
        super().__init__(message)
        self.exit_status = exit_status


class Abandoned(BaseException):
    """What was being done is left, because a termination leaves no time for it."""


class StopRequest:
    """Context in which SIGINT and SIGTERM set a flag instead of ending the process.

    The handlers are installed by `listen`. A second signal has its usual effect.
    Outside the main thread, where Python allows no handlers, nothing happens.
    """

    def __init__(self) -> None:
        self.requested = 0  # Number of the signal.
        self._abandon = False
        self._previous: dict[int, object] = {}

    def listen(self) -> None:
        """Begins to take signals as requests."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    @property
    def exit_status(self) -> int:
        """The status of a process that stopped because it was asked to."""
        term = self.requested == signal.SIGTERM
        return EXIT_PREEMPTED if term else EXIT_INTERRUPTED

    def agreed(self, step: int) -> bool:
        """Returns whether the run stops after this step, alike in all processes.

        Called once a step. A process that hears a signal names the step after the
        next: the loop waits for the results of the step before, which take all
        processes, so none has got beyond it.
        """
        client = distributed.global_state.client
        if jax.process_count() == 1 or client is None:
            return bool(self.requested)
        if self.requested:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another was first.
                client.key_value_set(_STOP_KEY, f"{step + 2} {self.requested}")
        try:
            last, number = map(int, client.key_value_try_get(_STOP_KEY).split())
        except jax.errors.JaxRuntimeError:  # There is no such key.
            return False
        self.requested = self.requested or number
        return step >= last

    @contextlib.contextmanager
    def abandoning(self) -> Iterator[None]:
        """Context in which SIGTERM raises `Abandoned`, if there is one process.

        Several have to end together what they do together.
        """
        self._abandon = jax.process_count() == 1
        try:
            yield
        finally:
            self._abandon = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: one that Python did not install and cannot put back.
            usual = signal.SIG_DFL if handler is None else handler
            signal.signal(number, usual)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
        os.write(2, _NOTICE + (_SHOW_CURSOR if os.isatty(2) else b""))
        if self._abandon and number == signal.SIGTERM:
            raise Abandoned
