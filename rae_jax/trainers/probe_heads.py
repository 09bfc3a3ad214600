"""Which linear heads a probe trains at once, and the features that they share.

A sweep is the product of blocks, noise levels, clean or noisy input and rates. Features
are made once for every block, level and input; rates only multiply heads.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.trainers import inputs

FEATURES = ("encoder", "random", "pca", "pixels")
TOKENS = ("mean", "cls")
Features = dict[str, jax.Array]


class View(NamedTuple):
    """One way to look at an image through an encoder.

    Attributes:
        block: Number of blocks that it has passed.
        t: Noise level that the encoder is told; None if it knows none.
        noisy: Whether the input has noise of this level.
    """

    block: int
    t: int | None
    noisy: bool


class Head(NamedTuple):
    """A linear classifier: what it sees, and its rate."""

    name: str
    view: View | None
    lr: float


class Axes(NamedTuple):
    """The views of a sweep are the product of these, in this order."""

    times: tuple[int | None, ...]
    noisy: tuple[bool, ...]
    blocks: tuple[int, ...]

    def views(self) -> tuple[View, ...]:
        """Returns all views, blocks changing fastest."""
        return tuple(View(b, t, n) for t, n, b in itertools.product(*self))


def axes(config: ConfigDict) -> Axes:
    """Returns how a config looks at images through its encoder.

    Raises:
        ConfigError: The encoder has no such block or level, or knows none.
    """
    sweep, sizes = config.sweep, config.encoder.sizes
    blocks = tuple(sorted(set(sweep.blocks))) or (sizes.depth,)
    wrong = [block for block in blocks if not 1 <= block <= sizes.depth]
    if wrong:
        raise configs.ConfigError(
            f"sweep.blocks: {wrong} are not within 1 and encoder.sizes.depth = "
            f"{sizes.depth}."
        )
    if config.encoder.name != "ldae":
        if sweep.times or sweep.noisy or config.noisy:
            raise configs.ConfigError(
                "sweep.times, sweep.noisy and noisy are for encoders of l-DAE; "
                f"{config.encoder.name!r} knows no noise levels."
            )
        return Axes((None,), (False,), blocks)
    times = tuple(sweep.times) or (sizes.time_index,)
    last = sizes.get("num_levels", 1000) - 1
    wrong = [t for t in times if not 0 <= t <= last]
    if wrong:
        raise configs.ConfigError(f"sweep.times: {wrong} are not within 0 and {last}.")
    return Axes(times, tuple(sweep.noisy) or (config.noisy,), blocks)


def heads(config: ConfigDict) -> dict[str, tuple[Head, ...]]:
    """Returns the heads of each kind of features, ordered by view, then by rate.

    Raises:
        ConfigError: See `axes`; or features, tokens or rates that cannot be.
    """
    for name in config.features:
        if name not in FEATURES:
            raise configs.ConfigError(configs.suggest(name, FEATURES, "feature"))
    if config.pool.token not in TOKENS:
        raise configs.ConfigError(
            configs.suggest(config.pool.token, TOKENS, "pool.token")
        )
    rates = tuple(config.sweep.lrs) or (config.optimizer.peak_lr,)
    if min(rates) <= 0:
        raise configs.ConfigError(f"sweep.lrs must be positive, got {rates}.")
    found = {}
    for name in config.features:
        seen = axes(config).views() if name == "encoder" else (None,)
        found[name] = tuple(
            Head(_name(config, name, view, lr), view, lr)
            for view, lr in itertools.product(seen, rates)
        )
    return found


def _name(config: ConfigDict, feature: str, view: View | None, lr: float) -> str:
    """Returns a head's name: what it differs in from others of the sweep."""
    sweep, parts = config.sweep, []
    if view is not None:
        parts += [f"b{view.block}"] if sweep.blocks else []
        parts += [f"t{view.t}"] if sweep.times else []
        parts += ["noisy" if view.noisy else "clean"] if sweep.noisy else []
    parts += [f"lr{lr:g}"] if sweep.lrs else []
    return "_".join(parts if view is not None and parts else [feature, *parts])


def extract(
    config: ConfigDict,
    encoder_def: nnx.GraphDef,
    networks: Any,
    images: jax.Array,
    index: jax.Array,
    key: jax.Array,
) -> Features:
    """Returns the features (views, b, d) of uint8 images, by name.

    The encoders' tokens are pooled; latents of the tokenizer ("pca") and pixels are
    kept whole, which favours them: they still know where everything is.

    Args:
        config: Of the probe.
        encoder_def: Static part of the encoder.
        networks: Parameters of "encoder" and "random".
        images: uint8 (b, h, w, 3).
        index: Numbers of the images (b,): noise depends on them, not on the batch.
        key: Randomness of noise.
    """
    encoder = nnx.merge(encoder_def, networks["encoder"])
    mean, std = (
        jnp.asarray(values, jnp.float32)[None, None, None, :]
        for values in (encoder.image_mean, encoder.image_std)
    )
    x = (inputs.to_float(images) - mean) / std
    found = {}
    for name in config.features:
        if name == "encoder":
            found[name] = _views(config, encoder, x, axes(config), (index, key))
        elif name == "random":
            network, sizes = (
                nnx.merge(encoder_def, networks[name]),
                config.encoder.sizes,
            )
            time = sizes.time_index if config.encoder.name == "ldae" else None
            whole = Axes((time,), (False,), (sizes.depth,))
            found[name] = _views(config, network, x, whole, (index, key))
        elif name == "pca":
            found[name] = encoder.latents(x).reshape(1, len(x), -1)
        else:
            found[name] = x.reshape(1, len(x), -1)
    return found


def _views(
    config: ConfigDict,
    encoder: nnx.Module,
    x: jax.Array,
    axes: Axes,
    randomness: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Returns the pooled tokens (views, b, d) of normalised images, view by view."""
    indices = [block - 1 for block in axes.blocks]
    if axes.times == (None,):
        return _pooled(config, encoder, encoder.block_tokens(x, indices))
    index, key = randomness
    by_input = []
    for noisy in axes.noisy:

        def at(t, noisy=noisy):
            keys = None
            if noisy:
                key_t = jax.random.fold_in(key, t)
                keys = jax.vmap(lambda row: jax.random.fold_in(key_t, row))(index)
            tokens = encoder.block_features(x, indices, time_index=t, key=keys)
            return _pooled(config, encoder, tokens)

        times = jnp.asarray(axes.times)
        single = len(axes.times) == 1  # Otherwise one program for all levels.
        by_input.append(at(times[0])[None] if single else jax.lax.map(at, times))
    found = jnp.stack(by_input, axis=1)  # (times, inputs, blocks, b, d)
    return found.reshape(-1, *found.shape[3:])


def _pooled(
    config: ConfigDict, encoder: nnx.Module, tokens: Sequence[jax.Array]
) -> jax.Array:
    """Returns one vector per image (blocks, b, d) of tokens after some blocks."""
    first = getattr(encoder, "prefix", 0)  # Class token and registers.
    found = []
    for x in tokens:
        x = encoder.norm(x) if config.pool.norm else x
        found.append(
            x[:, 0] if config.pool.token == "cls" else jnp.mean(x[:, first:], axis=1)
        )
    return jnp.stack(found)


def check_class_token(config: ConfigDict, encoder: nnx.Module) -> None:
    """Raises a ConfigError where a class token is wanted that is not there."""
    if config.pool.token == "cls" and getattr(encoder, "cls_token", None) is None:
        raise configs.ConfigError(
            f"pool.token = 'cls', but encoders {config.encoder.name!r} have no class "
            "token: set it to 'mean'."
        )
