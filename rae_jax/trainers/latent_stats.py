"""Mean and variance of an encoder's latents, per position and channel.

The exact mode makes one streaming pass with Chan's update, so the result depends
neither on batch size nor on order, up to rounding. The momentum mode repeats the
official script of arXiv:2510.11690: an exponential average over the batches.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.models import rae
from rae_jax.trainers import frozen, inputs
from rae_jax.training import programs, sharding

MODES = ("exact", "momentum")


@flax.struct.dataclass
class StatsState:
    """Running moments of latents (h, w, c).

    Attributes:
        step: Number of batches.
        count: Number of latents, float32.
        mean: Running mean.
        scatter: Sum of squared deviations from the mean; in momentum mode the
            running variance.
    """

    step: jax.Array
    count: jax.Array
    mean: jax.Array
    scatter: jax.Array


def create_state(shape: tuple[int, ...], mode: str) -> StatsState:
    """Returns the moments of no latents (momentum: mean 0, variance 1)."""
    initial = jnp.ones(shape) if mode == "momentum" else jnp.zeros(shape)
    return StatsState(
        jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(shape), initial
    )


def add_exact(state: StatsState, z: jax.Array, mask: jax.Array) -> StatsState:
    """Merges the moments of a batch (Chan, Golub and LeVeque 1983).

    Args:
        state: Moments so far.
        z: Latents (b, h, w, c).
        mask: Rows to count (b,), 1 or 0.
    """
    rows = mask[:, None, None, None]
    n = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(rows * z, axis=0) / n
    scatter = jnp.sum(rows * (z - mean[None]) ** 2, axis=0)
    n = jnp.sum(mask)
    count = state.count + n
    share = n / jnp.maximum(count, 1.0)
    delta = mean - state.mean
    return StatsState(
        state.step + 1,
        count,
        state.mean + delta * share,
        state.scatter + scatter + delta**2 * state.count * share,
    )


def add_momentum(
    state: StatsState, z: jax.Array, mask: jax.Array, momentum: float
) -> StatsState:
    """Moves mean and variance towards those of a batch, as the official script."""
    rows = mask[:, None, None, None]
    n = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(rows * z, axis=0) / n
    var = jnp.sum(rows * (z - mean[None]) ** 2, axis=0) / n
    return StatsState(
        state.step + 1,
        state.count + jnp.sum(mask),
        (1 - momentum) * state.mean + momentum * mean,
        (1 - momentum) * state.scatter + momentum * var,
    )


def statistics(state: StatsState, mode: str) -> dict[str, np.ndarray]:
    """Returns mean and (biased) variance, float32 (h, w, c)."""
    scatter = np.asarray(state.scatter, np.float64)
    var = scatter if mode == "momentum" else scatter / float(state.count)
    return {"mean": np.asarray(state.mean), "var": var.astype(np.float32)}


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes; `num_steps` 0 stands for one pass."""
    if config.mode not in MODES:
        raise ValueError(configs.suggest(config.mode, MODES, "mode"))
    encoder_def, encoder_shapes = frozen.encoder(config.encoder)
    batch = inputs.abstract_batch(config.data)
    batch["mask"] = jax.ShapeDtypeStruct((config.data.batch_size,), jnp.float32)

    def step(state, networks, batch, key):
        encoder = nnx.merge(encoder_def, networks["encoder"])
        images = inputs.to_float(batch["image"])
        if config.both_orientations:
            images = jnp.concatenate([images, images[:, :, ::-1]])
        z = rae.encode(encoder, images)
        mask = jnp.resize(batch["mask"], z.shape[:1])
        if config.mode == "momentum":
            state = add_momentum(state, z, mask, config.momentum)
        else:
            state = add_exact(state, z, mask)
        return state, {"latent_std": jnp.std(z)}

    return programs.Design(
        init=lambda key: create_state(
            frozen.latent_shape(config.encoder.sizes), config.mode
        ),
        step=step,
        frozen={"encoder": encoder_shapes},
        batch=batch,
        num_steps=config.num_steps,
    )


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads the encoder and assembles the pass."""
    networks = {"encoder": frozen.load_encoder(config.encoder, workdir)}
    run = design(config)
    frozen.check_shapes("The encoder", run.frozen, networks)
    source = inputs.open_source(config.data, config.data.split)
    one_pass = math.ceil(len(source) / config.data.batch_size)
    steps = min(config.num_steps or one_pass, one_pass)
    run = dataclasses.replace(run, num_steps=steps)

    def finish(state: Any, networks: Any, workdir: Path) -> None:
        path = workdir / frozen.STATS_NAME
        partial = path.with_name(f".partial_{path.name}")
        np.savez(partial, **statistics(jax.device_get(state), config.mode))
        partial.replace(path)

    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.eval_batches(config.data, config.data.split),
        finish=finish,
    )
