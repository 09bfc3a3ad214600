"""Scores of an l-DAE run: of what it denoises and, if it does, of what it generates."""

import json
from pathlib import Path
from typing import Any

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.evaluation import quality
from rae_jax.trainers import denoising_chain, scores
from rae_jax.trainers import judges as judging
from rae_jax.training import checkpoints, distributed

RESULT_NAME = "generation.json"
EFFLITE0 = "fd_efflite0"


def run_scores(
    workdir: Path,
    judges: judging.Judges,
    *,
    num_samples: int,
    num_reference: int,
    batch_size: int,
    seed: int,
    scale: float | None = None,
    progress: quality.Progress = lambda count: None,
) -> quality.Result:
    """Returns the scores of a run's newest checkpoint.

    Validation images are denoised. Where the run is a diffusion model, samples are
    compared with the judges' reference or, without judges, by fd_efflite0 with
    training images; these numbers are also written to `generation.json`, with the row
    of the paper's tables that the run is.

    Args:
        workdir: Folder of an `ldae` run.
        judges: Networks and reference for samples, perhaps none.
        num_samples, num_reference, batch_size, seed, scale, progress: See
            `scores.generation_scores`.

    Raises:
        ConfigError: Samples are to be judged, but the run does not generate.
    """
    workdir = storage.path(workdir)
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    why = denoising_chain.refusal(config)
    judged = bool(judges.reference or judges.inception or judges.encoder)
    if why and judged:
        raise configs.ConfigError(f"There are no samples to judge: {why}")
    found = scores.run_scores(workdir)
    if why:
        return quality.Result(found, (f"No samples were measured. {why}",))
    options = dict(num_samples=num_samples, seed=seed, scale=scale, progress=progress)
    if judged:
        drawn = scores.generation_quality(workdir, judges, **options)
    else:
        more = dict(num_reference=num_reference, batch_size=batch_size)
        drawn = scores.generation_scores(workdir, **options, **more)
    _write(workdir, config, drawn.scores)
    return quality.Result(found | drawn.scores, drawn.notes)


def _write(workdir: Path, config: Any, found: dict[str, float]) -> None:
    if not distributed.is_main():
        return
    head = {"row": config.get("row", ""), "tier": config.get("tier", "")}
    if f"{EFFLITE0}_samples" in found:
        head[EFFLITE0] = found[f"{EFFLITE0}_samples"]
    gfid = [value for name, value in found.items() if name.startswith("gfid")]
    if gfid:
        head["gfid"] = gfid[0]
    text = json.dumps(head | dict(found), indent=2, sort_keys=True)
    storage.write_atomically(workdir / RESULT_NAME, text.encode())
