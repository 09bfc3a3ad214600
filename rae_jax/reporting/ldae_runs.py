"""Pre-training runs and what was measured of them, found in folders.

A run is a workdir whose config says which row of the l-DAE paper it is, `row`, and in
which size, `tier`. Probes and fine-tunings are runs too, which name the workdir of
their encoder.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.data import sources
from rae_jax.reporting import claim_runs
from rae_jax.training import checkpoints, logs

TIERS = ("paper", "small", "photos", "digits", "photos-short", "digits-short")
PRETRAINING = ("ldae", "mae", "mocov3")
PROBE_NAME, FINETUNE_NAME = "probe.json", "finetune.json"
GENERATION_NAME = "generation.json"
_SKIPPED = {checkpoints.FOLDER, configs.BEST, "tensorboard", "tokenizer"}

Json = dict[str, Any]


@dataclasses.dataclass(eq=False)
class Run:
    """One pre-training run, or what is left of it: its name in the files of others.

    Attributes:
        path: Its folder.
        row: Its row of the paper.
        tier: Its size, usually one of `TIERS`.
        config: Leaves of its config by dotted key; empty if the folder is not there.
        steps: Optimiser steps that it has had, 0 if that is not known.
        probes: Contents of the probes' files.
        finetunes: Contents of the fine-tunings' files.
        generation: Scores of its samples, empty if there are none.
    """

    path: Path
    row: str
    tier: str
    config: Json
    steps: int = 0
    probes: list[Json] = dataclasses.field(default_factory=list)
    finetunes: list[Json] = dataclasses.field(default_factory=list)
    generation: Json = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """Seed of its first weights, batches and noise; None if it is not known."""
        return self.config.get("seed")

    @property
    def depth(self) -> int | None:
        """Blocks of the whole network, None if it is not known."""
        return self.config.get("model.depth")

    def epochs(self) -> float | None:
        """Returns how often it has seen an image, None where the data is not here."""
        count = num_images(self.config)
        if not count or not self.steps:
            return None
        return self.steps * self.config["data.batch_size"] / count


def find(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs in folders and below, each with what was measured of it.

    A run whose folder is elsewhere, but whose probe is here, is among them.

    Raises:
        ConfigError: A folder does not exist, or a file is damaged.
    """
    found: dict[Path, Run] = {}
    measured = []
    for path in workdirs(folders):
        config = configs.flatten(claim_runs.read_json(path / checkpoints.CONFIG_NAME))
        if config.get("trainer") in PRETRAINING and config.get("row"):
            found[path] = _run(path, config)
        for name in (PROBE_NAME, FINETUNE_NAME):
            if (path / name).is_file():
                measured.append((path, name, claim_runs.read_json(path / name), config))
    for path, name, content, config in measured:
        run = _measured_run(found, path, content, config)
        (run.probes if name == PROBE_NAME else run.finetunes).append(content)
    return sorted(found.values(), key=lambda run: (_rank(run.tier), str(run.path)))


def num_images(config: Json) -> int | None:
    """Returns how many training images a flat config has, None if they are not here."""
    block = {k.removeprefix("data."): v for k, v in config.items() if k[:5] == "data."}
    if not block:
        return None
    options = (block["source"], str(block.get("path", "")), block.get("split", "train"))
    count = _count(*options)
    return count and min(count, block.get("limit") or count)


@functools.cache
def _count(source: str, path: str, split: str) -> int | None:
    try:
        return len(sources.make_source(source, path=path, split=split))
    except (ValueError, OSError, ImportError):
        return None


def workdirs(folders: Sequence[Path]) -> list[Path]:
    """Returns the folders with a config, in these folders and below, each once.

    Raises:
        ConfigError: A folder does not exist.
    """
    return list(dict.fromkeys(p for folder in folders for p in _below(folder)))


def _below(folder: Path) -> Iterator[Path]:
    folder = storage.path(folder)
    if not folder.is_dir():
        raise configs.ConfigError(
            f"No folder {str(folder)!r}. Give workdirs of l-DAE, MAE or MoCo v3 runs "
            "and of their probes, or a folder that they lie in."
        )
    children, files = storage.names_in(folder)
    if checkpoints.CONFIG_NAME in files:
        yield storage.absolute(folder)
    for name in children:
        if name not in _SKIPPED and name[0] != ".":
            yield from _below(folder / name)


def _run(path: Path, config: Json) -> Run:
    records = logs.read_metrics(path)
    steps = int(max((r["step"] for r in records if "step" in r), default=0))
    generation = path / GENERATION_NAME
    return Run(
        path=path,
        row=config["row"],
        tier=config.get("tier", "paper"),
        config=config,
        steps=steps,
        generation=claim_runs.read_json(generation) if generation.is_file() else {},
    )


def _measured_run(
    found: dict[Path, Run], path: Path, content: Json, config: Json
) -> Run:
    """Returns the run whose encoder a file is about; reads it if it lies elsewhere."""
    name = content.get("encoder") or "."
    places = [storage.join(path, name), storage.absolute(name)]
    for place in places:
        if place in found:
            return found[place]
        if (place / checkpoints.CONFIG_NAME).is_file():
            there = configs.flatten(
                claim_runs.read_json(place / checkpoints.CONFIG_NAME)
            )
            if there.get("row"):
                found[place] = _run(place, there)
                return found[place]
    key = places[0] if content.get("encoder") else path
    if key not in found:
        seed = {"seed": config["seed"]} if "seed" in config else {}
        row, tier = content.get("row", ""), content.get("tier", "")
        found[key] = Run(key, row, tier, seed)
    return found[key]


def _rank(tier: str) -> int:
    return TIERS.index(tier) if tier in TIERS else len(TIERS)
