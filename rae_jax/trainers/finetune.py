"""End-to-end fine-tuning of a pre-trained encoder as a classifier.

arXiv:2401.14404 appendix B, which follows MAE (arXiv:2111.06377): layer-wise decay of
rates, stochastic depth, mixup and cutmix, and an average of the weights. An encoder of
l-DAE is first merged into the plain ViT that it is at its noise level.
"""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.data import loader
from rae_jax.evaluation import reconstruction
from rae_jax.losses import mixing
from rae_jax.models import encoders, ldae_merging, vit, vit_classifier, vit_encoder
from rae_jax.trainers import frozen, inputs
from rae_jax.training import (
    checkpoints,
    distributed,
    optimizers,
    programs,
    sharding,
    state,
)

RESULT_NAME = "finetune.json"


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes.

    Raises:
        ConfigError: The encoder is no vision transformer, or sizes do not fit.
    """
    sizes = (config.data.image_size, config.encoder.sizes.image_size)
    if sizes[0] != sizes[1]:
        raise configs.ConfigError(
            f"data.image_size = {sizes[0]}, but the encoder takes images of {sizes[1]}."
        )
    tx, schedule = optimizers.make_optimizer(
        config.optimizer,
        config.num_steps,
        config.get("guard"),
        rates=partial(optimizers.layer_rates, decay=config.layer_decay),
    )
    make = make_model(config)
    step = state.make_step(
        state.abstract_model(make),
        _make_loss(config),
        tx,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        schedule=schedule,
    )
    return programs.Design(
        init=lambda key: state.create_state(make, tx, key),
        step=step,
        frozen={},
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def make_model(config: ConfigDict):
    """Returns the constructor of the classifier, called with `rngs`.

    Raises:
        ConfigError: The encoder is no vision transformer.
    """
    arguments = vit_arguments(config) | {"remat": config.model.remat}
    make_encoder = partial(vit_encoder.ViTEncoder, **arguments)
    return partial(
        vit_classifier.ViTClassifier,
        make_encoder,
        config.model.num_classes,
        token=config.model.token,
    )


def vit_arguments(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of the plain ViT that a config's encoder is or becomes."""
    block = config.encoder
    if block.name == "ldae":
        model = nnx.merge(*frozen.encoder(block))
        ldae_merging.check(model.arguments)
        found = ldae_merging.vit_arguments(model.arguments)
    elif block.name in encoders.OWN_DECODER:
        raise configs.ConfigError(
            f"The encoder {block.name!r} is no vision transformer; fine-tune another."
        )
    else:
        found = {"name": block.name} | block.sizes.to_dict()
    return {k: v for k, v in found.items() if k not in ("normalize", "layers")}


def load_encoder(config: ConfigDict, workdir: Path) -> state.Params:
    """Reads the weights with which the classifier's encoder begins.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError, ValueError: See
            `frozen.load_encoder`.
    """
    block = config.encoder.copy_and_resolve_references()
    if block.name != "ldae":
        with block.unlocked():
            block.sizes.normalize = config.model.token == "mean"
            block.sizes.layers = ()
        return frozen.load_encoder(block, workdir)
    params = frozen.load_encoder(block, workdir)
    merged = nnx.merge(frozen.encoder(block)[0], params).merged()
    return state.param_dict(merged)


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads the encoder and assembles the run."""
    run = design(config)
    inputs.check_classes(config.data, config.model.num_classes)
    expected = jax.eval_shape(run.init, jax.random.key(0)).params["encoder"]

    @functools.cache
    def loaded() -> state.Params:
        # On the host: the devices hold what becomes of it, and need it no more.
        found = jax.tree.map(np.asarray, load_encoder(config, workdir))
        frozen.check_shapes("The encoder", expected, found)
        return found

    def begin(new: state.TrainState) -> state.TrainState:
        placed = jax.tree.map(jnp.copy, sharding.place(loaded(), mesh))
        averages = jax.tree.map(jnp.copy, placed)  # Donation forbids shared buffers.
        return new.replace(
            params=new.params | {"encoder": placed},
            ema_params=new.ema_params | {"encoder": averages},
        )

    is_random = config.encoder.weights == frozen.RANDOM  # Then as the design draws it.
    if not is_random and checkpoints.finished_step(workdir) is None:
        loaded()  # A run that goes on does not need it; a new one fails here.
    return programs.Program(
        design=run,
        frozen={},
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
        begin=None if is_random else begin,
    )


def _make_loss(config: ConfigDict):
    def loss_fn(model, frozen, batch, key):
        of_mixing, of_paths = jax.random.split(key)
        images, targets = mixing.mix(
            inputs.to_float(batch["image"]),
            batch["label"],
            of_mixing,
            num_classes=config.model.num_classes,
            **config.mixing,
        )
        keep, rate = None, config.model.drop_path_rate
        if rate:
            keep = vit.draw_keep(of_paths, rate, model.depth, len(images))
        loss = mixing.soft_cross_entropy(model(images, keep), targets)
        return loss, {"loss": loss}

    return loss_fn


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    graphdef = state.abstract_model(make_model(config))
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def hits_of(params, batch):
        scores = nnx.merge(graphdef, params)(inputs.to_float(batch["image"]))
        return (jnp.argmax(scores, axis=-1) == batch["label"]).astype(jnp.float32)

    def evaluate(run_state: Any, frozen: Any, workdir: Path) -> dict[str, float]:
        scores = reconstruction.ReconstructionScores()
        weights = {"top1": run_state.params, "ema_top1": run_state.ema_params}
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                hits = {
                    name: hits_of(params, arrays) for name, params in weights.items()
                }
                hits, mask = distributed.to_host((hits, arrays["mask"]))
                scores = scores.add(hits, mask)
        if distributed.is_main():
            content = {"row": config.row, "tier": config.tier}
            content |= {"encoder": config.encoder.weights} | scores.means()
            text = json.dumps(content, indent=2) + "\n"
            storage.write_atomically(workdir / RESULT_NAME, text.encode())
        return scores.means()

    return evaluate
