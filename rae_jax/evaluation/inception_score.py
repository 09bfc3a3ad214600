"""Inception Score from a stream of class scores."""

import numpy as np

SPLIT_SIZE = 5_000  # ADM's evaluator; ten splits of the usual 50,000 images.


class InceptionScore:
    """exp of the mean divergence of p(class | image) from its mean over a split.

    arXiv:1606.03498. Images are split in the order in which they come; the last split
    may be shorter. Sums are float64, so batches do not matter.

    Args:
        split_size: Images per split.
    """

    def __init__(self, split_size: int = SPLIT_SIZE):
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}.")
        self._split_size = split_size
        self._scores: list[float] = []
        self._count, self._negentropy = 0, 0.0
        self._total: np.ndarray | float = 0.0

    def add(self, logits: np.ndarray) -> None:
        """Counts images by their class scores (n, classes), before the softmax.

        Raises:
            ValueError: A score is not finite.
        """
        logits = np.asarray(logits, np.float64)
        if logits.ndim != 2 or not np.isfinite(logits).all():
            raise ValueError(f"Class scores {logits.shape} must be finite, (n, c).")
        while len(logits):
            part = logits[: self._split_size - self._count]
            logits = logits[len(part) :]
            self._add_part(part)
            if self._count == self._split_size:
                self._close()

    def result(self) -> tuple[float, float]:
        """Returns mean and standard deviation (divisor n) over the splits so far.

        Raises:
            ValueError: No image was counted.
        """
        scores = self._scores + ([self._score()] if self._count else [])
        if not scores:
            raise ValueError("No image was counted.")
        return float(np.mean(scores)), float(np.std(scores))

    def _add_part(self, logits: np.ndarray) -> None:
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        self._negentropy += float((p * log_p).sum())
        self._total = self._total + p.sum(axis=0)
        self._count += len(logits)

    def _score(self) -> float:
        q = self._total / self._count
        entropy = -float(np.sum(q * np.log(np.where(q > 0, q, 1.0))))
        return float(np.exp(self._negentropy / self._count + entropy))

    def _close(self) -> None:
        self._scores.append(self._score())
        self._count, self._negentropy, self._total = 0, 0.0, 0.0
