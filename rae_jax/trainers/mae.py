"""MAE pre-training (arXiv:2111.06377): predict the patches that are not seen."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.data import loader
from rae_jax.evaluation import pictures, reconstruction
from rae_jax.layers import patches
from rae_jax.losses import masked
from rae_jax.models import mae
from rae_jax.trainers import inputs
from rae_jax.training import distributed, optimizers, programs, sharding, state

PICTURE_COLUMNS = 10
GRAY = 0.5  # Of patches that are not seen, in pictures.


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard"), decayed
    )

    def loss_fn(model, _, batch, key):
        images = normalized(model.encoder, batch["image"])
        noise = jax.random.uniform(key, (len(images), model.num_patches))
        loss, _ = errors(model, images, noise, config.norm_pixels)
        return loss, {"loss": loss}

    step = state.make_step(
        state.abstract_model(make_model(config)),
        loss_fn,
        tx,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        schedule=schedule,
    )
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
        return mae.MAE(image_size=config.data.image_size, rngs=rngs, **config.model)

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Assembles the run."""
    return programs.Program(
        design=design(config),
        frozen={},
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def decayed(params: Any) -> Any:
    """Marks all but biases, norms and fixed positions, as the official code does."""

    def decays(path, x):
        name = jax.tree_util.keystr(path)
        return x.ndim - ("blocks" in name) >= 2 and "pos_embed" not in name

    return jax.tree.map_with_path(decays, params)


def normalized(encoder: nnx.Module, images: jax.Array) -> jax.Array:
    """Maps uint8 pixels (..., h, w, 3) to those that an encoder takes."""
    channels = (1,) * (images.ndim - 1) + (3,)
    mean = jnp.reshape(jnp.asarray(encoder.image_mean), channels)
    std = jnp.reshape(jnp.asarray(encoder.image_std), channels)
    return (inputs.to_float(images) - mean) / std


def errors(
    model: mae.MAE, images: jax.Array, noise: jax.Array, norm_pixels: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of normalised images and its share per image (b,)."""
    predicted, mask = model(images, noise)
    cut = patches.patchify(images, model.patch_size)
    target, _, _ = masked.targets(cut, norm_pixels=norm_pixels)
    return masked.masked_loss(predicted, target, mask)


def reconstruct(
    model: mae.MAE, images: jax.Array, noise: jax.Array, norm_pixels: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns normalised images as they are seen, and with predictions put in.

    A model of normalised patches is told their means and deviations, as in the
    official pictures. What is not seen is grey, pixels of `GRAY`.
    """
    predicted, mask = model(images, noise)
    cut = patches.patchify(images, model.patch_size)
    _, mean, std = masked.targets(cut, norm_pixels=norm_pixels)
    gray = [
        (GRAY - m) / s
        for m, s in zip(model.encoder.image_mean, model.encoder.image_std, strict=True)
    ]
    gray = jnp.tile(jnp.asarray(gray), model.patch_size**2)[None, None, :]
    hidden = mask[:, :, None] > 0
    rows = (jnp.where(hidden, x, cut) for x in (gray, predicted * std + mean))
    return tuple(patches.unpatchify(x, model.patch_size) for x in rows)


def _noise(index: jax.Array, num_patches: int) -> jax.Array:
    """Returns noise (b, n) that belongs to the images of these indices."""
    key = jax.random.key(0)
    draw = jax.vmap(
        lambda i: jax.random.uniform(jax.random.fold_in(key, i), (num_patches,))
    )
    return draw(index)


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    graphdef = state.abstract_model(make_model(config))
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def score(params, batch):
        model = nnx.merge(graphdef, params)
        images = normalized(model.encoder, batch["image"])
        noise = _noise(batch["index"], model.num_patches)
        return {"held_out_loss": errors(model, images, noise, config.norm_pixels)[1]}

    @jax.jit
    def show(params, images):
        model = nnx.merge(graphdef, params)
        noise = _noise(jnp.arange(len(images)), model.num_patches)
        given = normalized(model.encoder, images)
        found = reconstruct(model, given, noise, config.norm_pixels)
        mean, std = (jnp.asarray(getattr(model.encoder, k)) for k in _STATISTICS)
        return [x * std[None, None, None, :] + mean[None, None, None, :] for x in found]

    def evaluate(run_state: Any, _: Any, workdir: Path) -> dict[str, float]:
        scores = reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                values = score(run_state.params, arrays)
                values, mask = distributed.to_host((values, arrays["mask"]))
                scores = scores.add(values, mask)
        images = inputs.examples(config.data, "validation", PICTURE_COLUMNS)
        seen, found = show(run_state.params, images)
        pictures.save_rows(workdir / "masked.png", [images, seen, found])
        return scores.means()

    return evaluate


_STATISTICS = ("image_mean", "image_std")
