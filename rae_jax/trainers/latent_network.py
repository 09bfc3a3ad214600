"""The diffusion transformer that a config describes, and its latents' time shift."""

from collections.abc import Callable

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import schedules
from rae_jax.models import dit, dit_dh
from rae_jax.trainers import frozen

NETWORKS = {"dit_dh": dit_dh.DiTDH, "dit": dit.DiT}


def network_class(config: ConfigDict) -> type[nnx.Module]:
    """Returns the class of `config.network`.

    Raises:
        ValueError: There is none of that name.
    """
    if config.network not in NETWORKS:
        raise ValueError(configs.suggest(config.network, list(NETWORKS), "network"))
    return NETWORKS[config.network]


def make_model(config: ConfigDict) -> Callable[..., nnx.Module]:
    """Returns the constructor of the diffusion transformer, called with `rngs`."""
    network = network_class(config)
    h, _, c = frozen.latent_shape(config.encoder.sizes)

    def make(rngs):
        return network(h, c, rngs=rngs, **config.model)

    return make


def time_shift(config: ConfigDict) -> float:
    """Returns the time shift of the config's latents."""
    dim = int(np.prod(frozen.latent_shape(config.encoder.sizes)))
    return schedules.dimension_shift(dim, config.flow.shift_base)
