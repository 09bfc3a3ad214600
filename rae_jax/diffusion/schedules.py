"""Distributions of training times, the dimension shift, and l-DAE's noise tables."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

TIMES = ("logit_normal", "uniform")
SCHEDULES = ("ddpm_linear", "linear_gamma2", "linear_sigma", "single_sigma")
PRESERVING = ("ddpm_linear", "linear_gamma2")  # gamma^2 + sigma^2 = 1; end in noise.


def uniform_time(u: jax.Array, t_max: float = 0.999) -> jax.Array:
    """Maps uniform draws u in [0, 1) to times uniform in [0, t_max)."""
    return u * t_max


def logit_normal_time(
    u: jax.Array, mean: float = 0.0, std: float = 1.0, t_max: float = 0.999
) -> jax.Array:
    """Maps uniform draws u in [0, 1) to logit-normal times truncated to [0, t_max].

    The inverse of the distribution function of sigmoid(N(mean, std^2)) given that
    it is at most t_max, as the official code of RAE (arXiv:2510.11690) has it.
    """
    mass = 1.0
    if t_max < 1:
        mass = NormalDist(mean, std).cdf(math.log(t_max / (1 - t_max)))
    return jnp.clip(jax.nn.sigmoid(mean + std * ndtri(mass * u)), 0.0, t_max)


def sample_time(
    name: str,
    key: jax.Array,
    n: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    t_max: float = 0.999,
) -> jax.Array:
    """Draws training times (n,), not yet shifted.

    Args:
        name: "logit_normal" or "uniform".
        key: Randomness.
        n: Number of times.
        mean: Mean of the logit; "logit_normal" alone.
        std: Standard deviation of the logit; "logit_normal" alone.
        t_max: Upper end of the range.

    Raises:
        ValueError: If `name` is neither.
    """
    if name not in TIMES:
        raise ValueError(f"Unknown time distribution {name!r}; choose from {TIMES}.")
    u = jax.random.uniform(key, (n,))
    if name == "uniform":
        return uniform_time(u, t_max)
    return logit_normal_time(u, mean, std, t_max)


def dimension_shift(dim: int, base: int = 4096) -> float:
    """Returns the time shift sqrt(dim / base) for latents of `dim` entries in all.

    More entries carry more redundant signal at the same noise, so their times move
    towards noise (arXiv:2510.11690, after arXiv:2403.03206). Latents smaller than
    `base` get a shift below one, towards data.
    """
    if dim <= 0 or base <= 0:
        raise ValueError(f"dim and base must be positive, got {dim} and {base}.")
    return math.sqrt(dim / base)


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """Moves times t in [0, 1] towards noise; a shift of 1 leaves them unchanged."""
    return shift * t / (1 + (shift - 1) * t)


def noise_schedule(name: str, num_steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Returns the float32 tables gamma, sigma (num_steps,) of z = gamma x + sigma eps.

    The schedules of l-DAE (arXiv:2401.14404), from little noise to much:
    "ddpm_linear", gamma^2 = prod(1 - beta) with beta linear from 1e-4 to 2e-2;
    "linear_gamma2", gamma^2 = 1 - (t + 1) / num_steps, which ends at 0;
    "linear_sigma", gamma = 1 and sigma linear from 0 to sqrt(2);
    "single_sigma", gamma = 1 and sigma = sqrt(1/3) throughout.

    Raises:
        ValueError: If `name` is none of these.
    """
    gamma, sigma = exact_schedule(name, num_steps)
    return gamma.astype(np.float32), sigma.astype(np.float32)


def exact_schedule(name: str, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of `noise_schedule` in float64, for their differences."""
    if name in ("ddpm_linear", "linear_gamma2"):
        if name == "ddpm_linear":
            gamma2 = np.cumprod(1 - np.linspace(1e-4, 2e-2, num_steps))
        else:
            gamma2 = 1 - np.arange(1, num_steps + 1) / num_steps
        gamma, sigma = np.sqrt(gamma2), np.sqrt(1 - gamma2)
    elif name == "linear_sigma":
        gamma, sigma = np.ones(num_steps), np.linspace(0, math.sqrt(2), num_steps)
    elif name == "single_sigma":
        gamma, sigma = np.ones(num_steps), np.full(num_steps, math.sqrt(1 / 3))
    else:
        raise ValueError(f"Unknown noise schedule {name!r}; choose from {SCHEDULES}.")
    return gamma, sigma
