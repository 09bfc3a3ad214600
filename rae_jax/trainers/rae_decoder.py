"""Stage 1 of RAE: a decoder for the latents of a frozen encoder.

arXiv:2510.11690 section 3: L1 and LPIPS on images decoded from noised latents, and,
unless `gan.weight` is 0, a critic (`adversarial`).
"""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.evaluation import reconstruction
from rae_jax.losses import reconstruction as losses
from rae_jax.models import decoder, rae
from rae_jax.trainers import adversarial, frozen, inputs, online
from rae_jax.training import optimizers, programs, sharding, state


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes.

    Raises:
        ConfigError: If sizes or starts do not fit together.
    """
    networks = {"encoder": frozen.encoder(config.encoder)[1]}
    if config.loss.perceptual_weight:
        networks["perceptual"] = frozen.lpips(config.loss.perceptual)[1]
    if has_critic(config):
        training = adversarial.AdversarialTraining(config, make_model(config))
        init, step = training.init, training.step
        if frozen.backbone_name(config) not in networks:
            networks["backbone"] = frozen.encoder(config.gan.backbone)[1]
    else:
        init, step = _plain_training(config)
    return programs.Design(
        init=init,
        step=step,
        frozen=networks,
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def has_critic(config: ConfigDict) -> bool:
    """Returns whether a decoder is trained with a critic; old runs have no block."""
    return bool("gan" in config and config.gan.weight)


def _plain_training(config: ConfigDict):
    """Returns init and step without a critic."""
    if config.loss.get("perceptual_start", 0):
        raise configs.ConfigError(
            "loss.perceptual_start needs a critic (gan.weight above 0); without one, "
            "train with loss.perceptual_weight=0 first."
        )
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )
    make_decoder = make_model(config)
    step = state.make_step(
        state.abstract_model(make_decoder),
        _make_loss(config),
        tx,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        schedule=schedule,
    )
    return lambda key: state.create_state(make_decoder, tx, key), step


def make_model(config: ConfigDict) -> Callable[..., nnx.Module]:
    """Returns the constructor of the decoder, called with `rngs`.

    Its images have the size of the data's, which need not be the encoder's: 256
    pixels in patches of 16 from the 16 x 16 tokens of an encoder of 224 pixels.

    Raises:
        ConfigError: If the tokens cannot tile an image of the data's size.
    """
    h, w, c = frozen.latent_shape(config.encoder.sizes)
    size = config.data.image_size
    if size % h:
        raise configs.ConfigError(
            f"data.image_size = {size} is not a multiple of the encoder's {h} tokens "
            f"per side; choose a multiple of {h}, or another encoder.sizes.image_size."
        )

    def make(rngs):
        return decoder.RAEDecoder(
            in_channels=c,
            num_patches=h * w,
            patch_size=size // h,
            rngs=rngs,
            **config.model,
        )

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads encoder, LPIPS and the critic's backbone and assembles the run."""
    networks = {"encoder": frozen.load_encoder(config.encoder, workdir)}
    if config.loss.perceptual_weight:
        networks["perceptual"] = frozen.load_lpips(config.loss.perceptual)
    run = design(config)
    if "backbone" in run.frozen:
        networks["backbone"] = frozen.load_backbone(config, workdir)
    frozen.check_shapes("A frozen network", run.frozen, networks)
    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, workdir, mesh),
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


def _make_evaluate(config: ConfigDict, workdir: Path, mesh: Mesh):
    score = make_scores(config) if config.loss.perceptual_weight else None
    return online.make_evaluate(config, workdir, mesh, make_reconstruct(config), score)
