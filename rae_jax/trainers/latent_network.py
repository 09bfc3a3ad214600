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
ALIGN_TARGETS = ("encoder", "latent")


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
    readers = _alignment(config)

    def make(rngs):
        return network(h, c, rngs=rngs, **config.model, **readers)

    return make


def aligns(config: ConfigDict) -> bool:
    """Returns whether tokens are aligned with features (REPA)."""
    return "repa" in config and config.repa.weight > 0


def _alignment(config: ConfigDict) -> dict[str, int]:
    """Returns the network's arguments for `config.repa`.

    Raises:
        ConfigError: For another target, or one whose tokens are not the network's.
    """
    if not aligns(config):
        return {}
    repa = config.repa
    if repa.target not in ALIGN_TARGETS:
        raise configs.ConfigError(
            configs.suggest(repa.target, ALIGN_TARGETS, "repa.target")
        )
    own = repa.target == "latent"
    sizes = (config.encoder if own else repa.encoder).sizes
    grid, _, width = frozen.latent_shape(sizes)
    tokens = frozen.latent_shape(config.encoder.sizes)[0]
    tokens //= config.model.get("patch_size", 1)
    if grid != tokens:
        raise configs.ConfigError(
            f"repa.target = {repa.target!r} has {grid} x {grid} features, and the "
            f"network {tokens} x {tokens} tokens: choose an encoder with as many."
        )
    return {"align_depth": repa.depth, "align_dim": width}


def time_shift(config: ConfigDict) -> float:
    """Returns the time shift of the config's latents."""
    dim = int(np.prod(frozen.latent_shape(config.encoder.sizes)))
    return schedules.dimension_shift(dim, config.flow.shift_base)
