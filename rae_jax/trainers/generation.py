"""A trained DiT-DH with its statistics and decoder, ready to make images.

Of a run with what its config names, or of converted and published weights.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import schedules
from rae_jax.models import rae, rae_layouts
from rae_jax.trainers import (
    autoencoder,
    chains,
    denoising_chain,
    frozen,
    inputs,
    latent_diffusion,
    latent_network,
    sampling,
    weights,
)
from rae_jax.training import checkpoints, sharding, state


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Generator(chains.Chain):
    """The chain of a run.

    Attributes:
        config: Config of the diffusion run, its `sampling` block complete.
        decoder: The autoencoder whose decoder is used.
    """

    config: ConfigDict
    decoder: autoencoder.Autoencoder

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that samples can have."""
        return inputs.class_names(self.config.data, self.num_classes)

    def untrained(self) -> "Generator":
        """Returns the same chain with a freshly initialised network."""
        make = latent_network.make_model(self.config)
        params = jax.jit(
            lambda: state.param_dict(make(rngs=nnx.Rngs(self.config.seed)))
        )()
        placed = sharding.place(params, self.mesh)
        return dataclasses.replace(self, params=self.params | {"dit": placed})


def load(
    workdir: Path, decoder: str = "", **changes: Any
) -> Generator | denoising_chain.Generator:
    """Loads the EMA network of a diffusion run and what its config names.

    Args:
        workdir: Folder of a `latent_diffusion` run, or of one of `ldae`.
        decoder: Workdir of a decoder run; that of the config if empty.
        **changes: Values in place of those in `config.sampling`.

    Raises:
        ConfigError: If the folder holds no such run, or no decoder is known.
        FileNotFoundError, ValueError: The guide is missing or does not fit.
    """
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if config.trainer == "ldae":
        if decoder:
            raise configs.ConfigError(
                f"{workdir} holds a run of 'ldae', whose tokenizer decodes its "
                "samples: leave --decoder out."
            )
        return denoising_chain.load(workdir, config, **changes)
    if config.trainer != "latent_diffusion":
        raise configs.ConfigError(
            f"{workdir} holds a run of {config.trainer!r}, not of 'latent_diffusion' "
            "or 'ldae'."
        )
    complete = sampling.complete(config.sampling, **changes)
    with config.unlocked():
        config.sampling = complete
    sampling.plan_of(config)  # What it cannot do is an error before networks load.
    decoder = decoder or config.decoder
    if decoder == "none":
        raise configs.ConfigError(
            "The run names no decoder; give the workdir of one by --decoder."
        )
    mesh = sharding.make_mesh(-1)
    loaded = autoencoder.find(decoder, workdir, config)
    stats = frozen.load_stats(config.latent_stats, config.encoder.sizes, workdir)
    chain = latent_diffusion.make_chain(config, workdir, loaded, stats, mesh)
    dit = sharding.place(checkpoints.load_params(workdir), mesh)
    fields = {f.name: getattr(chain, f.name) for f in dataclasses.fields(chain)}
    fields["params"] = chain.params | {"dit": dit}
    return Generator(**fields, config=config, decoder=loaded)


def load_converted(
    model: str,
    autoencoder: str,
    *,
    guide: str | None = None,
    latent_stats: str | None = None,
    dtype: str = "float32",
    **changes: Any,
) -> chains.Chain:
    """Loads networks from files, the hub or runs; defaults are the official ones.

    Args:
        model: Diffusion transformer; see `weights.open_source`.
        autoencoder: Autoencoder of its latents; likewise.
        guide: Weaker diffusion transformer of the same latents, for autoguidance.
        latent_stats: File of statistics in place of the autoencoder's.
        dtype: Type of the products.
        **changes: Values in place of those in `sampling.DEFAULTS`; times are shifted
            by the latents' dimension.

    Raises:
        FileNotFoundError: Something is missing; the message says how to get it.
        ValueError: The networks are for other latents or classes, or cannot be
            sampled from in this way.
    """
    if guide is not None:
        changes |= dict(guidance=sampling.AUTOGUIDANCE, guide=guide)
    block = sampling.complete({}, **changes)
    decoder = weights.load_autoencoder(
        autoencoder, latent_stats, dtype=dtype, remat="none"
    )
    shape = tuple(decoder.latent_mean.shape)
    networks = {"dit": sampling.load_network(model, shape, dtype=dtype)}
    classes = networks["dit"].num_classes
    if block.guide:
        networks["guide"] = sampling.load_network(block.guide, shape, dtype=dtype)
        sampling.check_classes(networks["guide"], block.guide, classes)
    decoder_def = nnx.graphdef(decoder)

    def decode(params, z):
        return nnx.merge(decoder_def, params["autoencoder"]).decode(z)

    params = {name: state.param_dict(network) for name, network in networks.items()}
    params["autoencoder"] = state.param_dict(decoder)
    mesh = sharding.make_mesh(-1)
    return chains.Chain(
        plan=sampling.make_plan(
            block,
            shift=schedules.dimension_shift(math.prod(shape)),
            network=type(networks["dit"]),
            num_classes=classes,
            early_depth=networks["dit"].early_depth,
        ),
        graphs={name: nnx.graphdef(network) for name, network in networks.items()},
        decode=decode,
        params=sharding.place(params, mesh),
        stats=statistics(decoder),
        mesh=mesh,
    )


def statistics(model: rae.RAE) -> dict[str, np.ndarray]:
    """Returns mean and variance with which `rae.denormalize` inverts `model.encode`.

    It adds an epsilon to the variance, so that of other layouts is taken off.
    """
    mean = np.asarray(model.latent_mean[...])
    if model.latent_var is not None:
        var = np.asarray(model.latent_var[...])
        if (model.eps, model.scaling_factor) == (rae_layouts.OFFICIAL_EPS, 1):
            return {"mean": mean, "var": var}
        spread = np.sqrt(var.astype(np.float64) + model.eps)
    else:
        spread = np.asarray(model.latent_std[...], np.float64)
        spread = spread + model.eps
    var = (spread / model.scaling_factor) ** 2 - rae_layouts.OFFICIAL_EPS
    return {"mean": mean, "var": var.astype(np.float32)}
