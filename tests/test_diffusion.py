"""Exactness of paths, schedules, guidance and the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.diffusion import guidance, paths, samplers, schedules


def randn(*shape, seed=0):
    draws = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(draws)


def test_interpolation_ends_at_data_and_noise():
    x, eps = randn(3, 2, 2, 4), randn(3, 2, 2, 4, seed=1)
    x_t, v = paths.interpolate(x, eps, jnp.asarray([0.0, 1.0, 0.25]))
    np.testing.assert_array_equal(x_t[0], x[0])
    np.testing.assert_array_equal(x_t[1], eps[1])
    np.testing.assert_allclose(x_t[2], 0.75 * x[2] + 0.25 * eps[2], rtol=1e-6)
    np.testing.assert_array_equal(v, eps - x)


def test_velocity_is_the_time_derivative():
    x, eps, t = randn(2, 3), randn(2, 3, seed=1), jnp.asarray([0.2, 0.7])
    path = lambda t: paths.interpolate(x, eps, t)[0]  # noqa: E731
    _, derivative = jax.jvp(path, (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(derivative, eps - x, rtol=1e-5)


def test_conversions_invert():
    x, eps = randn(4, 2, 2, 3), randn(4, 2, 2, 3, seed=1)
    t = jnp.asarray([0.05, 0.3, 0.6, 0.95])
    x_t, v = paths.interpolate(x, eps, t)
    # Divisors down to 0.05 magnify float32 rounding.
    check = lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5)  # noqa: E731
    check(paths.x_from_v(v, x_t, t), x)
    check(paths.eps_from_v(v, x_t, t), eps)
    check(paths.v_from_x(x, x_t, t), v)
    check(paths.v_from_eps(eps, x_t, t), v)
    check(paths.v_from_score(paths.score_from_v(v, x_t, t), x_t, t), v)


def test_score_of_a_gaussian():
    """Data N(0, I): x_t is N(0, (1-t)^2 + t^2), and v = E[eps - x | x_t]."""
    x_t, t = randn(3, 5), jnp.asarray([0.1, 0.5, 1.0])
    variance = ((1 - t) ** 2 + t**2)[:, None]
    v = (t - (1 - t))[:, None] * x_t / variance
    np.testing.assert_allclose(
        paths.score_from_v(v, x_t, t), -x_t / variance, atol=1e-5
    )


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_conversions_are_finite_at_the_ends(end):
    x, eps, t = randn(2, 3), randn(2, 3, seed=1), jnp.full(2, end)
    x_t, v = paths.interpolate(x, eps, t)
    for convert, a in [
        (paths.v_from_x, x),
        (paths.v_from_eps, eps),
        (paths.score_from_v, v),
        (paths.v_from_score, v),
    ]:
        value, grads = jax.value_and_grad(lambda *args, f=convert: f(*args).sum())(
            a, x_t, t
        )
        assert np.isfinite(value) and np.isfinite(grads).all()


def test_diffuse_uses_each_samples_scales():
    x, eps = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    z = paths.diffuse(x, eps, jnp.asarray([1.0, 0.5]), jnp.asarray([0.0, 2.0]))
    np.testing.assert_array_equal(z[0], x[0])
    np.testing.assert_allclose(z[1], 0.5 * x[1] + 2 * eps[1], rtol=1e-6)


def test_logit_normal_quantiles():
    """The median is sigmoid(mean); 84.13% lie below one deviation more."""
    t = schedules.logit_normal_time(jnp.asarray([0.0, 0.5, 0.8413447]), -0.5, 1.2, 1.0)
    expected = jax.nn.sigmoid(jnp.asarray([-jnp.inf, -0.5, 0.7]))
    np.testing.assert_allclose(t, expected, atol=1e-5)


@pytest.mark.parametrize("name", schedules.TIMES)
def test_sampled_times(name):
    t = np.asarray(schedules.sample_time(name, jax.random.key(0), 20000))
    assert t.shape == (20000,) and t.min() >= 0 and t.max() <= 0.999
    std = {"uniform": 0.2884, "logit_normal": 0.2083}[name]
    # Five standard deviations of the mean; the standard deviation to two percent.
    np.testing.assert_allclose(t.mean(), 0.4995, atol=0.011)
    np.testing.assert_allclose(t.std(), std, rtol=0.02)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'cosine'.*logit_normal"):
        schedules.sample_time("cosine", jax.random.key(0), 4)
    with pytest.raises(ValueError, match="'cosine'.*ddpm_linear"):
        schedules.noise_schedule("cosine")
    with pytest.raises(ValueError, match="positive, got 0"):
        schedules.dimension_shift(0)


def test_shift_is_monotone_and_keeps_the_ends():
    t = jnp.linspace(0, 1, 1001)
    for shift in (1.0, 6.928, 13.856):
        shifted = schedules.shift_time(t, shift)
        assert (jnp.diff(shifted) > 0).all()
        assert (shifted >= t - 1e-7).all()
        np.testing.assert_allclose(shifted[jnp.asarray([0, -1])], [0, 1], atol=1e-6)
    np.testing.assert_allclose(schedules.shift_time(t, 1.0), t)


def test_shift_values_of_the_paper():
    """Shifts for 256 and 512 pixels, and what they make of t = 0.5 and 0.999."""
    for dim, shift, half, end in [
        (768 * 256, 6.92820323, 0.873868, 0.9998555),
        (768 * 1024, 13.8564065, 0.932689, 0.9999278),
    ]:
        assert abs(schedules.dimension_shift(dim) - shift) < 1e-7
        np.testing.assert_allclose(schedules.shift_time(0.5, shift), half, atol=1e-6)
        np.testing.assert_allclose(schedules.shift_time(0.999, shift), end, atol=1e-7)


STEPS = [0, 10, 100, 250, 500, 750, 999]
# gamma^2, or sigma for the schedule whose gamma is 1.
TABLES = {
    "ddpm_linear": [0.9999, 0.997807, 0.895142, 0.521423, 0.0777967, 0.00330016,
                    4.03583e-5],
    "linear_gamma2": [0.999, 0.989, 0.899, 0.749, 0.499, 0.249, 0.0],
    "linear_sigma": [0.0, 0.014156, 0.141563, 0.353907, 0.707815, 1.061722, 1.414214],
    "single_sigma": [0.5773503] * 7,
}  # fmt: skip


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_noise_schedules(name):
    gamma, sigma = schedules.noise_schedule(name)
    assert gamma.shape == sigma.shape == (1000,)
    assert gamma.dtype == sigma.dtype == np.float32
    assert (np.diff(sigma) >= 0).all()
    if name in ("linear_sigma", "single_sigma"):
        np.testing.assert_array_equal(gamma, 1)
        actual = sigma[STEPS]
    else:
        np.testing.assert_allclose(gamma**2 + sigma**2, 1, rtol=1e-6)
        actual = gamma[STEPS] ** 2
    np.testing.assert_allclose(actual, TABLES[name], rtol=5e-6, atol=5e-7)


def linear_velocity(rate):
    return lambda x_t, t, y: (rate + y).reshape(-1, 1, 1, 1) * x_t


def test_guidance_extrapolates_inside_the_interval():
    """With v = (1 + y) x the null label 5 gives 6 x, so guidance can be computed."""
    x_t, y = randn(4, 2, 2, 3), jnp.asarray([0.0, 1.0, 2.0, 3.0])
    t = jnp.asarray([0.1, 0.3, 0.8, 0.9])  # below, on, on, above
    guided = guidance.classifier_free(linear_velocity(1.0), 1.5, 5, (0.3, 0.8))
    factor = jnp.asarray([1.0, 6 + 1.5 * (2 - 6), 6 + 1.5 * (3 - 6), 4.0])
    expected = factor[:, None, None, None] * x_t
    np.testing.assert_allclose(guided(x_t, t, y), expected, atol=1e-5)

    guide = linear_velocity(4.0)
    guided = guidance.autoguidance(linear_velocity(1.0), guide, 1.5, (0.3, 0.8))
    factor = jnp.asarray([1.0, 5 + 1.5 * (2 - 5), 6 + 1.5 * (3 - 6), 4.0])
    expected = factor[:, None, None, None] * x_t
    np.testing.assert_allclose(guided(x_t, t, y), expected, atol=1e-5)


def test_guidance_of_one_costs_nothing():
    velocity = linear_velocity(1.0)
    assert guidance.classifier_free(velocity, 1.0, 5) is velocity
    assert guidance.autoguidance(velocity, None, 1.0) is velocity


def test_grid():
    """The official 256-pixel grid of 50 points, and the one that reaches data."""
    shift = schedules.dimension_shift(768 * 256)
    times = samplers.euler_times(50, shift)
    head, tail = [1.0, 0.9970050, 0.9939018, 0.9906843], [0.2319788, 0.1315051]
    np.testing.assert_allclose(times[:4], head, atol=1e-6)
    np.testing.assert_allclose(times[-3:], [*tail, 0.0068874], atol=1e-6)
    clean = samplers.euler_times(50, shift, final_zero=True)
    assert len(clean) == 51 and clean[-1] == 0
    np.testing.assert_array_equal(clean[:-1], times)
    assert len(samplers.euler_times(3, t_max=1.0, final_zero=True)) == 3
    with pytest.raises(ValueError, match="at least 2, got 1"):
        samplers.euler_times(1)


@pytest.mark.parametrize("num_points", [2, 8])
def test_euler_is_exact_on_straight_paths(num_points):
    """A constant velocity carries noise to data in any number of steps."""
    x, eps = randn(4, 3, 3, 2), randn(4, 3, 3, 2, seed=1)
    times = samplers.euler_times(num_points, 6.9, final_zero=True)
    out = samplers.sample_euler(
        lambda x_t, t, y: eps - x, eps, jnp.zeros(4, int), times
    )
    np.testing.assert_allclose(out, x, atol=1e-5)


def test_euler_has_order_one():
    """dx/dt = x from t = 1 to 0 divides by e; the error halves with the step."""
    eps, y = jnp.ones((1, 1, 1, 1)), jnp.zeros(1)
    errors = []
    for num_points in (41, 81, 161):
        times = samplers.euler_times(num_points, t_max=1.0)
        out = samplers.sample_euler(linear_velocity(1.0), eps, y, times)
        errors.append(abs(float(out[0, 0, 0, 0]) - np.exp(-1)))
    orders = np.log2(np.asarray(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1, atol=0.02)


def test_recorded_states():
    eps, y = randn(2, 1, 1, 3), jnp.zeros(2)
    times = samplers.euler_times(5, 2.0)
    velocity = linear_velocity(1.0)
    x, states = samplers.sample_euler_states(velocity, eps, y, times, (0, 3, 4))
    np.testing.assert_array_equal(states[0], eps)
    np.testing.assert_array_equal(states[2], x)
    short = samplers.sample_euler(velocity, eps, y, times[:4])
    np.testing.assert_allclose(states[1], short, rtol=1e-6)
    np.testing.assert_array_equal(x, samplers.sample_euler(velocity, eps, y, times))
    with pytest.raises(ValueError, match="exceeds a grid of 5"):
        samplers.sample_euler_states(velocity, eps, y, times, (5,))
