"""Mean and variance of an encoder's latents, per position and channel.

The exact mode makes one streaming pass with Chan's update, so the result depends
neither on batch size nor on order, up to rounding. The momentum mode repeats the
official script of arXiv:2510.11690: an exponential average over the batches.

A KL autoencoder's latents are random, and none is drawn: their variance given the image
is added to that of their means.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.models import rae
from rae_jax.trainers import frozen, inputs, latents
from rae_jax.training import distributed, programs, sharding

MODES = ("exact", "momentum")

Spread = jax.Array | None


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


def add_exact(
    state: StatsState, z: jax.Array, mask: jax.Array, spread: Spread = None
) -> StatsState:
    """Merges the moments of a batch (Chan, Golub and LeVeque 1983).

    Args:
        state: Moments so far.
        z: Latents (b, h, w, c), or their means.
        mask: Rows to count (b,), 1 or 0.
        spread: Variances (b, h, w, c) about these means; None for 0.
    """
    rows = mask[:, None, None, None]
    n = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(rows * z, axis=0) / n
    scatter = jnp.sum(rows * _squares(z, mean, spread), axis=0)
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
    state: StatsState,
    z: jax.Array,
    mask: jax.Array,
    momentum: float,
    spread: Spread = None,
) -> StatsState:
    """Moves mean and variance towards those of a batch, as the official script."""
    rows = mask[:, None, None, None]
    n = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(rows * z, axis=0) / n
    var = jnp.sum(rows * _squares(z, mean, spread), axis=0) / n
    return StatsState(
        state.step + 1,
        state.count + jnp.sum(mask),
        (1 - momentum) * state.mean + momentum * mean,
        (1 - momentum) * state.scatter + momentum * var,
    )


def _squares(z: jax.Array, mean: jax.Array, spread: Spread) -> jax.Array:
    squares = (z - mean[None]) ** 2
    return squares if spread is None else squares + spread


def statistics(state: StatsState, mode: str) -> dict[str, np.ndarray]:
    """Returns mean and (biased) variance, float32 (h, w, c)."""
    scatter = np.asarray(state.scatter, np.float64)
    var = scatter if mode == "momentum" else scatter / float(state.count)
    return {"mean": np.asarray(state.mean), "var": var.astype(np.float32)}


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes; `num_steps` 0 stands for one pass."""
    if config.mode not in MODES:
        raise ValueError(configs.suggest(config.mode, MODES, "mode"))
    both = config.both_orientations
    batch, read = (
        latents.abstract_batch(config, both=both),
        latents.reader(config, both=both),
    )
    batch["mask"] = jax.ShapeDtypeStruct((config.data.batch_size,), jnp.float32)

    def step(state, networks, batch, key):
        encoder, raw = read(networks, batch)
        z = rae.to_latents(encoder, raw)
        spread = rae.latent_variance(encoder, raw)
        mask = jnp.resize(batch["mask"], z.shape[:1])
        if config.mode == "momentum":
            state = add_momentum(state, z, mask, config.momentum, spread)
        else:
            state = add_exact(state, z, mask, spread)
        return state, {"latent_std": jnp.std(z)}

    return programs.Design(
        init=lambda key: create_state(
            frozen.latent_shape(config.encoder.sizes), config.mode
        ),
        step=step,
        frozen=latents.encoder(config),
        batch=batch,
        num_steps=config.num_steps,
    )


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads the encoder and assembles the pass."""
    networks = latents.load_encoder(config, workdir)
    run = design(config)
    frozen.check_shapes("The encoder", run.frozen, networks)
    source, both = inputs.train_source(config.data), config.both_orientations
    one_pass = math.ceil(len(source) / config.data.batch_size)
    steps = min(config.num_steps or one_pass, one_pass)
    run = dataclasses.replace(run, num_steps=steps)

    def finish(state: Any, networks: Any, workdir: Path) -> None:
        path = workdir / frozen.STATS_NAME
        found = statistics(distributed.to_host(state), config.mode)
        if distributed.is_main():
            with storage.writing(path) as file:
                np.savez(file, **found)

    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.one_pass(config.data, both=both),
        finish=finish,
    )
