"""The variational bound that teaches a network the variance of its steps.

arXiv:2102.09672, as DiT (arXiv:2212.09748) has it: the bound is added to the error of
the noise, and its gradient reaches the variance alone.
"""

import math

import jax
import jax.numpy as jnp

from rae_jax.diffusion import ancestral

_LEVEL = 1 / 255  # Half the width of a level of 8-bit data in [-1, 1].
_EDGE = 0.999  # Beyond it lies the first or last of these levels.


def bound(
    x: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    eps_pred: jax.Array,
    v: jax.Array,
    levels: ancestral.Levels,
) -> jax.Array:
    """Returns the term of the bound at levels t in bits per entry, (b,).

    Above level 0 it is the divergence of the network's step from the true posterior,
    at level 0 the likelihood of x, in the discrete form for 8-bit data that DiT keeps
    for latents, too.

    Args:
        x: Clean data (b, n, d).
        z_t: The same with noise.
        t: Levels (b,).
        eps_pred: The predicted noise; receives no gradient.
        v: The predicted variance, see `ancestral.learned_log_variance`.
        levels: All levels of the schedule.
    """
    low, high = (jnp.asarray(b)[t] for b in levels.log_bounds())
    at = {name: _at(levels, name, t) for name in ("gamma", "sigma", "from_z", "from_x")}
    eps_pred = jax.lax.stop_gradient(eps_pred)
    x_pred = ancestral.predicted_x(eps_pred, z_t, at["gamma"], at["sigma"], "eps")
    from_z, from_x = (at[k][:, None, None] for k in ("from_z", "from_x"))
    log_var = ancestral.learned_log_variance(v, low, high)
    mean = from_z * z_t + from_x * x_pred
    step = normal_kl(from_z * z_t + from_x * x, low[:, None, None], mean, log_var)
    first = -discrete_log_likelihood(x, mean, log_var)
    terms = jnp.where(t[:, None, None] == 0, first, step)
    return jnp.mean(terms, axis=(1, 2)) / math.log(2)


def _at(levels: ancestral.Levels, name: str, t: jax.Array) -> jax.Array:
    return jnp.asarray(getattr(levels, name))[t]


def normal_kl(
    mean1: jax.Array, log_var1: jax.Array, mean2: jax.Array, log_var2: jax.Array
) -> jax.Array:
    """Returns KL(N1 || N2) of each entry in nats."""
    ratio = jnp.exp(log_var1 - log_var2)
    distance = (mean1 - mean2) ** 2 * jnp.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 + ratio + distance - 1)


def discrete_log_likelihood(
    x: jax.Array, mean: jax.Array, log_var: jax.Array
) -> jax.Array:
    """Returns the log mass that N(mean, exp(log_var)) gives the 8-bit level of x.

    The first and the last of 256 levels in [-1, 1] take the tails. The distribution
    function of the normal is exact here; DiT's is a tanh that differs by up to 1e-3.
    """
    scale = jnp.exp(-0.5 * log_var)
    upper = jax.scipy.stats.norm.cdf((x - mean + _LEVEL) * scale)
    lower = jax.scipy.stats.norm.cdf((x - mean - _LEVEL) * scale)
    mass = jnp.where(x < -_EDGE, upper, jnp.where(x > _EDGE, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))
