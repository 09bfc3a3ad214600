"""Paths between data and noise, and conversions between what a network may predict.

Time runs from data (t = 0) to noise (t = 1): x_t = (1 - t) x + t eps, and the
velocity is v = eps - x. Papers differ; this project never does.
"""

import jax
import jax.numpy as jnp

# Divisors t and 1 - t vanish at the ends, where the quantity sought is not defined
# by the one given. Below this bound the divisor is held, so results stay finite.
MIN_DIVISOR = 1e-5
# The same bound where a network predicts x and its error would be divided by t (RAEv2).
MIN_TIME_OF_X = 0.05


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """Gives per-sample values t (b,) the rank of x (b, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(
    x: jax.Array, eps: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns x_t and the velocity v on the straight path, for times t (b,)."""
    t = expand(t, x)
    return (1 - t) * x + t * eps, eps - x


def x_from_v(v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the clean array that a velocity points away from."""
    return x_t - expand(t, x_t) * v


def eps_from_v(v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the noise that a velocity points to."""
    return x_t + (1 - expand(t, x_t)) * v


def score_from_v(v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the gradient of the log density of x_t, -eps / t."""
    return -eps_from_v(v, x_t, t) / _divisor(expand(t, x_t))


def v_from_x(
    x: jax.Array, x_t: jax.Array, t: jax.Array, min_time: float = MIN_DIVISOR
) -> jax.Array:
    """Returns the velocity at x_t of the path that starts at x.

    Below `min_time` the divisor t is held.
    """
    return (x_t - x) / jnp.maximum(expand(t, x_t), min_time)


def v_from_eps(eps: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the velocity at x_t of the path that ends at eps."""
    return (eps - x_t) / _divisor(1 - expand(t, x_t))


def v_from_score(score: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the velocity that belongs to a score."""
    return v_from_eps(-expand(t, x_t) * score, x_t, t)


def diffuse(
    x: jax.Array, eps: jax.Array, gamma: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Returns gamma x + sigma eps, the discrete path of l-DAE (arXiv:2401.14404).

    `gamma` and `sigma` (b,) are the schedule's entries at each sample's step.
    """
    return expand(gamma, x) * x + expand(sigma, x) * eps


def _divisor(t: jax.Array) -> jax.Array:
    return jnp.maximum(t, MIN_DIVISOR)
