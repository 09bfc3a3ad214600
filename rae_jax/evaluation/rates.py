"""How fast images come."""

import time


class Rate:
    """Images per second, counted batch by batch.

    The first batch, which compiles, is left out unless there is no other.
    """

    def __init__(self):
        self._start, self._counted, self._batches = time.monotonic(), 0, 0

    def __call__(self, count: int) -> str:
        """Counts a batch that is done; returns "3.20 images/s"."""
        now = time.monotonic()
        self._counted, self._batches = self._counted + count, self._batches + 1
        speed = f"{self._counted / max(now - self._start, 1e-9):.2f} images/s"
        if self._batches == 1:
            self._start, self._counted = now, 0
        return speed
