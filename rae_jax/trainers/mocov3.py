"""MoCo v3 pre-training (arXiv:2104.02057): two views of an image find each other.

The momentum encoder is the average of the parameters that every run keeps, with the
schedule of MoCo in the place of a constant decay.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.data import loader, transforms
from rae_jax.evaluation import pictures
from rae_jax.losses import contrastive
from rae_jax.models import mocov3
from rae_jax.trainers import inputs, mae
from rae_jax.training import (
    distributed,
    divergence,
    optimizers,
    programs,
    sharding,
    state,
)

PICTURE_COLUMNS = 10
UNTRAINED = ("pos_embed", "patch_embed")


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    _check(config)
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard"), decayed
    )
    graphdef = state.abstract_model(make_model(config))
    momentum = make_momentum(config.momentum, config.num_steps)

    def step(run_state, frozen, batch, key):
        def loss_of(params, batch, key):
            networks = (params, run_state.ema_params)
            return contrast(graphdef, networks, batch, config.temperature)

        grads, metrics = state.gradients(loss_of, run_state.params, batch, key)
        decay = momentum(run_state.step + 1)
        metrics["momentum"] = decay
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics[divergence.NORMS] = divergence.group_norms(grads)
        metrics["lr"] = state.learning_rate(
            schedule, run_state.step, run_state.opt_state
        )
        run_state = run_state.apply_gradients(grads, tx, decay, metrics["loss"])
        return run_state, metrics | optimizers.guard_metrics(run_state.opt_state)

    return programs.Design(
        init=lambda key: state.create_state(make_model(config), tx, key),
        step=step,
        frozen={},
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def make_model(config: ConfigDict):
    """Returns the constructor of the network, called with `rngs`."""

    def make(rngs):
        size = config.data.image_size
        return mocov3.MoCoV3(image_size=size, rngs=rngs, **config.model)

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Assembles the run.

    Raises:
        ConfigError: There are too few validation images for one batch.
    """
    run = design(config)
    count = len(inputs.open_source(config.data, "validation"))
    _check_size("The number of validation images", count, config.data.batch_size)
    return programs.Program(
        design=run,
        frozen={},
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def make_momentum(start: float, num_steps: int) -> optax.Schedule:
    """Returns step index -> momentum, half a cosine from `start` to 1.

    Raises:
        ConfigError: The start is not within [0, 1].
    """
    if not 0 <= start <= 1:
        raise configs.ConfigError(f"momentum must be within 0 and 1, got {start}.")

    def momentum(step):
        share = jnp.minimum(step / num_steps, 1.0)
        return 1 - (1 - start) * (1 + jnp.cos(jnp.pi * share)) / 2

    return momentum


def decayed(params: Any) -> Any:
    """Marks all that is trained, norms and biases too, as the official code does."""

    def decays(path, _):
        name = jax.tree_util.keystr(path)
        return not any(part in name for part in UNTRAINED)

    return jax.tree.map_with_path(decays, params)


def contrast(
    graphdef: nnx.GraphDef,
    networks: tuple[state.Params, state.Params],
    batch: state.Batch,
    temperature: float,
) -> tuple[jax.Array, state.Metrics]:
    """Returns the loss of a batch with two views, and metrics.

    Args:
        graphdef: Static part of a `MoCoV3`.
        networks: Its parameters, and those of the momentum encoder, which get no
            gradient.
        batch: With the views as uint8 images (b, h, w, 3).
        temperature: See `contrastive.info_nce`.
    """
    base, average = (nnx.merge(graphdef, params) for params in networks)
    views = jnp.stack([batch["image"], batch[transforms.SECOND]], axis=1)
    views = mae.normalized(base.encoder, views)
    keys = jax.lax.stop_gradient(average.project(views))
    return contrastive.symmetric_loss(base(views), keys, temperature)


def _check(config: ConfigDict) -> None:
    if config.data.transform != transforms.MOCO:
        raise configs.ConfigError(
            f"data.transform = {config.data.transform!r}, but the trainer 'mocov3' "
            f"needs two views of each image: set it to {transforms.MOCO!r}."
        )
    if config.optimizer.accumulate != 1:
        raise configs.ConfigError(
            f"optimizer.accumulate = {config.optimizer.accumulate}, but the negatives "
            "of an image are all others of its batch, which must be one part. Use 1, "
            "and more devices or a smaller data.batch_size."
        )
    size = config.data.validation_size
    _check_size("data.validation_size", size, config.data.batch_size)


def _check_size(name: str, size: int, batch_size: int) -> None:
    if size < batch_size:
        raise configs.ConfigError(
            f"{name} = {size}, but the held-out loss needs one batch of {batch_size} "
            "at least: lower data.batch_size."
        )


def held_out_batches(data: ConfigDict) -> loader.Batches:
    """Returns one pass over validation images in two views, always the same."""
    source = inputs.open_source(data, "validation")
    if data.validation_size < len(source):
        source = inputs.choose(source, data.validation_size)
    return loader.eval_batches(
        source,
        inputs.train_transform(data, data.flip),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
    )


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    graphdef = state.abstract_model(make_model(config))
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def score(run_state, batch):
        networks = (run_state.params, run_state.ema_params)
        _, metrics = contrast(graphdef, networks, batch, config.temperature)
        return metrics | {"is_full": jnp.all(batch["mask"] > 0)}

    def evaluate(run_state: Any, _: Any, workdir: Path) -> dict[str, float]:
        found = []
        with held_out_batches(config.data) as batches:
            for batch in batches:
                metrics = score(run_state, loader.to_global(batch, rows))
                metrics = distributed.to_host(metrics)
                # Copies that fill up a batch would be negatives of themselves.
                if metrics.pop("is_full"):
                    found.append(metrics)
        _save_views(config.data, workdir / "views.png")
        return {
            f"held_out_{name}": float(np.mean([metrics[name] for metrics in found]))
            for name in found[0]
        }

    return evaluate


def _save_views(data: ConfigDict, path: Path) -> None:
    """Writes pictures of validation images above two views of each."""
    transform = inputs.train_transform(data, data.flip)
    rng = np.random.default_rng(data.image_size)
    images = inputs.examples(data, "validation", PICTURE_COLUMNS)
    seen = [transform.random_map({"image": image}, rng) for image in images]
    views = [np.stack([x[key] for x in seen]) for key in ("image", transforms.SECOND)]
    pictures.save_rows(path, [images, *views])
