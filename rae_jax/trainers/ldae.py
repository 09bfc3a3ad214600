"""l-DAE pre-training: denoise images whose noise was added in a tokenizer's space.

arXiv:2401.14404, every step from a latent diffusion model to the final form. The
tokenizer is fitted or loaded once, before the first step, and stored in the workdir.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.data import loader
from rae_jax.diffusion import ancestral, schedules
from rae_jax.evaluation import pictures, reconstruction
from rae_jax.layers import conditioning, patches
from rae_jax.losses import denoising
from rae_jax.models import ldae
from rae_jax.trainers import inputs, tokenizing
from rae_jax.training import distributed, optimizers, programs, sharding, state

PICTURE_LEVEL = 0.4  # Share of the noise levels: detail is gone, layout is not.
PICTURE_COLUMNS = 10
SSIM_SIDE = 11  # Of its window.
LABEL_KEY = 2**31 - 1  # Dropping labels leaves the draws of a run without them.
UNLABELLED = ("flat_folder",)


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes.

    Raises:
        ConfigError: Settings are unknown, or exclude each other.
    """
    check(config)
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )
    step = state.make_step(
        state.abstract_model(make_model(config)),
        make_loss(config),
        tx,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        schedule=schedule,
    )
    return programs.Design(
        init=lambda key: state.create_state(make_model(config), tx, key),
        step=step,
        frozen=tokenizing.abstract(config),
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def check(config: ConfigDict) -> None:
    """Raises a ConfigError where parts of a config exclude each other."""
    tokenizing.check(config)
    denoising.check(
        **config.noise,
        tokenizer=config.tokenizer.get("name", "pca"),
        learn_sigma=config.model.get("learn_sigma", False),
    )
    if not 1 <= config.encoder_depth <= config.model.depth:
        raise configs.ConfigError(
            f"encoder_depth = {config.encoder_depth} is not within 1 and model.depth = "
            f"{config.model.depth}."
        )
    if num_classes(config) and config.data.source in UNLABELLED:
        raise configs.ConfigError(
            f"model.num_classes = {num_classes(config)} needs labels, which images of "
            f"the source {config.data.source!r} have not: set it to 0, or sort them "
            "into one folder per class for the source 'class_folder'."
        )


def num_classes(config: ConfigDict) -> int:
    """Returns the number of classes that the network is conditioned on, or 0."""
    return config.model.get("num_classes", 0)  # The configs of older runs do not say.


def make_model(config: ConfigDict):
    """Returns the constructor of the denoiser, called with `rngs`."""
    patch_size = config.tokenizer.patch_size
    patch_dim = 3 * patch_size**2
    latent_dim = config.tokenizer.latent_dim
    in_image = config.noise.input_space == "image"
    out_latent = config.noise.target in denoising.LATENT_TARGETS

    def make(rngs):
        return ldae.LDAE(
            grid=config.data.image_size // patch_size,
            in_features=patch_dim if in_image else latent_dim,
            out_features=latent_dim if out_latent else patch_dim,
            rngs=rngs,
            **config.model,
        )

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Fits or reads the tokenizer and assembles the run.

    Raises:
        ConfigError: A class-conditional network has too few classes, or the data none.
    """
    run = design(config)  # A wrong config fails before the tokenizer is stored.
    if num_classes(config):
        _check_classes(config)
    tokenizer = tokenizing.build(config, workdir, mesh)
    return programs.Program(
        design=run,
        frozen=sharding.place(tokenizer, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def _check_classes(config: ConfigDict) -> None:
    found, given = inputs.train_source(config.data).num_classes, num_classes(config)
    if found == 1:
        raise configs.ConfigError(
            f"model.num_classes = {given}, but all images of {config.data.path!r} have "
            "one label: set it to 0."
        )
    if found > given:
        raise configs.ConfigError(
            f"model.num_classes = {given}, but the data has {found} classes."
        )


def make_loss(config: ConfigDict) -> state.LossFn:
    """Returns the loss of a run: (model, tokenizer, batch, key) -> loss, metrics."""
    options = dict(config.noise, learn_sigma=config.model.get("learn_sigma", False))

    def loss_fn(model, tokenizer, batch, key):
        y = None
        if model.num_classes:
            label_key = jax.random.fold_in(key, LABEL_KEY)
            rate, null = model.class_dropout_prob, model.num_classes
            y = conditioning.drop_labels(batch["label"], label_key, rate, null)
        return denoising.denoising_loss(
            lambda x, t: model(x, t, y),
            inputs.to_float(batch["image"]),
            tokenizer,
            key,
            **options,
        )

    return loss_fn


def predict_x(
    model: nnx.Module,
    tokenizer: Any,
    z_t: jax.Array,
    t: jax.Array,
    config: ConfigDict,
) -> jax.Array:
    """Returns the clean images (b, h, w, 3) in [-1, 1] that a network predicts.

    Args:
        model: The denoiser, called without classes.
        tokenizer: Its tokenizer.
        z_t: Noisy latents (b, n, d).
        t: Their levels (b,).
        config: Config of the run.
    """
    noise = config.noise
    spaces = dict(input_space=noise.input_space, schedule=noise.schedule)
    out = model(*denoising.network_inputs(tokenizer, z_t, t, **spaces))
    if config.model.get("learn_sigma", False):
        out = jnp.split(out, 2, axis=-1)[0]
    if noise.target not in denoising.LATENT_TARGETS:
        return patches.unpatchify(out, tokenizer.patch_size)
    if noise.target == "eps":
        tables = schedules.noise_schedule(noise.schedule, noise.num_levels)
        gamma, sigma = (jnp.asarray(table)[t] for table in tables)
        gamma = jnp.maximum(gamma, 1e-2)  # At the end of "linear_gamma2" it is 0.
        out = ancestral.predicted_x(out, z_t, gamma, sigma, "eps")
    return tokenizer.decode(out)


def denoise(
    model: nnx.Module,
    tokenizer: Any,
    images: jax.Array,
    config: ConfigDict,
    level: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Noises images at a fixed level and predicts them back, for pictures.

    Args:
        model: The denoiser.
        tokenizer: Its tokenizer.
        images: Images (b, h, w, 3) in [0, 1].
        config: Config of the run.
        level: Noise level; two fifths of them if None.

    Returns:
        The noisy and the predicted images (b, h, w, 3) in [0, 1], not clipped.
    """
    noise = config.noise
    level = int(PICTURE_LEVEL * noise.num_levels) if level is None else level
    t = jnp.full(images.shape[:1], level)
    grid = images.shape[1] // tokenizer.patch_size
    shape = (len(images), grid**2, tokenizer.latent_dim)
    eps = jax.random.normal(jax.random.key(0), shape)
    space = dict(schedule=noise.schedule, num_levels=noise.num_levels)
    _, z_t = denoising.noised(tokenizer, 2 * images - 1, t, eps, **space)
    predicted = predict_x(model, tokenizer, z_t, t, config)
    return tuple((x + 1) / 2 for x in (tokenizer.decode(z_t), predicted))


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    graphdef = state.abstract_model(make_model(config))
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def predict(params, tokenizer, images):
        images = inputs.to_float(images)
        noisy, out = denoise(nnx.merge(graphdef, params), tokenizer, images, config)
        return noisy, out, image_scores(images, out)

    def evaluate(run_state: Any, tokenizer: Any, workdir: Path) -> dict[str, float]:
        params, scores = run_state.ema_params, reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                values = predict(params, tokenizer, arrays["image"])[2]
                values, mask = distributed.to_host((values, arrays["mask"]))
                scores = scores.add(values, mask)
        images = inputs.examples(config.data, "validation", PICTURE_COLUMNS)
        noisy, out, _ = predict(params, tokenizer, images)
        pictures.save_rows(workdir / "denoising.png", [images, noisy, out])
        return {f"denoised_{k}": v for k, v in scores.means().items()}

    return evaluate


def image_scores(images: jax.Array, out: jax.Array) -> dict[str, jax.Array]:
    """Returns PSNR and, where images are large enough for its window, SSIM (b,)."""
    if images.shape[1] >= SSIM_SIDE:
        return reconstruction.image_scores(images, out)
    a, b = (reconstruction.to_uint8(x) / 255.0 for x in (images, out))
    return {"psnr": reconstruction.psnr(a, b)}
