"""Linear probes of frozen features, several kinds in one run.

arXiv:2401.14404 section 3: tokens averaged, batch normalisation without affine part,
one linear layer. Beside the encoder stand a random one, patch-PCA coefficients and
raw pixels, all trained by the same steps.
"""

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
from rae_jax.data import loader
from rae_jax.evaluation import reconstruction
from rae_jax.layers import patches
from rae_jax.models import encoders
from rae_jax.trainers import frozen, inputs
from rae_jax.training import distributed, optimizers, programs, sharding
from rae_jax.training import state as states

FEATURES = ("encoder", "random", "pca", "pixels")
MOMENTUM = 0.1
EPS = 1e-6


@flax.struct.dataclass
class ProbeState:
    """Linear layers and running feature moments, by feature name."""

    step: jax.Array
    params: Any
    stats: Any
    opt_state: optax.OptState


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    for name in config.features:
        if name not in FEATURES:
            raise ValueError(configs.suggest(name, FEATURES, "feature"))
    sizes = (config.data.image_size, config.encoder.sizes.image_size)
    if sizes[0] != sizes[1]:
        raise configs.ConfigError(
            f"data.image_size = {sizes[0]}, but the encoder takes images of {sizes[1]}."
        )
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )
    tx = optax.with_extra_args_support(tx)
    encoder_def, shapes = frozen.encoder(config.encoder)
    networks = {"encoder": shapes, "random": shapes}
    batch = inputs.abstract_batch(config.data)

    def features_of(networks, images):
        return extract(config, encoder_def, networks, images)

    widths = jax.eval_shape(features_of, networks, batch["image"])

    def init(key):
        keys = dict(zip(widths, jax.random.split(key, len(widths)), strict=True))
        params = {n: _init_head(keys[n], w.shape[1], config) for n, w in widths.items()}
        stats = {n: _init_stats(w.shape[1]) for n, w in widths.items()}
        return ProbeState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))

    def loss_of(params, features, labels):
        losses = {
            name: jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(
                    logits(params[name], x), labels
                )
            )
            for name, x in features.items()
        }
        return sum(losses.values()), losses

    def step(state, networks, batch, key):
        features = features_of(networks, batch["image"])
        moments = {n: _moments(x) for n, x in features.items()}
        normed = {n: _normalize(x, moments[n]) for n, x in features.items()}
        grads, losses = jax.grad(loss_of, has_aux=True)(
            state.params, normed, batch["label"]
        )
        loss = sum(losses.values())
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        stats = optax.incremental_update(moments, state.stats, MOMENTUM)
        metrics = {f"loss_{n}": x for n, x in losses.items()}
        metrics |= {"loss": losses[config.features[0]], "lr": schedule(state.step)}
        metrics |= optimizers.guard_metrics(opt_state)
        return ProbeState(state.step + 1, params, stats, opt_state), metrics

    return programs.Design(init, step, networks, batch, config.num_steps)


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads the encoder, initialises the random one and assembles the run."""
    sizes = config.encoder.sizes.to_dict()
    random = encoders.make_encoder(
        config.encoder.name, rngs=nnx.Rngs(config.seed), **sizes
    )
    networks = {
        "encoder": frozen.load_encoder(config.encoder, workdir),
        "random": states.param_dict(random),
    }
    run = design(config)
    frozen.check_shapes("The encoder", run.frozen, networks)
    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def extract(
    config: ConfigDict, encoder_def: nnx.GraphDef, networks: Any, images: jax.Array
) -> dict[str, jax.Array]:
    """Returns the features (b, d) of uint8 images, by name.

    The encoders' tokens are averaged; PCA coefficients and pixels are kept whole,
    which favours them: they still know where everything is.
    """
    encoder = nnx.merge(encoder_def, networks["encoder"])
    mean = jnp.asarray(encoder.image_mean)[None, None, None, :]
    std = jnp.asarray(encoder.image_std)[None, None, None, :]
    x = (inputs.to_float(images) - mean) / std
    features = {}
    for name in config.features:
        if name in ("encoder", "random"):
            network = nnx.merge(encoder_def, networks[name])
            features[name] = jnp.mean(network.raw_features(x), axis=1)
        elif name == "pca":
            tokens = patches.patchify(x, encoder.patch_size)
            center = encoder.pca_mean[None, None, :]
            tokens = (tokens - center) @ encoder.pca_basis[...].T
            features[name] = tokens.reshape(len(x), -1)
        else:
            features[name] = x.reshape(len(x), -1)
    return features


def logits(head: Any, x: jax.Array) -> jax.Array:
    """Maps normalised features (b, d) to class scores (b, classes)."""
    return x @ head["kernel"] + head["bias"][None, :]


def _init_head(key: jax.Array, width: int, config: ConfigDict) -> dict[str, jax.Array]:
    shape = (width, config.num_classes)
    return {
        "kernel": 0.01 * jax.random.normal(key, shape),
        "bias": jnp.zeros(config.num_classes),
    }


def _init_stats(width: int) -> dict[str, jax.Array]:
    return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def _moments(x: jax.Array) -> dict[str, jax.Array]:
    return {"mean": jnp.mean(x, axis=0), "var": jnp.var(x, axis=0)}


def _normalize(x: jax.Array, moments: dict[str, jax.Array]) -> jax.Array:
    scale = jax.lax.rsqrt(moments["var"] + EPS)
    return (x - moments["mean"][None, :]) * scale[None, :]


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    encoder_def, _ = frozen.encoder(config.encoder)
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def correct(state, networks, batch):
        features = extract(config, encoder_def, networks, batch["image"])
        found = {}
        for name, x in features.items():
            scores = logits(state.params[name], _normalize(x, state.stats[name]))
            hits = jnp.argmax(scores, axis=-1) == batch["label"]
            found[f"top1_{name}"] = hits.astype(jnp.float32)
        return found

    def evaluate(state: Any, networks: Any, workdir: Path) -> dict[str, float]:
        scores = reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                hits = correct(state, networks, arrays)
                hits, mask = distributed.to_host((hits, arrays["mask"]))
                scores = scores.add(hits, mask)
        return scores.means()

    return evaluate
