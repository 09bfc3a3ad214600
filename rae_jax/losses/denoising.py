"""The loss of l-DAE, for every step of its path from DDM to denoising autoencoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rae_jax import config as configs
from rae_jax.diffusion import ancestral, paths, schedules
from rae_jax.layers import patches
from rae_jax.losses import variational
from rae_jax.models import tokenizers

INPUTS = ("latent", "image")
TARGETS = ("eps", "latent", "image_pca", "image")
LATENT_TARGETS = ("eps", "latent")
WEIGHTINGS = ("auto", "one", "gamma2", "inverse")
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def weights(
    schedule: str, target: str, num_levels: int = 1000, weighting: str = "auto"
) -> jax.Array:
    """Returns lambda_t (num_levels,) of arXiv:2401.14404.

    Args:
        schedule: See `diffusion.schedules.noise_schedule`.
        target: See `denoising_loss`.
        num_levels: Number of noise levels.
        weighting: "one"; "gamma2", gamma_t^2 (Eq. 3); "inverse", 1 / (1 + sigma_t^2);
            "auto", the paper's: one for noise, and for clean data the share of the
            signal, which is the second where the variance is preserved and the third
            where gamma is 1.
    """
    gamma, sigma = schedules.noise_schedule(schedule, num_levels)
    if weighting == "one" or (weighting, target) == ("auto", "eps"):
        return jnp.ones(num_levels)
    if weighting == "auto":
        return jnp.asarray(gamma**2 / (gamma**2 + sigma**2))
    return jnp.asarray(gamma**2 if weighting == "gamma2" else 1 / (1 + sigma**2))


def check(
    *,
    schedule: str,
    input_space: str,
    target: str,
    weighting: str = "auto",
    tokenizer: str = "pca",
    learn_sigma: bool = False,
    **others: Any,
) -> None:
    """Checks the settings of `denoising_loss` before anything is built.

    Args:
        schedule, input_space, target, weighting, learn_sigma: Of `denoising_loss`.
        tokenizer: Name of the tokenizer.
        **others: Settings that are numbers; not looked at.

    Raises:
        ConfigError: A name is unknown, or two settings exclude each other.
    """
    names = (
        ("schedule", schedule, schedules.SCHEDULES),
        ("input_space", input_space, INPUTS),
        ("target", target, TARGETS),
        ("weighting", weighting, WEIGHTINGS),
    )
    for name, value, allowed in names:
        if value not in allowed:
            raise configs.ConfigError(configs.suggest(value, allowed, name))
    in_image = input_space == "image" or target not in LATENT_TARGETS
    if in_image and tokenizer not in tokenizers.LINEAR:
        raise configs.ConfigError(
            f"noise.input_space = {input_space!r} and noise.target = {target!r} need a "
            "tokenizer that maps patches to latents and back by one orthonormal basis, "
            f"{' or '.join(map(repr, tokenizers.LINEAR))}, not {tokenizer!r}: set them "
            "to 'latent', or choose another tokenizer.name."
        )
    if learn_sigma and (target != "eps" or schedule not in schedules.PRESERVING):
        raise configs.ConfigError(
            "model.learn_sigma says the variance of a step of ancestral sampling from "
            "predicted noise: it goes with noise.target = 'eps' and a schedule of "
            f"{schedules.PRESERVING}, not with {target!r} and {schedule!r}."
        )


def noised(
    tokenizer: Any,
    images: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    schedule: str,
    num_levels: int = 1000,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the latents z_0 and z_t (b, n, d) of images at levels t.

    Args:
        tokenizer: One of `models.tokenizers`.
        images: Images (b, h, w, 3) in [-1, 1].
        t: Levels (b,).
        eps: Noise (b, n, d).
        schedule, num_levels: See `diffusion.schedules.noise_schedule`.
        key: To draw z_0 where the tokenizer has a posterior; its mean if None.
    """
    tables = schedules.noise_schedule(schedule, num_levels)
    gamma, sigma = (jnp.asarray(table)[t] for table in tables)
    z = tokenizer.encode(images, key)
    return z, paths.diffuse(z, eps, gamma, sigma)


def network_inputs(
    tokenizer: Any, z_t: jax.Array, t: jax.Array, *, input_space: str, schedule: str
) -> tuple[jax.Array, jax.Array]:
    """Returns what the network is called with: tokens (b, n, in) and levels (b,)."""
    if schedule == "single_sigma":
        t = jnp.zeros_like(t)  # All levels are one.
    return (tokenizer.decode_patches(z_t) if input_space == "image" else z_t), t


def denoising_loss(
    denoiser: Denoiser,
    images: jax.Array,
    tokenizer: Any,
    key: jax.Array,
    *,
    schedule: str = "linear_sigma",
    input_space: str = "image",
    target: str = "image",
    residual_weight: float = 0.1,
    weighting: str = "auto",
    num_levels: int = 1000,
    learn_sigma: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted squared error of the prediction (Eq. 2 to 4).

    The defaults are the final l-DAE: noise in the latent space of patch PCA, input
    and output in image space, target the original image, whose components outside
    the latent space count `residual_weight`. Settings are those of `check`.

    Args:
        denoiser: Called as denoiser(tokens (b, n, d), t (b,)).
        images: Images (b, h, w, 3) in [0, 1].
        tokenizer: One of `models.tokenizers`.
        key: Randomness for levels, noise and, where there is one, the posterior.
        schedule: See `diffusion.schedules.noise_schedule`.
        input_space: "latent" feeds z_t, "image" its inverse PCA.
        target: "eps", "latent" (z_0), "image_pca" (z_0 in pixels), "image".
        residual_weight: Weight of the other components for "image".
        weighting: See `weights`.
        num_levels: Number of noise levels.
        learn_sigma: Whether a second half of the output learns a variance.

    Returns:
        The loss, a mean over tokens and their values, and the metrics.
    """
    t_key, eps_key = jax.random.split(key)
    x = 2 * images - 1
    t = jax.random.randint(t_key, x.shape[:1], 0, num_levels)
    num_tokens = (x.shape[1] // tokenizer.patch_size) ** 2
    eps = jax.random.normal(eps_key, (len(x), num_tokens, tokenizer.latent_dim))
    space = dict(schedule=schedule, num_levels=num_levels)
    # Its key leaves the draws of tokenizers without a posterior as they are.
    z_key = jax.random.fold_in(key, 2)
    z, z_t = noised(tokenizer, x, t, eps, key=z_key, **space)
    space = dict(schedule=schedule, input_space=input_space)
    out = denoiser(*network_inputs(tokenizer, z_t, t, **space))
    metrics = {}
    if learn_sigma:
        out, v = jnp.split(out, 2, axis=-1)
        levels = ancestral.make_levels(schedule, num_levels, num_levels)
        metrics["vlb"] = jnp.mean(variational.bound(z, z_t, t, out, v, levels))
    if target == "image":
        error = _component_error(tokenizer, x, out, residual_weight)
    else:
        error = (_goal(tokenizer, z, eps, target) - out) ** 2
    per_sample = jnp.mean(error, axis=(1, 2))
    table = weights(schedule, target, num_levels, weighting)
    loss = jnp.mean(table[t] * per_sample) + metrics.get("vlb", 0.0)
    return loss, {"loss": loss, "mse": jnp.mean(per_sample)} | metrics


def _goal(tokenizer: Any, z: jax.Array, eps: jax.Array, target: str) -> jax.Array:
    if target == "image_pca":
        return tokenizer.decode_patches(z)
    return {"eps": eps, "latent": z}[target]


def _component_error(
    tokenizer: Any, images: jax.Array, out: jax.Array, residual_weight: float
) -> jax.Array:
    """Returns the squared error of every component (Eq. 4), weighted, (b, n, p)."""
    x = patches.patchify(images, tokenizer.patch_size)
    inside = jnp.arange(x.shape[-1]) < tokenizer.latent_dim
    component_weights = jnp.where(inside, 1.0, residual_weight)
    return component_weights[None, None, :] * tokenizer.components(x - out) ** 2
