"""Name -> trainer, and the one way to run a config."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.trainers import (
    finetune,
    following,
    latent_diffusion,
    latent_stats,
    ldae,
    mae,
    mocov3,
    probe,
    rae_decoder,
    tokenizer,
)
from rae_jax.training import (
    checkpoints,
    distributed,
    loop,
    programs,
    resuming,
    sharding,
)

FINISHED_NAME = "finished"
TRAINERS = {
    "tokenizer": tokenizer,
    "ldae": ldae,
    "mae": mae,
    "mocov3": mocov3,
    "probe": probe,
    "finetune": finetune,
    "rae_decoder": rae_decoder,
    "latent_stats": latent_stats,
    "latent_diffusion": latent_diffusion,
}


def trainer(config: ConfigDict) -> ModuleType:
    """Returns the module of `config.trainer`."""
    if config.trainer not in TRAINERS:
        raise ValueError(configs.suggest(config.trainer, list(TRAINERS), "trainer"))
    return TRAINERS[config.trainer]


def design(config: ConfigDict) -> programs.Design:
    """Describes a config by shapes, without data or weights."""
    return trainer(config).design(config)


def model_flops(config: ConfigDict) -> float:
    """Counts the FLOPs of one step without the recomputation of rematerialising.

    That of a decoder with a critic is counted as it is once both are trained.
    """
    config = config.copy_and_resolve_references()
    blocks = [config.model] if "model" in config else []
    if "gan" in config:
        blocks.append(config.gan.backbone.sizes)
    for block in blocks:
        if "remat" in block:
            block.remat = "none"
    return design(config).step_flops()


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    title: str = "",
    allow_change: Sequence[str] = (),
    started: float | None = None,
) -> Any:
    """Runs a config in a workdir to its end; returns the final state.

    Args:
        config: The run. Sizes that follow another run (`encoder.match`) are its.
        workdir: Its folder; a run that is there goes on.
        title: Label of the progress bar.
        allow_change: Keys of the config that may change when the run is resumed.
        started: When the command was given, as `time.time()`; now if None.

    Raises:
        ConfigError, ValueError: For a config, data or weights that cannot be used.
    """
    started = time.time() if started is None else started
    workdir = storage.absolute(workdir)
    config = following.follow(config, workdir)
    resuming.check(workdir, config, allow_change)
    mesh = sharding.make_mesh(config.mesh)
    accumulate = config.optimizer.accumulate if "optimizer" in config else 1
    sharding.check_batch_size(config.data.batch_size, mesh, accumulate)
    with jax.set_mesh(mesh):
        program = trainer(config).build(config, workdir, mesh)
    program = dataclasses.replace(program, flops_per_step=model_flops(config))
    storage.remove(workdir / FINISHED_NAME)  # A longer run is not.
    distributed.barrier("the first step")
    state = loop.run(
        program,
        config,
        workdir,
        title=title or config.trainer,
        allow_change=allow_change,
        started=started,
    )
    if jax.process_index() == 0:
        storage.write_atomically(
            workdir / FINISHED_NAME, str(program.design.num_steps).encode()
        )
    return state


def is_finished(config: ConfigDict, workdir: Path) -> bool:
    """Returns whether `train` has finished exactly this config in a workdir."""
    if not (workdir / FINISHED_NAME).is_file():
        return False
    stored = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    return resuming.same(stored, following.follow(config, workdir))


def restore(
    program: programs.Program, config: ConfigDict, workdir: Path, mesh: Mesh
) -> Any:
    """Reads the state of a run's newest checkpoint.

    Raises:
        CheckpointError: If there is none.
    """
    if checkpoints.finished_step(workdir) is None:
        raise checkpoints.CheckpointError(f"{workdir} holds no checkpoint yet.")
    abstract = loop.abstract_state(program.design, config, mesh)
    reader = checkpoints.Checkpoints(workdir, keep=None)
    try:
        return reader.restore_newest(abstract)[1]
    finally:
        reader.close()
