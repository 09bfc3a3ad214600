"""Stage 2 of RAE: DiT-DH on the normalised latents of a frozen encoder.

arXiv:2510.11690 section 4: flow matching with a dimension-dependent time shift, label
dropout and EMA; samples by Euler's method on the official grid.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import guidance, samplers, schedules
from rae_jax.evaluation import generate, pictures
from rae_jax.layers import conditioning
from rae_jax.losses import flow_matching
from rae_jax.models import dit, dit_dh, rae
from rae_jax.trainers import autoencoder, frozen, inputs
from rae_jax.training import optimizers, programs, sharding, state

NETWORKS = {"dit_dh": dit_dh.DiTDH, "dit": dit.DiT}
PICTURES_PER_CLASS = 4
MAX_PICTURE_CLASSES = 10


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
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
        frozen={
            "encoder": frozen.encoder(config.encoder)[1],
            "stats": frozen.abstract_stats(config.encoder.sizes),
        },
        batch=inputs.abstract_batch(config.data),
        num_steps=config.num_steps,
    )


def make_model(config: ConfigDict) -> Callable[..., nnx.Module]:
    """Returns the constructor of the diffusion transformer, called with `rngs`."""
    if config.network not in NETWORKS:
        raise ValueError(configs.suggest(config.network, list(NETWORKS), "network"))
    h, _, c = frozen.latent_shape(config.encoder.sizes)

    def make(rngs):
        return NETWORKS[config.network](h, c, rngs=rngs, **config.model)

    return make


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads encoder, statistics and (for pictures) the decoder; assembles the run."""
    sizes = config.encoder.sizes
    networks = {
        "encoder": frozen.load_encoder(config.encoder, workdir),
        "stats": frozen.load_stats(config.latent_stats, sizes, workdir),
    }
    run = design(config)
    frozen.check_shapes("A frozen network", run.frozen, networks)
    source = inputs.open_source(config.data, config.data.split)
    if source.num_classes > config.model.num_classes:
        raise configs.ConfigError(
            f"model.num_classes = {config.model.num_classes}, but the data has "
            f"{source.num_classes} classes."
        )
    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, workdir, mesh),
    )


def time_shift(config: ConfigDict) -> float:
    """Returns the time shift of the config's latents."""
    dim = int(np.prod(frozen.latent_shape(config.encoder.sizes)))
    return schedules.dimension_shift(dim, config.flow.shift_base)


def _make_loss(config: ConfigDict) -> state.LossFn:
    encoder_def, _ = frozen.encoder(config.encoder)
    shift, null = time_shift(config), config.model.num_classes
    dropout = config.model.class_dropout_prob

    def loss_fn(model, networks, batch, key):
        encoder = nnx.merge(encoder_def, networks["encoder"])
        z = rae.encode(encoder, inputs.to_float(batch["image"]))
        z = rae.normalize(z, networks["stats"])
        label_key, flow_key = jax.random.split(key)
        y = conditioning.drop_labels(batch["label"], label_key, dropout, null)
        return flow_matching.flow_matching_loss(
            model, z, y, flow_key, shift=shift, time=config.flow.time
        )

    return loss_fn


def make_sample(
    config: ConfigDict, scale: float, keep: tuple[int, ...] = ()
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the compiled sampler of a config.

    Args:
        config: Config of the run.
        scale: Classifier-free guidance scale; 1 for none.
        keep: Indices of the grid whose states are returned too.

    Returns:
        A function (params, stats, seed, index (b,), labels (b,)) -> raw latents
        (b, h, w, c) and states (len(keep), b, h, w, c) in raw latent units. `seed`
        is static.
    """
    graphdef = state.abstract_model(make_model(config))
    sampling = config.sampling
    times = samplers.euler_times(
        sampling.num_points, time_shift(config), final_zero=sampling.final_zero
    )
    shape = frozen.latent_shape(config.encoder.sizes)

    def sample(params, stats, seed, index, labels):
        velocity = guidance.classifier_free(
            nnx.merge(graphdef, params),
            scale,
            config.model.num_classes,
            sampling.guidance_interval,
        )
        eps = generate.sample_noise(seed, index, shape)
        z, states = samplers.sample_euler_states(velocity, eps, labels, times, keep)
        states = rae.denormalize(states.reshape(-1, *shape), stats)
        return rae.denormalize(z, stats), states.reshape(len(keep), *z.shape)

    return jax.jit(sample, static_argnums=2)


def make_generate(
    config: ConfigDict, decoder: autoencoder.Autoencoder, scale: float
) -> Callable[..., jax.Array]:
    """Returns (params, stats, decoder params, seed, index, labels) -> images [0, 1]."""
    sample = make_sample(config, scale)
    decode = jax.jit(decoder.decode)

    def images(params, stats, decoder_params, seed, index, labels):
        z, _ = sample(params, stats, seed, index, labels)
        return decode(decoder_params, z)

    return images


def _make_evaluate(config: ConfigDict, workdir: Path, mesh: Mesh):
    if config.decoder == "none":
        return None
    decoder = autoencoder.find(config.decoder, workdir)
    decoder_params = sharding.place(decoder.params, mesh)
    images_of = make_generate(config, decoder, config.sampling.guidance_scale)
    classes = min(config.model.num_classes, MAX_PICTURE_CLASSES)
    labels = np.repeat(np.arange(classes), PICTURES_PER_CLASS)

    def evaluate(run_state: Any, networks: Any, workdir: Path) -> dict[str, float]:
        params, stats = run_state.ema_params, networks["stats"]

        def sample(index, labels):
            return images_of(params, stats, decoder_params, config.seed, index, labels)

        rows = sharding.batch_sharding(mesh)
        parts = generate.generate(sample, labels, config.data.batch_size, rows)
        images = np.concatenate(list(parts))
        pictures.save_grid(workdir / "samples.png", images, PICTURES_PER_CLASS)
        return {"sample_std": float(images.std())}

    return evaluate
