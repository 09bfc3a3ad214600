"""The runs of configs/claims.py that lie in one folder, and what they measured."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.training import checkpoints, logs

TOKENS = 128  # Width of the tokens of the latents.
WIDTHS = (48, 64, 96, 128, 192)
DIFFUSION = ("dit_dh", "paper_shift", "no_shift", "dit")
DECODERS = ("decoder_noisy", "decoder_clean")
VARIANTS = (*(f"width_{width}" for width in WIDTHS), *DIFFUSION, *DECODERS)
SCORES_NAME = "claim_scores.json"
# A plain name is the first seed; others follow it, as in dit_dh-seed7.
_NAME = re.compile(rf"({'|'.join(VARIANTS)})(-\w+)?")
_TAIL = 0.1  # Part of the log whose mean is the final loss.


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        variant: Its variant in configs/claims.py, told by the folder's name.
        path: Its folder.
        config: Leaves of its config by dotted key.
        records: Lines of its log.
        scores: What was measured after its last step; empty if nothing was.
    """

    variant: str
    path: Path
    config: dict[str, Any]
    records: list[dict[str, float]]
    scores: dict[str, Any]

    @property
    def seed(self) -> int:
        """Seed of its first weights, batches and noise."""
        return int(self.config["seed"])

    @property
    def num_steps(self) -> int:
        """Steps that it is to have."""
        return int(self.config["num_steps"])

    @property
    def is_finished(self) -> bool:
        """Whether it has had all of them."""
        return any(r["step"] >= self.num_steps for r in self.records)

    def curve(self) -> tuple[list[float], list[float]]:
        """Returns the steps and values of the logged loss."""
        found = [(r["step"], r["loss"]) for r in self.records if "loss" in r]
        return [step for step, _ in found], [loss for _, loss in found]

    def final_loss(self) -> float:
        """Returns the mean loss of the last tenth of the steps."""
        start = (1 - _TAIL) * self.num_steps
        losses = [x for s, x in zip(*self.curve(), strict=True) if s > start]
        return sum(losses) / len(losses)


def find(folder: Path) -> list[Run]:
    """Reads the runs in a folder, those with a plain name first.

    Raises:
        ConfigError: There is no such folder, or a file in it is damaged.
    """
    folder = storage.path(folder)
    if not folder.is_dir():
        raise configs.ConfigError(
            f"No folder {str(folder)!r}. Give the folder whose subfolders are the "
            "workdirs of configs/claims.py, or make one with `bash launch/claims.sh`."
        )
    paths = sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))
    found = [(path, _NAME.fullmatch(path.name)) for path in paths]
    return [
        _read(match[1], path)
        for path, match in found
        if match and (path / checkpoints.CONFIG_NAME).is_file()
    ]


def finished(runs: list[Run], variant: str) -> list[Run]:
    """Returns the finished runs of a variant."""
    return [run for run in runs if run.variant == variant and run.is_finished]


def _read(variant: str, path: Path) -> Run:
    config = configs.flatten(read_json(path / checkpoints.CONFIG_NAME))
    records = [r for r in logs.read_metrics(path) if "step" in r]
    scores = path / SCORES_NAME
    measured = read_json(scores) if scores.is_file() else {}
    # A run that was made longer since has to be measured again.
    current = measured.get("num_steps") == config.get("num_steps")
    return Run(variant, path, config, records, measured if current else {})


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ConfigError: The file holds something else.
    """
    try:
        content = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise configs.ConfigError(
            f"{str(path)!r} is not JSON ({error}). Delete it and run the command that "
            "made it again."
        ) from error
    if not isinstance(content, dict):
        raise configs.ConfigError(f"{str(path)!r} must hold a JSON object.")
    return content
