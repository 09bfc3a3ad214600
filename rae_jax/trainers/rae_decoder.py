"""Stage 1 of RAE: a decoder for the latents of a frozen encoder.

arXiv:2510.11690 section 3: L1 and LPIPS on images decoded from noised latents. The
adversarial term acts on the same reconstruction and joins the loss in `_make_loss`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.data import loader
from rae_jax.evaluation import pictures, reconstruction
from rae_jax.losses import reconstruction as losses
from rae_jax.models import decoder, rae
from rae_jax.trainers import frozen, inputs
from rae_jax.training import optimizers, programs, sharding, state

PICTURE_COLUMNS = 10


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    tx, schedule = optimizers.make_optimizer(config.optimizer, config.num_steps)
    make_decoder = make_model(config)
    step = state.make_step(
        state.abstract_model(make_decoder),
        _make_loss(config),
        tx,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        schedule=schedule,
    )
    networks = {"encoder": frozen.encoder(config.encoder)[1]}
    if config.loss.perceptual_weight:
        networks["perceptual"] = frozen.lpips(config.loss.perceptual)[1]
    return programs.Design(
        init=lambda key: state.create_state(make_decoder, tx, key),
        step=step,
        frozen=networks,
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def make_model(config: ConfigDict) -> Callable[..., nnx.Module]:
    """Returns the constructor of the decoder, called with `rngs`."""
    h, w, c = frozen.latent_shape(config.encoder.sizes)

    def make(rngs):
        return decoder.RAEDecoder(
            in_channels=c,
            num_patches=h * w,
            patch_size=config.data.image_size // h,
            rngs=rngs,
            **config.model,
        )

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads encoder and LPIPS and assembles the run."""
    networks = {"encoder": frozen.load_encoder(config.encoder, workdir)}
    if config.loss.perceptual_weight:
        networks["perceptual"] = frozen.load_lpips(config.loss.perceptual)
    run = design(config)
    frozen.check_shapes("A frozen network", run.frozen, networks)
    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, mesh),
    )


def _make_loss(config: ConfigDict) -> state.LossFn:
    encoder_def, _ = frozen.encoder(config.encoder)
    weight, noise = config.loss.perceptual_weight, config.noise
    perceptual_def = frozen.lpips(config.loss.perceptual)[0] if weight else None

    def loss_fn(model, networks, batch, key):
        images = inputs.to_float(batch["image"])
        encoder = nnx.merge(encoder_def, networks["encoder"])
        z = rae.encode(encoder, images)
        z = rae.add_noise(z, key, noise.tau, noise.distribution)
        recon = rae.decode(model, z, encoder)
        perceptual = None
        if perceptual_def is not None:
            perceptual = nnx.merge(perceptual_def, networks["perceptual"])
        return losses.reconstruction_loss(images, recon, perceptual, weight)

    return loss_fn


def make_reconstruct(config: ConfigDict) -> Callable[..., jax.Array]:
    """Returns (decoder params, encoder params, uint8 images) -> images in [0, 1]."""
    encoder_def, _ = frozen.encoder(config.encoder)
    decoder_def = state.abstract_model(make_model(config))

    @jax.jit
    def reconstruct(params, encoder_params, images):
        encoder = nnx.merge(encoder_def, encoder_params)
        z = rae.encode(encoder, inputs.to_float(images))
        return rae.decode(nnx.merge(decoder_def, params), z, encoder)

    return reconstruct


def make_scores(config: ConfigDict) -> Callable[..., dict[str, jax.Array]]:
    """Returns (lpips params, uint8 images, recon) -> scores (b,) by name."""
    backbone = config.loss.perceptual
    lpips_def, _ = frozen.lpips(backbone)

    @jax.jit
    def scores(params, images, recon):
        values = reconstruction.image_scores(images, recon)
        lpips = nnx.merge(lpips_def, params)
        recon = inputs.to_float(reconstruction.to_uint8(recon))
        return values | {f"lpips_{backbone}": lpips(inputs.to_float(images), recon)}

    return scores


def _make_evaluate(config: ConfigDict, mesh: Mesh):
    reconstruct = make_reconstruct(config)
    score = make_scores(config) if config.loss.perceptual_weight else None
    rows = sharding.batch_sharding(mesh)

    def evaluate(run_state: Any, networks: Any, workdir: Path) -> dict[str, float]:
        params, encoder = run_state.ema_params, networks["encoder"]
        images = inputs.examples(config.data, "validation", PICTURE_COLUMNS)
        recon = reconstruct(params, encoder, images)
        pictures.save_rows(workdir / "reconstructions.png", [images, recon])
        scores = reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                images = loader.to_global(batch, rows)["image"]
                recon = reconstruct(params, encoder, images)
                if score is None:
                    values = reconstruction.image_scores(images, recon)
                else:
                    values = score(networks["perceptual"], images, recon)
                scores = scores.add(jax.device_get(values), batch["mask"])
        return scores.means()

    return evaluate
