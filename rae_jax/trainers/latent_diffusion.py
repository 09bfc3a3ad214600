"""Stage 2 of RAE: DiT-DH on the normalised latents of a frozen encoder.

arXiv:2510.11690 section 4: flow matching with a dimension-dependent time shift, label
dropout and EMA. How it is sampled from is said by the config's `sampling` block.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import paths
from rae_jax.evaluation import pictures
from rae_jax.layers import conditioning
from rae_jax.losses import flow_matching
from rae_jax.models import rae
from rae_jax.trainers import (
    autoencoder,
    chains,
    frozen,
    inputs,
    judges,
    latent_network,
    latents,
    online_samples,
    sampling,
)
from rae_jax.training import optimizers, programs, sharding, state

PICTURES_PER_CLASS = 4
MAX_PICTURE_CLASSES = 10
LATENT_KEY = 2**31 - 1


def design(config: ConfigDict) -> programs.Design:
    """Describes the run by shapes."""
    tx, schedule = optimizers.make_optimizer(
        config.optimizer, config.num_steps, config.get("guard")
    )
    sampling.plan_of(config)  # What cannot be sampled is an error before training.
    make = latent_network.make_model(config)
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
        frozen=latents.frozen(config) | _abstract_align_encoder(config),
        batch=latents.abstract_batch(config),
        num_steps=config.num_steps,
    )


def build(config: ConfigDict, workdir: Path, mesh: Mesh) -> programs.Program:
    """Loads encoder, statistics and (for pictures) the decoder; assembles the run."""
    networks = latents.load(config, workdir)
    if _align_encoder(config) is not None:
        networks["align_encoder"] = frozen.load_encoder(config.repa.encoder, workdir)
    run = design(config)
    frozen.check_shapes("A frozen network", run.frozen, networks)
    source = inputs.train_source(config.data)
    if source.num_classes > config.model.num_classes:
        raise configs.ConfigError(
            f"model.num_classes = {config.model.num_classes}, but the data has "
            f"{source.num_classes} classes."
        )
    return programs.Program(
        design=run,
        frozen=sharding.place(networks, mesh),
        batches=lambda: inputs.train_batches(config.data, config.seed),
        evaluate=_make_evaluate(config, workdir, networks["stats"], mesh),
    )


def _align_encoder(config: ConfigDict) -> ConfigDict | None:
    """Returns the block of the encoder, not that of the latents, that REPA needs."""
    needed = latent_network.aligns(config) and config.repa.target == "encoder"
    return config.repa.encoder if needed else None


def _abstract_align_encoder(config: ConfigDict) -> dict[str, state.Params]:
    block = _align_encoder(config)
    return {} if block is None else {"align_encoder": frozen.encoder(block)[1]}


def _make_features(config: ConfigDict):
    """Returns (networks, batch, z) -> tokens (b, n, d) that REPA aligns with."""
    if not latent_network.aligns(config):
        return lambda networks, batch, z: None
    block = _align_encoder(config)
    if block is None:
        return lambda networks, batch, z: _tokens(z)
    encoder_def, _ = frozen.encoder(block)

    def features(networks, batch, z):
        encoder = nnx.merge(encoder_def, networks["align_encoder"])
        return _tokens(rae.encode(encoder, inputs.to_float(batch["image"])))

    return features


def _tokens(z: jax.Array) -> jax.Array:
    return z.reshape(z.shape[0], -1, z.shape[-1])


def _make_loss(config: ConfigDict) -> state.LossFn:
    latents_of = latents.of_batch(config)
    null, dropout = config.model.num_classes, config.model.class_dropout_prob
    features = _make_features(config)
    predicts_x = config.model.get("prediction", "v") == "x"
    options = dict(
        shift=latent_network.time_shift(config),
        time=config.flow.time,
        min_time=paths.MIN_TIME_OF_X if predicts_x else 0.0,
        early_weight=config.flow.get("early_weight", 1.0),
        align_weight=config.repa.weight if latent_network.aligns(config) else 0.0,
    )

    def loss_fn(model, networks, batch, key):
        # Online and cached latents draw the same numbers; a VAE's have their own key.
        z = latents_of(networks, batch, jax.random.fold_in(key, LATENT_KEY))
        label_key, flow_key = jax.random.split(key)
        y = conditioning.drop_labels(batch["label"], label_key, dropout, null)
        return flow_matching.flow_matching_loss(
            model.outputs,
            z,
            y,
            flow_key,
            features=features(networks, batch, z),
            **options,
        )

    return loss_fn


def make_chain(
    config: ConfigDict,
    workdir: Path,
    decoder: autoencoder.Autoencoder,
    stats: dict[str, np.ndarray],
    mesh: Mesh,
) -> chains.Chain:
    """Returns the chain from noise to image of a run, without its own parameters.

    Raises:
        FileNotFoundError, ValueError: The guide is missing or does not fit.
    """
    graphs = {"dit": state.abstract_model(latent_network.make_model(config))}
    params = {"stats": stats, "decoder": decoder.params}
    guide = sampling.load_guide(config, workdir)
    if guide is not None:
        graphs["guide"] = nnx.graphdef(guide)
        params["guide"] = state.param_dict(guide)

    def decode(params, z):
        z = rae.denormalize(z, params["stats"])
        return decoder.decode(params["decoder"], z)

    return chains.Chain(
        plan=sampling.plan_of(config),
        graphs=graphs,
        decode=decode,
        params=sharding.place(params, mesh),
        stats=stats,
        mesh=mesh,
    )


def _make_evaluate(
    config: ConfigDict, workdir: Path, stats: dict[str, np.ndarray], mesh: Mesh
):
    if config.decoder == "none":
        judging = judges.configured(config, workdir)
        if judging.inception or judging.efflite0 or judging.encoder:
            raise configs.ConfigError(
                "evaluation names networks that judge images, but decoder = 'none'."
            )
        return None
    decoder = autoencoder.find(config.decoder, workdir, config)
    chain = make_chain(config, workdir, decoder, stats, mesh)
    scale = sampling.complete(config.sampling).guidance_scale
    classes = min(config.model.num_classes, MAX_PICTURE_CLASSES)
    labels = np.repeat(np.arange(classes), PICTURES_PER_CLASS)
    options = dict(scale=scale, seed=config.seed, batch_size=config.data.batch_size)
    score = online_samples.make_evaluate(config, workdir, chain, mesh)

    def evaluate(run_state: Any, networks: Any, workdir: Path) -> dict[str, float]:
        params = chain.params | {"dit": run_state.ema_params}
        current = dataclasses.replace(chain, params=params)
        images = np.concatenate(list(current.images(labels, **options)))
        pictures.save_grid(workdir / "samples.png", images, PICTURES_PER_CLASS)
        return {"sample_std": float(images.std()) / 255} | score(run_state)

    return evaluate
