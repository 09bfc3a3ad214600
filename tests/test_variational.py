"""The bound that teaches a variance, against its definition."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.diffusion import ancestral
from rae_jax.losses import variational

LEVELS = ancestral.make_levels("ddpm_linear", 1000)
SHAPE = (3, 4, 2)


def draws(t):
    """Data, its noised form, the noise, a prediction of it and a variance."""
    rng = np.random.default_rng(0)
    x, eps, error, v = (rng.standard_normal(SHAPE) for _ in range(4))
    gamma, sigma = (table[t][:, None, None] for table in (LEVELS.gamma, LEVELS.sigma))
    return x, gamma * x + sigma * eps, eps, eps + 0.3 * error, np.tanh(v)


def test_bound_is_the_divergence_of_the_true_posterior():
    """Levels above 0, by betas in float64; the posterior's variance as in DDPM."""
    t = np.array([1, 300, 999])
    x, z_t, _, eps_pred, v = draws(t)
    beta = np.linspace(1e-4, 2e-2, 1000)
    bar = np.cumprod(1 - beta)
    b, now, before = (a[:, None, None] for a in (beta[t], bar[t], bar[t - 1]))
    small = b * (1 - before) / (1 - now)

    def mean_of(x):
        from_z = np.sqrt(1 - b) * (1 - before) / (1 - now)
        return from_z * z_t + b * np.sqrt(before) / (1 - now) * x

    x_pred = (z_t - np.sqrt(1 - now) * eps_pred) / np.sqrt(now)
    log_var = (v + 1) / 2 * np.log(b) + (1 - v) / 2 * np.log(small)
    distance = (mean_of(x) - mean_of(x_pred)) ** 2
    kl = 0.5 * (log_var - np.log(small) + (small + distance) * np.exp(-log_var) - 1)
    expected = kl.mean(axis=(1, 2)) / np.log(2)
    found = variational.bound(*map(jnp.asarray, (x, z_t, t, eps_pred, v)), LEVELS)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_bound_vanishes_for_the_true_step():
    t = np.array([5, 500, 998])
    x, z_t, eps, *_ = draws(t)
    arrays = map(jnp.asarray, (x, z_t, t, eps, -np.ones(SHAPE)))
    np.testing.assert_allclose(variational.bound(*arrays, LEVELS), 0, atol=1e-4)


def test_likelihood_of_8_bit_data():
    """The levels share the whole mass; that of one is the normal's integral."""
    grid = jnp.asarray(2 * np.arange(256) / 255 - 1, jnp.float32)
    mean, log_var = jnp.full(256, 0.2), jnp.full(256, -2.0)
    log_mass = variational.discrete_log_likelihood(grid, mean, log_var)
    np.testing.assert_allclose(np.exp(log_mass).sum(), 1, rtol=1e-4)
    normal = NormalDist(0.2, math.exp(-1))
    x = float(grid[180])
    expected = np.log(normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255))
    np.testing.assert_allclose(log_mass[180], expected, rtol=1e-3)
    t = np.zeros(3, int)  # At level 0 it is the term of the bound.
    x, z_t, eps, _, v = draws(t)
    x = np.clip(x, -1, 1)
    low, high = (b[0] for b in LEVELS.log_bounds())
    likelihood = variational.discrete_log_likelihood(
        jnp.asarray(x),
        jnp.asarray((z_t - LEVELS.sigma[0] * eps) / LEVELS.gamma[0]),
        jnp.asarray((v + 1) / 2 * high + (1 - v) / 2 * low),
    )
    found = variational.bound(*map(jnp.asarray, (x, z_t, t, eps, v)), LEVELS)
    expected = -likelihood.mean(axis=(1, 2)) / np.log(2)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("t", [0, 1])
def test_gradient_reaches_the_variance_alone(t):
    t = np.full(3, t)
    x, z_t, _, eps_pred, v = map(jnp.asarray, draws(t))

    def total(eps_pred, v):
        return variational.bound(x, z_t, jnp.asarray(t), eps_pred, v, LEVELS).sum()

    of_eps, of_v = jax.grad(total, argnums=(0, 1))(eps_pred, v)
    np.testing.assert_array_equal(of_eps, 0)
    assert np.isfinite(of_v).all() and np.abs(of_v).max() > 1e-4
