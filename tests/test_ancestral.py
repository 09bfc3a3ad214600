"""Ancestral sampling: exact on data whose denoiser is known, and its variances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.diffusion import ancestral, schedules

MEAN, SPREAD = 1.5, 0.4  # Of the data; latents here have one entry.
COUNT = 40_000
PRESERVING = schedules.PRESERVING


def run(denoise, levels, start=None, count=COUNT, **options):
    z = jax.random.normal(jax.random.key(0), (count, 1, 1, 1))
    z = z if start is None else start(z)
    keys = jax.random.split(jax.random.key(1), count)

    @jax.jit
    def sample(z):
        return ancestral.sample_ancestral(denoise, z, keys, levels, **options)

    found = sample(z)
    return np.asarray(found.x).ravel(), np.asarray(found.states)[..., 0, 0, 0]


def scales(levels, t):
    """gamma and sigma (b, 1, 1, 1) of the levels t (b,)."""
    index = jnp.searchsorted(jnp.asarray(levels.t), t)
    return (jnp.asarray(a)[index].reshape(-1, 1, 1, 1) for a in scales_of(levels))


def scales_of(levels):
    return levels.gamma, levels.sigma


def gaussian(levels, prediction, spread=SPREAD):
    """The best denoiser of N(MEAN, spread^2), which also knows the best variance."""
    low, high = map(jnp.asarray, levels.log_bounds())

    def denoise(z, t):
        gamma, sigma = scales(levels, t)
        total = gamma**2 * spread**2 + sigma**2
        x = MEAN + gamma * spread**2 / total * (z - gamma * MEAN)
        index = jnp.searchsorted(jnp.asarray(levels.t), t)
        from_x, small = (jnp.asarray(a)[index] for a in (levels.from_x, levels.small))
        left = (spread**2 * sigma**2 / total).ravel()  # Of x given z.
        best = jnp.log(small + from_x**2 * left)
        share = (best - low[index]) / (high[index] - low[index])
        v = (2 * share - 1).reshape(z.shape)
        return (x if prediction == "x" else (z - gamma * x) / sigma), v

    return denoise


@pytest.mark.parametrize("prediction", ancestral.PREDICTIONS)
@pytest.mark.parametrize("schedule", PRESERVING)
def test_marginals_of_gaussian_data_are_exact(schedule, prediction):
    """With the best denoiser and variance every level has N(gamma m, gamma^2 s^2 +
    sigma^2), however few are visited; 40,000 samples, four standard errors."""
    levels = ancestral.make_levels(schedule, 12)
    steps = (3, 6, 9, 11)
    denoise = gaussian(levels, prediction)
    options = dict(prediction=prediction, variance="learned")
    _, states = run(denoise, levels, keep=steps, **options)
    for step, found in zip(steps, states, strict=True):
        gamma, sigma = (a[::-1][step] for a in scales_of(levels))
        spread = np.sqrt(gamma**2 * SPREAD**2 + sigma**2)
        assert abs(found.mean() - gamma * MEAN) < 4 * spread / np.sqrt(COUNT)
        assert abs(found.std() / spread - 1) < 4 / np.sqrt(2 * COUNT)


def test_each_fixed_variance_is_exact_for_its_data():
    """The small one for a point, the large one for N(0, 1)."""
    levels = ancestral.make_levels("linear_gamma2", 20)

    def point(z, t):
        return jnp.full_like(z, MEAN), None

    x, _ = run(point, levels, count=100, prediction="x", variance="small")
    np.testing.assert_allclose(x, MEAN, rtol=1e-6)

    def unit(z, t):
        return next(scales(levels, t)) * z, None

    for variance, spread in (("large", 1.0), ("small", None)):
        options = dict(prediction="x", variance=variance, keep=(10, 19))
        _, states = run(unit, levels, **options)
        if spread:
            np.testing.assert_allclose(states.std(axis=1), spread, atol=0.015)
        else:
            assert states[1].std() < 0.93  # Too little noise for it.


def test_a_process_that_adds_noise_alone_is_exact_from_its_own_marginal():
    """gamma = 1: there is no prior, but from a true state all is the same."""
    levels = ancestral.make_levels("linear_sigma", 40)
    assert levels.t[0] > 0  # Level 0 has no noise and is left out.
    top = np.sqrt(SPREAD**2 + levels.sigma[-1] ** 2)
    denoise = gaussian(levels, "x")
    options = dict(prediction="x", variance="learned", keep=(38,))
    start = lambda z: MEAN + top * z  # noqa: E731
    _, (found,) = run(denoise, levels, start, **options)
    spread = np.sqrt(SPREAD**2 + levels.sigma[0] ** 2)
    assert abs(found.mean() - MEAN) < 4 * spread / np.sqrt(COUNT)
    assert abs(found.std() / spread - 1) < 4 / np.sqrt(2 * COUNT)


def test_levels_are_those_of_ddpm():
    """All of them: beta, the posterior's variance and coefficients of DDPM."""
    beta = np.linspace(1e-4, 2e-2, 1000)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    levels = ancestral.make_levels("ddpm_linear", 1000)
    expected = dict(
        large=beta,
        small=beta * (1 - before) / (1 - bar),
        from_x=beta * np.sqrt(before) / (1 - bar),
        from_z=np.sqrt(1 - beta) * (1 - before) / (1 - bar),
    )
    for name, values in expected.items():
        found = getattr(levels, name)
        np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-12, err_msg=name)
    low, high = levels.log_bounds()
    assert low[0] == low[1] and (low[1:] < high[1:]).all()
    respaced = ancestral.make_levels("ddpm_linear", 250)
    assert (respaced.t[0], respaced.t[-1], len(respaced.t)) == (0, 999, 250)
    assert np.ptp(np.diff(respaced.t)) <= 1


def test_a_last_level_without_signal_keeps_a_little():
    for steps in (7, 1000):
        levels = ancestral.make_levels("linear_gamma2", steps)
        np.testing.assert_allclose(levels.gamma[-1] ** 2, 1e-4, rtol=1e-5)
        np.testing.assert_allclose(levels.gamma**2 + levels.sigma**2, 1, rtol=1e-5)
        assert levels.gamma[-2] ** 2 > 9e-4
    gamma = ancestral.make_levels("ddpm_linear", 5).gamma
    np.testing.assert_allclose(gamma[-1] ** 2, 4.03583e-5, rtol=1e-4)


def test_samples_do_not_depend_on_their_batch():
    levels = ancestral.make_levels("ddpm_linear", 5)
    denoise = gaussian(levels, "eps")
    z = jax.random.normal(jax.random.key(0), (6, 1, 1, 1))
    keys = jax.random.split(jax.random.key(1), 6)
    sample = jax.jit(
        lambda z, keys: ancestral.sample_ancestral(denoise, z, keys, levels).x
    )
    np.testing.assert_array_equal(sample(z, keys)[2:4], sample(z[2:4], keys[2:4]))


def test_what_cannot_be_sampled_is_named():
    with pytest.raises(ValueError, match="'single_sigma' do not grow noisier"):
        ancestral.make_levels("single_sigma", 10)
    with pytest.raises(ValueError, match="1001 steps, but there are 1000"):
        ancestral.make_levels("ddpm_linear", 1001)
    levels, z = ancestral.make_levels("ddpm_linear", 3), jnp.zeros((2, 1, 1, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    for options, message in (
        (dict(prediction="v"), "prediction 'v'"),
        (dict(variance="huge"), "variance 'huge'"),
    ):
        with pytest.raises(ValueError, match=message):
            ancestral.sample_ancestral(None, z, keys, levels, **options)
    with pytest.raises(ValueError, match="2 keys"):
        ancestral.sample_ancestral(None, z, keys[:1], levels)
