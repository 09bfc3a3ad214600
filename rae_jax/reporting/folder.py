"""What a quickstart left in its folder, as far as it came."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.training import logs

# In the order of training.
STAGES = {
    "ldae": "l-DAE",
    "probe": "Linear probe",
    "rae_decoder": "RAE decoder",
    "latent_stats": "Latent statistics",
    "latent_diffusion": "Latent diffusion",
}
METRICS_NAME = "metrics.json"
PICTURES = ("samples.png", "samples_guided.png", "real.png")
PICTURES += ("reconstructions.png", "strip.png", "ldae/denoising.png")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        config: Leaves of its config by dotted key; empty if there is none.
        records: Lines of its log.
    """

    config: dict[str, Any]
    records: list[dict[str, float]]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Returns steps and values of one logged scalar."""
        found = [(r["step"], r[name]) for r in self.records if name in r]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def last_step(self) -> int:
        """Last step in the log, 0 without one."""
        return int(max((r["step"] for r in self.records), default=0))


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """A quickstart folder.

    Attributes:
        workdir: The folder.
        metrics: Content of `metrics.json`; empty if it is not there yet.
        stages: All stages by name, also those that have not run.
        missing: Files that a complete run would have, relative to the folder.
    """

    workdir: Path
    metrics: dict[str, Any]
    stages: dict[str, Stage]
    missing: list[str]

    def block(self, name: str) -> dict[str, Any]:
        """Returns a part of the metrics, empty if it is absent."""
        value = self.metrics.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def classes(self) -> list[str]:
        """Class names, empty if they are not known."""
        return [str(name) for name in self.metrics.get("classes") or []]

    def picture(self, name: str) -> Path | None:
        """Returns the path of a picture that exists."""
        path = self.workdir / name
        return path if path.is_file() else None


def read(workdir: Path) -> Quickstart:
    """Reads a quickstart folder, complete or not.

    Raises:
        ConfigError: The folder does not exist, holds nothing of a quickstart, or
            a file in it is damaged.
    """
    workdir = storage.path(workdir)
    if not workdir.is_dir():
        raise configs.ConfigError(
            f"No folder {str(workdir)!r}. Give the workdir of a quickstart, or make "
            "one with `bash launch/quickstart.sh`."
        )
    expected = [METRICS_NAME, *PICTURES]
    for name in STAGES:
        expected += [f"{name}/config.json", f"{name}/{logs.METRICS_NAME}"]
    missing = [name for name in expected if not (workdir / name).is_file()]
    if missing == expected:
        raise configs.ConfigError(
            f"{str(workdir)!r} holds nothing of a quickstart: no {METRICS_NAME}, no "
            f"pictures and none of the stages {', '.join(STAGES)}. Give the folder "
            "that was passed as --workdir to `rae-jax quickstart`."
        )
    stages = {name: read_stage(workdir / name) for name in STAGES}
    return Quickstart(workdir, _read_json(workdir / METRICS_NAME), stages, missing)


def read_stage(folder: Path) -> Stage:
    """Reads config and log of one run; what is not there is empty.

    Raises:
        ConfigError: The config is damaged.
    """
    config = configs.flatten(_read_json(folder / "config.json"))
    records = [r for r in logs.read_metrics(folder) if "step" in r]
    return Stage(config, records)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise configs.ConfigError(
            f"{str(path)!r} is not JSON ({error}). Delete it and run the quickstart "
            "again; finished stages are kept."
        ) from error
    if not isinstance(content, dict):
        raise configs.ConfigError(
            f"{str(path)!r} must hold a JSON object, not {type(content).__name__}."
        )
    return content
