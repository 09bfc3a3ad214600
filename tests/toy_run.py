"""A run of the training loop that compiles in a moment: a linear model."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax.training import loop, optimizers, programs, sharding, state

ROWS, WIDTH, OUT = 8, 16, 4


def config(**changes) -> ConfigDict:
    """Returns a config for `loop.run` that logs and saves each step."""
    c = blocks.run("toy", num_steps=6)
    c.every = dict(log=1, checkpoint=1, evaluate=0)
    c.keep = 100
    c.optimizer = blocks.optimizer(peak_lr=1e-2)
    c.update(changes)
    return c.lock()


class Batches:
    """Batch k is a function of k; `poison` names one that holds a NaN."""

    def __init__(self, poison: int = 0):
        self.position, self.poison = 0, poison

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        x = np.random.default_rng(self.position).normal(size=(ROWS, WIDTH))
        if self.position == self.poison:
            x[0, 0] = np.nan
        return {"x": x.astype(np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, data_state):
        self.position = data_state["position"]

    def close(self):
        pass


def program(config: ConfigDict, *, poison: int = 0, evaluate=None) -> programs.Program:
    """Returns noisy linear regression onto fixed targets."""
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.guard
    )

    def make(rngs):
        return nnx.Linear(WIDTH, OUT, rngs=rngs)

    def loss_fn(model, target, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        loss = jnp.mean((model(x) - batch["x"] @ target) ** 2)
        return loss, {"loss": loss}

    design = programs.Design(
        init=lambda key: state.create_state(make, tx, key),
        step=state.make_step(
            state.abstract_model(make), loss_fn, tx, ema_decay=0.9, schedule=schedule
        ),
        frozen=jax.ShapeDtypeStruct((WIDTH, OUT), jnp.float32),
        batch={"x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)},
        num_steps=config.num_steps,
    )
    target = np.random.default_rng(0).normal(size=(WIDTH, OUT)).astype(np.float32)
    mesh = sharding.make_mesh(config.mesh)
    return programs.Program(
        design=design,
        frozen=sharding.place(target, mesh),
        batches=lambda: Batches(poison),
        evaluate=evaluate,
    )


def train(workdir, **options):
    """Runs three steps, or goes on to them; `config` changes the config."""
    changes = options.pop("config", {})
    chosen = config(**dict(num_steps=3) | changes)
    return loop.run(program(chosen), chosen, workdir, **options)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((a, b)))
