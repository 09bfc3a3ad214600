"""l-DAE pre-training: denoise images whose noise was added in patch-PCA space.

arXiv:2401.14404. The tokenizer is fitted once, before the first step, and stored in
the workdir.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.data import loader
from rae_jax.diffusion import paths, schedules
from rae_jax.evaluation import pictures, reconstruction
from rae_jax.layers import patches
from rae_jax.losses import denoising
from rae_jax.models import ldae, tokenizers
from rae_jax.trainers import frozen, inputs
from rae_jax.training import (
    checkpoints,
    distributed,
    optimizers,
    programs,
    sharding,
    state,
)

PICTURE_LEVEL = 0.4  # Share of the noise levels: detail is gone, layout is not.
PICTURE_COLUMNS = 10


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )

    def loss_fn(model, pca, batch, key):
        images = inputs.to_float(batch["image"])
        return denoising.denoising_loss(
            model, images, pca, key, patch_size=_patch_size(config), **config.noise
        )

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
        frozen=_abstract_pca(config),
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def make_model(config: ConfigDict):
    """Returns the constructor of the denoiser, called with `rngs`."""
    patch_dim = 3 * _patch_size(config) ** 2
    latent_dim = config.tokenizer.latent_dim
    noise = config.noise
    in_image = noise.input_space == "image"
    out_latent = noise.target in ("eps", "latent")

    def make(rngs):
        return ldae.LDAE(
            grid=config.data.image_size // _patch_size(config),
            in_features=patch_dim if in_image else latent_dim,
            out_features=latent_dim if out_latent else patch_dim,
            rngs=rngs,
            **config.model,
        )

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Fits or reads the tokenizer and assembles the run."""
    run = design(config)  # A wrong config fails before the tokenizer is stored.
    path = workdir / frozen.TOKENIZER_NAME
    # Without a checkpoint the file may be that of another config, tried before.
    is_missing = checkpoints.finished_step(workdir) is None or not path.is_file()
    if is_missing and distributed.is_main():
        components = fit_pca(config)
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizers.save_components(path, components)
    distributed.barrier("the tokenizer")
    tokenizer = config.tokenizer
    pca = tokenizers.make_pca(
        tokenizers.load_components(path), tokenizer.latent_dim, tokenizer.norm
    )
    return programs.Program(
        design=run,
        frozen=sharding.place(pca, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def fit_pca(config: ConfigDict) -> dict[str, np.ndarray]:
    """Fits the patch PCA on training images, one streaming pass in float64."""
    size = _patch_size(config)
    moments = tokenizers.PatchMoments(3 * size**2)
    limit = config.tokenizer.num_images
    data = config.data
    with inputs.eval_batches(data, data.split, limit=limit, shared=False) as batches:
        for batch in batches:
            images = batch["image"][batch["mask"] > 0]
            tokens = patches.patchify(images, size).reshape(-1, 3 * size**2)
            moments.add(tokens / 127.5 - 1.0)
    return moments.components()


def denoise(
    model: nnx.Module, pca: tokenizers.PatchPCA, images: jax.Array, config: ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Noises images at a fixed level and predicts them back, for pictures.

    Returns:
        The noisy and the predicted images (b, h, w, 3) in [0, 1], not clipped.
    """
    size, noise = _patch_size(config), config.noise
    gamma, sigma = schedules.noise_schedule(noise.schedule, noise.num_levels)
    level = int(PICTURE_LEVEL * noise.num_levels)
    z = pca.encode(patches.patchify(2 * images - 1, size))
    t = jnp.full(images.shape[:1], level)
    eps = jax.random.normal(jax.random.key(0), z.shape)
    z_t = paths.diffuse(z, eps, jnp.asarray(gamma)[t], jnp.asarray(sigma)[t])
    noisy = pca.decode(z_t)
    out = model(noisy if noise.input_space == "image" else z_t, t)
    if noise.target == "eps":
        scale = jnp.maximum(gamma[level], 1e-2)
        out = pca.decode((z_t - sigma[level] * out) / scale)
    elif noise.target == "latent":
        out = pca.decode(out)
    return tuple((patches.unpatchify(x, size) + 1) / 2 for x in (noisy, out))


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    graphdef = state.abstract_model(make_model(config))
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def predict(params, pca, images):
        images = inputs.to_float(images)
        noisy, out = denoise(nnx.merge(graphdef, params), pca, images, config)
        return noisy, out, reconstruction.image_scores(images, out)

    def evaluate(run_state: Any, pca: Any, workdir: Path) -> dict[str, float]:
        params, scores = run_state.ema_params, reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                values = predict(params, pca, arrays["image"])[2]
                values, mask = distributed.to_host((values, arrays["mask"]))
                scores = scores.add(values, mask)
        images = inputs.examples(config.data, "validation", PICTURE_COLUMNS)
        noisy, out, _ = predict(params, pca, images)
        pictures.save_rows(workdir / "denoising.png", [images, noisy, out])
        return {f"denoised_{k}": v for k, v in scores.means().items()}

    return evaluate


def _patch_size(config: ConfigDict) -> int:
    return config.tokenizer.patch_size


def _abstract_pca(config: ConfigDict) -> tokenizers.PatchPCA:
    dim, latent_dim = 3 * _patch_size(config) ** 2, config.tokenizer.latent_dim
    shapes = ((dim,), (dim, dim), (latent_dim,))
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return tokenizers.PatchPCA(*arrays, latent_dim)
