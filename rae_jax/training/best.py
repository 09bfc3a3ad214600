"""The checkpoint with the best score of a run's evaluations."""

import json
import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.training import checkpoints, logs

RECORD_NAME = "best.json"
# Beginnings of the names of scores that are better when they are higher.
HIGHER = ("psnr", "ssim", "inception_score", "precision", "recall", "accuracy", "top")


def folder(workdir: Path) -> Path:
    """Returns the workdir of a run's best state."""
    return storage.path(workdir) / configs.BEST


class Best:
    """Keeps the state of the best evaluation in `best/`, and its score in `best.json`.

    `best/` is a workdir: to sample from, to evaluate, or to go on from.

    The new one is complete before the old one goes, and the record follows; a run
    that is killed in between evaluates that step again and finds it there.

    Args:
        workdir: Folder of the run.
        config: Of the run.
        metric: Name of the score, such as "gfid_10k"; empty for none. Lower is better
            but for those in `HIGHER`.
    """

    def __init__(self, workdir: Path, config: ConfigDict, metric: str):
        self.workdir, self.config, self.metric = storage.path(workdir), config, metric
        self._checkpoints: checkpoints.Checkpoints | None = None
        self.record = self._read()

    def offer(
        self, step: int, state: Any, scores: dict[str, float], position: dict[str, Any]
    ) -> bool:
        """Keeps the state if its score is the best so far; says whether it is.

        Raises:
            ConfigError: The evaluation has no such score.
        """
        if not self.metric:
            return False
        if self.metric not in scores:
            raise configs.ConfigError(
                "evaluation.best: "
                + configs.suggest(self.metric, sorted(scores), "score")
            )
        value = scores[self.metric]
        if not math.isfinite(value) or not self._is_better(value):
            return False
        if self._checkpoints is None:
            self._checkpoints = checkpoints.Checkpoints(folder(self.workdir), keep=1)
        self._checkpoints.drop_after(step)  # Of a course that the run has left.
        self._checkpoints.save(step, state, position)
        self._checkpoints.wait()
        self.record = {"metric": self.metric, "value": value, "step": step}
        if jax.process_index() == 0:
            path = folder(self.workdir) / checkpoints.CONFIG_NAME
            configs.save_config(self.config, path)
            text = json.dumps(self.record, indent=2)
            storage.write_atomically(self.workdir / RECORD_NAME, text.encode())
        logs.note(f"Best {self.metric} so far: {value:.6g} at step {step}.")
        return True

    def close(self) -> None:
        """Ends."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _is_better(self, value: float) -> bool:
        if self.record is None:
            return True
        sign = -1 if self.metric.startswith(HIGHER) else 1
        return sign * value < sign * self.record["value"]

    def _read(self) -> dict[str, Any] | None:
        """Returns the record of this metric, if its checkpoint is there."""
        path = self.workdir / RECORD_NAME
        try:
            record = json.loads(storage.read_bytes(path))
        except (OSError, ValueError):
            return None
        kept = checkpoints.finished_step(folder(self.workdir))
        return record if record.get("metric") == self.metric and kept else None
