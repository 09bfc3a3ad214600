"""Linear probes of frozen features, a whole sweep of heads in one run.

arXiv:2401.14404 section 3 and appendix A, after MAE: tokens averaged, batch
normalisation without affine part, one linear layer. Beside the encoder may stand a
random one, latents of its tokenizer and raw pixels, all trained by the same steps. Each
head has an optimiser of its own, so it becomes what it would become alone.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.models import encoders
from rae_jax.trainers import frozen, inputs, probe_heads, probe_scores
from rae_jax.training import optimizers, programs, sharding
from rae_jax.training import state as states

MOMENTUM = 0.1  # Of the running moments, as in PyTorch.
INIT_STD = 0.01


@flax.struct.dataclass
class ProbeState:
    """Stacked heads and running moments of features, by kind of features."""

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes.

    Raises:
        ConfigError: For features, blocks or levels that do not exist, or sizes that do
            not fit together.
    """
    heads = probe_heads.heads(config)
    _check_sizes(config)
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )
    encoder_def, shapes = frozen.encoder(config.encoder)
    probe_heads.check_class_token(config, nnx.merge(encoder_def, shapes))
    networks = {name: shapes for name in _networks(config)}
    batch = inputs.abstract_batch(config.data)
    features_of = _make_features(config, encoder_def)

    def init(key):
        shapes = jax.eval_shape(features_of, networks, batch, key)
        params = {
            name: _init_heads(key, name, x.shape[2], len(heads[name]), config)
            for name, x in shapes.items()
        }
        stats = {
            name: _init_stats(x.shape[0], x.shape[2]) for name, x in shapes.items()
        }
        opt_state = {name: jax.vmap(tx.init)(p) for name, p in params.items()}
        return ProbeState(jnp.zeros((), jnp.int32), params, stats, opt_state)

    step = _make_step(config, tx, schedule, features_of)
    return programs.Design(init, step, networks, batch, config.num_steps)


def _make_features(config: ConfigDict, encoder_def: nnx.GraphDef):
    """Returns (networks, batch, key) -> features (views, b, d) by name.

    They are made of `optimizer.accumulate` parts of the batch, one after the other.
    """
    extract = partial(probe_heads.extract, config, encoder_def)
    count = config.optimizer.accumulate

    def features_of(networks, batch, key):
        def part_of(part):
            return extract(networks, part["image"], part["index"], key)

        if count == 1:
            return part_of(batch)
        parts = jax.tree.map(lambda x: states.split_parts(x, count), batch)
        found = jax.lax.map(part_of, parts)  # (parts, views, rows, d)
        found = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), found)
        found = jax.tree.map(states.join_parts, found)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)

    return features_of


def _make_step(config: ConfigDict, tx, schedule, features_of):
    heads, peak_lr = probe_heads.heads(config), config.optimizer.peak_lr

    def step(state, networks, batch, key):
        key = jax.random.fold_in(key, state.step)
        features = features_of(networks, batch, key)
        moments = {name: probe_scores.moments(x) for name, x in features.items()}
        metrics, params, opt_states = {}, {}, {}
        for name, x in features.items():
            x = probe_scores.normalize(x, moments[name])
            rates = jnp.asarray([head.lr / peak_lr for head in heads[name]])
            losses, params[name], opt_states[name] = _update(
                tx, rates, state.params[name], state.opt_state[name], x, batch["label"]
            )
            for i, head in enumerate(heads[name]):
                metrics[f"loss_{head.name}"] = losses[i]
            metrics |= _guard_metrics(opt_states[name], metrics)
        first = heads[config.features[0]][0].name
        metrics |= {"loss": metrics[f"loss_{first}"], "lr": schedule(state.step)}
        stats = optax.incremental_update(moments, state.stats, MOMENTUM)
        return ProbeState(state.step + 1, params, stats, opt_states), metrics

    return step


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads the encoder, initialises the random one and assembles the run.

    Raises:
        ConfigError: The encoder or the data do not fit the config.
        CheckpointError: The encoder's run has no checkpoint.
    """
    run = design(config)
    inputs.check_classes(config.data, config.num_classes)
    networks = {"encoder": frozen.load_encoder(config.encoder, workdir)}
    if "random" in _networks(config):
        name, sizes = config.encoder.name, config.encoder.sizes.to_dict()
        random = encoders.make_encoder(name, rngs=nnx.Rngs(config.seed), **sizes)
        networks["random"] = states.param_dict(random)
    frozen.check_shapes("The encoder", run.frozen, networks)
    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=probe_scores.make_evaluate(config, mesh),
    )


def _networks(config: ConfigDict) -> list[str]:
    """Returns the names of the frozen networks; the first also gives pixels' sizes."""
    return ["encoder"] + (["random"] if "random" in config.features else [])


def _check_sizes(config: ConfigDict) -> None:
    sizes = (config.data.image_size, config.encoder.sizes.image_size)
    if sizes[0] != sizes[1]:
        raise configs.ConfigError(
            f"data.image_size = {sizes[0]}, but the encoder takes images of {sizes[1]}."
        )
    if "pca" in config.features and config.encoder.name != "ldae":
        raise configs.ConfigError(
            f"The feature 'pca' is a tokenizer's latents; {config.encoder.name!r} has "
            "no tokenizer. Leave it out of config.features."
        )


def _update(tx, rates, params, opt_state, x, labels):
    """Returns the heads' losses, and heads and optimisers one step on.

    Args:
        tx: Optimiser of one head.
        rates: Each head's rate over that of `tx` (heads,).
        params: Stacked heads.
        opt_state: Their optimisers' states.
        x: Normalised features (views, b, d); the heads of a view follow each other.
        labels: Classes (b,).
    """

    def loss_of(params):
        scores = probe_scores.logits(params, x)  # (heads, b, classes)
        targets = jnp.broadcast_to(labels[None, :], scores.shape[:2])
        entropy = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        losses = jnp.mean(entropy, axis=1)
        return jnp.sum(losses), losses

    def update(grads, state, params, loss, rate):
        chain = optax.with_extra_args_support(tx)
        updates, state = chain.update(grads, state, params, value=loss)
        updates = jax.tree.map(lambda u: u * rate, updates)
        return optax.apply_updates(params, updates), state

    grads, losses = jax.grad(loss_of, has_aux=True)(params)
    params, opt_state = jax.vmap(update)(grads, opt_state, params, losses, rates)
    return losses, params, opt_state


def _guard_metrics(opt_state: Any, others: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns the counts of the head that has the most, of all kinds of features."""
    counts = optimizers.guard_metrics(opt_state)
    return {k: jnp.maximum(jnp.max(v), others.get(k, 0.0)) for k, v in counts.items()}


def _init_heads(
    key: jax.Array, name: str, width: int, count: int, config: ConfigDict
) -> dict[str, jax.Array]:
    """Returns heads on the same features, which begin alike."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    kernel = INIT_STD * jax.random.normal(key, (width, config.num_classes))
    return {
        "kernel": jnp.broadcast_to(kernel[None], (count, *kernel.shape)),
        "bias": jnp.zeros((count, config.num_classes)),
    }


def _init_stats(views: int, width: int) -> dict[str, jax.Array]:
    return {"mean": jnp.zeros((views, width)), "var": jnp.ones((views, width))}
