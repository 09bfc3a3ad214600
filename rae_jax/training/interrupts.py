"""Ctrl-C and termination signals, turned into a request that the loop reads."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class StopRequest:
    """Context in which SIGINT and SIGTERM set a flag instead of raising.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread,
    where Python allows no handlers, the context does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
