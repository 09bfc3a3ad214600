"""Trained tokenizers of l-DAE: linear maps of patches, and convolutions.

arXiv:2401.14404 section 4.2; the convolutional ones are the autoencoders of latent
diffusion (arXiv:2112.10752) with and without LPIPS and a critic (`tokenizer_critic`).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.data import loader
from rae_jax.evaluation import pictures, reconstruction
from rae_jax.losses import autoencoding
from rae_jax.models import learned_tokenizers, tokenizers
from rae_jax.trainers import frozen, inputs, tokenizer_critic
from rae_jax.trainers import tokenizer_networks as networks
from rae_jax.training import distributed, optimizers, programs, sharding, state

PICTURE_COLUMNS = 10
TRAINED = ("patch_ae", "patch_vae", "conv_vae")


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes.

    Raises:
        ConfigError: There is nothing to train, or sizes do not fit together.
    """
    _check(config)
    if config.critic.weight:
        training = tokenizer_critic.CriticTraining(config, make_model(config))
        init, step = training.init, training.step
    else:
        init, step = _plain_training(config)
    return programs.Design(
        init=init,
        step=step,
        frozen=_abstract_networks(config),
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def make_model(config: ConfigDict) -> Callable[..., nnx.Module]:
    """Returns the constructor of the autoencoder, called with `rngs`."""
    return partial(networks.make_network, config.tokenizer, config.data.image_size)


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads LPIPS and assembles the run."""
    run = design(config)
    loaded = {}
    if config.loss.perceptual_weight:
        loaded["perceptual"] = frozen.load_lpips(config.loss.perceptual)
        frozen.check_shapes("LPIPS", run.frozen, loaded)
    return programs.Program(
        design=run,
        frozen=sharding.place(loaded, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def _check(config: ConfigDict) -> None:
    block = config.tokenizer
    networks.check_sizes(block, config.data.image_size)
    if block.name not in TRAINED:
        raise configs.ConfigError(
            f"The tokenizer {block.name!r} is not trained: 'pca' and 'pixels' need no "
            "run of their own, 'sd_vae' is read from files. Set tokenizer.name to "
            f"one of {', '.join(TRAINED)}."
        )
    if config.critic.weight and block.name not in tokenizers.CONVOLUTIONAL:
        raise configs.ConfigError(
            f"critic.weight = {config.critic.weight}, but {block.name!r} has no last "
            "convolution to weigh a critic by: set it to 0."
        )
    if config.loss.error not in autoencoding.ERRORS:
        raise configs.ConfigError(
            configs.suggest(config.loss.error, autoencoding.ERRORS, "loss.error")
        )


def _plain_training(config: ConfigDict):
    """Returns init and step without a critic."""
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )
    step = state.make_step(
        state.abstract_model(make_model(config)),
        _make_loss(config),
        tx,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        schedule=schedule,
    )
    return lambda key: state.create_state(make_model(config), tx, key), step


def _make_loss(config: ConfigDict) -> state.LossFn:
    loss = config.loss
    perceptual_def = None
    if loss.perceptual_weight:
        perceptual_def, _ = frozen.lpips(loss.perceptual)

    def loss_fn(model, given, batch, key):
        images = 2.0 * inputs.to_float(batch["image"]) - 1.0
        mean, log_variance = learned_tokenizers.posterior(model, images)
        z = autoencoding.draw(mean, log_variance, key)
        recon = learned_tokenizers.images_of(model, z)
        metrics = {
            "loss_rec": autoencoding.pixel_error(images, recon, loss.error),
            "loss_kl": jnp.mean(autoencoding.kl_divergence(mean, log_variance)),
            "latent_std": jnp.std(z),
        }
        error = metrics["loss_rec"]
        if perceptual_def is not None:
            perceptual = nnx.merge(perceptual_def, given["perceptual"])
            distances = perceptual((images + 1) / 2, (recon + 1) / 2)
            metrics["loss_lpips"] = jnp.mean(distances)
            error = error + loss.perceptual_weight * metrics["loss_lpips"]
        total = autoencoding.num_values(images) * error
        metrics["loss"] = total + loss.kl_weight * metrics["loss_kl"]
        return metrics["loss"], metrics

    return loss_fn


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    graphdef = state.abstract_model(make_model(config))
    perceptual_def = None
    if config.loss.perceptual_weight:
        perceptual_def, _ = frozen.lpips(config.loss.perceptual)
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def predict(params, given, images):
        model = nnx.merge(graphdef, params)
        mean, log_variance = learned_tokenizers.posterior(
            model, 2.0 * inputs.to_float(images) - 1.0
        )
        recon = (learned_tokenizers.images_of(model, mean) + 1.0) / 2.0
        values = reconstruction.image_scores(images, recon)
        values |= _latent_scores(mean, log_variance)
        if perceptual_def is not None:
            shown = inputs.to_float(reconstruction.to_uint8(recon))
            lpips = nnx.merge(perceptual_def, given["perceptual"])
            values[f"lpips_{config.loss.perceptual}"] = lpips(
                inputs.to_float(images), shown
            )
        return recon, values

    def evaluate(run_state: Any, given: Any, workdir: Path) -> dict[str, float]:
        params, scores = run_state.ema_params, reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                values = predict(params, given, arrays["image"])[1]
                values, mask = distributed.to_host((values, arrays["mask"]))
                scores = scores.add(values, mask)
        images = inputs.examples(config.data, "validation", PICTURE_COLUMNS)
        recon, _ = predict(params, given, images)
        errors = pictures.error_map(images, distributed.to_host(recon))
        pictures.save_rows(workdir / "reconstructions.png", [images, recon, errors])
        return _summary(scores.means())

    return evaluate


def _latent_scores(
    mean: jax.Array, log_variance: jax.Array | None
) -> dict[str, jax.Array]:
    """Returns moments of latents and their divergence, each (b,)."""
    axes = tuple(range(1, mean.ndim))
    found = {
        "latent_mean": jnp.mean(mean, axis=axes),
        "latent_square": jnp.mean(mean**2, axis=axes),
    }
    if log_variance is None:
        return found
    return found | {
        "latent_noise": jnp.mean(jnp.exp(log_variance), axis=axes),
        "kl": autoencoding.kl_divergence(mean, log_variance),
    }


def _summary(means: dict[str, float]) -> dict[str, float]:
    """Returns scores with the latents' deviation, noise included, and that of it."""
    found, noise = dict(means), means.get("latent_noise", 0.0)
    square = found.pop("latent_square") - found["latent_mean"] ** 2
    found["latent_std"] = (square + noise) ** 0.5
    if noise:
        found["latent_noise"] = noise**0.5
    return found


def _abstract_networks(config: ConfigDict) -> dict[str, Any]:
    if not config.loss.perceptual_weight:
        return {}
    return {"perceptual": frozen.lpips(config.loss.perceptual)[1]}
