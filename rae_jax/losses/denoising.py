"""The loss of l-DAE, for every step of its path from DDM to denoising autoencoder."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rae_jax.diffusion import paths, schedules
from rae_jax.layers import patches
from rae_jax.models import tokenizers

INPUTS = ("latent", "image")
TARGETS = ("eps", "latent", "image_pca", "image")
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def weights(schedule: str, target: str, num_levels: int = 1000) -> jax.Array:
    """Returns lambda_t (num_levels,) of arXiv:2401.14404 Eq. 3.

    Noise prediction has weight 1. Clean prediction has gamma_t^2, or, where gamma
    is 1, its equal 1 / (1 + sigma_t^2).
    """
    gamma, sigma = schedules.noise_schedule(schedule, num_levels)
    if target == "eps":
        return jnp.ones(num_levels)
    return jnp.asarray(gamma**2 / (gamma**2 + sigma**2))


def denoising_loss(
    denoiser: Denoiser,
    images: jax.Array,
    pca: tokenizers.PatchPCA,
    key: jax.Array,
    *,
    patch_size: int,
    schedule: str = "linear_sigma",
    input_space: str = "image",
    target: str = "image",
    residual_weight: float = 0.1,
    num_levels: int = 1000,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted squared error of the clean prediction (Eq. 2 to 4).

    The defaults are the final l-DAE: noise in the latent space of patch PCA, input
    and output in image space, target the original image, whose components outside
    the latent space count `residual_weight`.

    Args:
        denoiser: Called as denoiser(tokens (b, n, d), t (b,)).
        images: Images (b, h, w, 3) in [0, 1].
        pca: The tokenizer.
        key: Randomness for levels and noise.
        patch_size: Pixels per token side.
        schedule: See `diffusion.schedules.noise_schedule`.
        input_space: "latent" feeds z_t, "image" its inverse PCA.
        target: "eps", "latent" (z_0), "image_pca" (z_0 in pixels), "image".
        residual_weight: Weight of the other components for "image".
        num_levels: Number of noise levels.

    Returns:
        The loss, a mean over tokens and their values, and the metrics.
    """
    _check(input_space, target)
    t_key, eps_key = jax.random.split(key)
    x = patches.patchify(2 * images - 1, patch_size)  # (b, n, p)
    z = pca.encode(x)
    t = jax.random.randint(t_key, x.shape[:1], 0, num_levels)
    eps = jax.random.normal(eps_key, z.shape)
    tables = schedules.noise_schedule(schedule, num_levels)
    gamma, sigma = (jnp.asarray(table)[t] for table in tables)
    z_t = paths.diffuse(z, eps, gamma, sigma)
    if schedule == "single_sigma":
        t = jnp.zeros_like(t)  # All levels are one.
    out = denoiser(pca.decode(z_t) if input_space == "image" else z_t, t)
    if target == "image":
        inside = jnp.arange(x.shape[-1]) < pca.latent_dim
        component_weights = jnp.where(inside, 1.0, residual_weight)
        error = component_weights[None, None, :] * pca.components(x - out) ** 2
    else:
        goal = {"eps": eps, "latent": z, "image_pca": pca.decode(z)}[target]
        error = (goal - out) ** 2
    per_sample = jnp.mean(error, axis=(1, 2))
    loss = jnp.mean(weights(schedule, target, num_levels)[t] * per_sample)
    return loss, {"loss": loss, "mse": jnp.mean(per_sample)}


def _check(input_space: str, target: str) -> None:
    if input_space not in INPUTS:
        raise ValueError(f"Unknown input_space {input_space!r}; choose from {INPUTS}.")
    if target not in TARGETS:
        raise ValueError(f"Unknown target {target!r}; choose from {TARGETS}.")
