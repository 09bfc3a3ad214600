"""Accuracy, distribution and cost of every sampler, and guidance in two parts."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.diffusion import (
    adaptive,
    guidance,
    samplers,
    schedules,
    sharing,
    velocities,
)
from rae_jax.models import dit_dh

SHIFT = schedules.dimension_shift(768 * 256)
EPS = np.random.default_rng(0).standard_normal((8, 1, 1, 2)).astype(np.float32)
Y = np.zeros(8, np.int32)


def close(actual, desired, rtol=1e-5):
    np.testing.assert_allclose(actual, desired, atol=rtol * np.abs(desired).max())


def column(values):
    return jnp.asarray(values).reshape(-1, 1, 1, 1)


# dx/dt = 2 (cos 3t + t) x, solved from t = 1.
def swinging(x_t, t, y):
    return 2 * (jnp.cos(3 * column(t)) + column(t)) * x_t


def swung(eps, t):
    primitive = lambda t: 2 * np.sin(3 * t) / 3 + t**2  # noqa: E731
    return eps * np.exp(primitive(t) - primitive(1.0))


# The exact velocity E[eps - x | x_t] for data N(MEAN, COV).
MEAN = np.float32([1.0, -2.0])
COV = np.float32([[0.36, 0.3], [0.3, 1.06]])


def to_gaussian(x_t, t, y):
    a, s, one = (1 - t)[:, None, None], t[:, None, None], jnp.eye(2)[None]
    cov = COV[None]
    gain = (s * one - a * cov) @ jnp.linalg.inv(a**2 * cov + s**2 * one)  # (b, 2, 2)
    centred = x_t[:, 0, 0] - a[:, 0] * MEAN[None]
    v = jnp.einsum("bij,bj->bi", gain, centred) - MEAN[None]
    return v[:, None, None]


@pytest.mark.parametrize(
    "name, order, shift, points",
    [
        ("euler", 1, SHIFT, (41, 81, 161)),
        ("midpoint", 2, SHIFT, (81, 161, 321)),
        ("heun", 2, SHIFT, (41, 81, 161)),
        ("rk4", 4, 2.0, (6, 9, 13, 19)),
    ],
)
def test_order_of_accuracy(name, order, shift, points):
    """The slope of the error over the number of steps, both logarithmic."""
    errors = []
    for num_points in points:
        sampler = samplers.make_sampler(name, num_points=num_points, shift=shift)
        out = sampler(swinging, EPS, Y).x
        errors.append(np.abs(out - swung(EPS, sampler.times[-1])).max())
    slope = np.polyfit(np.log(np.asarray(points) - 1), np.log(errors), 1)[0]
    np.testing.assert_allclose(-slope, order, rtol=0.06)


@pytest.mark.parametrize("name, stages", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_evaluations(name, stages):
    counts = Counter()
    sampler = samplers.make_sampler(name, num_points=5)
    out = jax.jit(lambda eps: sampler(counted(swinging, counts), eps, Y))(EPS)
    jax.effects_barrier()
    assert counts == {8: 4 * stages}
    np.testing.assert_array_equal(out.evaluations, np.full(8, 4 * stages))


def counted(function, counts, name=None):
    """Counts calls at run time, under the size of the batch or a name."""

    def call(x_t, *args):
        key = name or x_t.shape[0]
        jax.debug.callback(lambda: counts.update([key]))
        return function(x_t, *args)

    return call


@pytest.mark.parametrize("name", ["heun", "rk4"])
def test_the_last_step_never_looks_at_data(name):
    """At t = 0 the velocity is not a number; the step before it is Euler's."""

    def velocity(x_t, t, y):
        return jnp.where(column(t) > 0, swinging(x_t, t, y), jnp.nan)

    full = samplers.make_sampler(name, num_points=6, final_zero=True)
    short = samplers.make_sampler(name, num_points=6)
    x_t, t = short(velocity, EPS, Y).x, jnp.full(8, short.times[-1])
    expected = x_t - column(t) * swinging(x_t, t, Y)
    close(full(velocity, EPS, Y).x, expected)


def test_dopri5_respects_its_tolerance():
    """Steps add up their errors, so the whole exceeds the tolerance of one."""
    errors, evaluations, times = [], [], samplers.euler_times(50, SHIFT)
    for rtol in (1e-3, 1e-6):
        tolerances = dict(rtol=rtol, atol=1e-3 * rtol)
        out = adaptive.sample_dopri5(swinging, EPS, Y, times, **tolerances)
        exact = swung(EPS, times[-1])
        errors.append(np.abs(out.x - exact).max() / np.abs(exact).max())
        evaluations.append(int(out.evaluations.max()))
        assert errors[-1] < 10 * rtol
    assert errors[0] > errors[1] and evaluations[0] < evaluations[1] < 100


def test_dopri5_gives_each_sample_its_own_steps():
    """A hard neighbour changes neither a sample nor its evaluations."""
    counts = Counter()
    sampler = samplers.make_sampler("dopri5", shift=SHIFT)

    y = np.asarray([0, 1, 0, 3, 0, 0, 2, 0], np.int32)

    @jax.jit
    def run(eps, y, rate):
        def velocity(x_t, t, y):
            return swinging(x_t, t, y) + jnp.sin(rate * column(y) * column(t))

        counting = counted(velocity, counts)
        return sampler(counting, eps, y, keep=(49, 0, 20, 20))

    out = run(EPS, y, 30.0)
    jax.effects_barrier()
    # The network is called with the whole batch, as often as the hardest needs.
    assert counts == {8: int(out.evaluations.max())}
    assert len(set(out.evaluations.tolist())) > 1
    easy = y == 0
    among_easy = run(EPS, np.zeros_like(y), 30.0)
    np.testing.assert_array_equal(among_easy.evaluations[easy], out.evaluations[easy])
    close(among_easy.x[easy], out.x[easy])
    close(out.states[0], out.x)
    close(out.states[1], EPS)
    np.testing.assert_array_equal(out.states[2], out.states[3])
    # The easy ones have a solution in closed form.
    close(out.states[2][easy], swung(EPS, sampler.times[20])[easy], 1e-3)


def test_dopri5_gives_up():
    times = samplers.euler_times(50, SHIFT)
    out = adaptive.sample_dopri5(swinging, EPS[:1], Y[:1], times, max_steps=2)
    assert np.isnan(out.x).all()


@pytest.mark.parametrize(
    "diffusion, final_zero", [("sigma", True), ("constant", False)]
)
def test_the_stochastic_sampler_reaches_the_distribution(diffusion, final_zero):
    """Mean and covariance in standard errors, of 10,000 samples."""
    count = 10_000
    sampler = samplers.make_sampler(
        "euler_maruyama",
        num_points=200,
        shift=2.0,
        final_zero=final_zero,
        options=dict(diffusion=diffusion),
    )
    eps = jax.random.normal(jax.random.key(0), (count, 1, 1, 2))
    keys = jax.random.split(jax.random.key(1), count)
    run = jax.jit(lambda: sampler(to_gaussian, eps, jnp.zeros(count), keys).x)
    t = float(sampler.times[-1])
    cov = (1 - t) ** 2 * COV + t**2 * np.eye(2)
    x = np.asarray(run())[:, 0, 0] - (1 - t) * MEAN
    z = x @ np.linalg.inv(np.linalg.cholesky(cov)).T  # (count, 2), standard normal
    mean = z.mean(0) * np.sqrt(count)
    second = (z.T @ z / count - np.eye(2)) * np.sqrt(count / 2)
    assert np.abs(mean).max() < 4
    # Room for a discretisation error of less than two standard errors.
    assert np.abs(second).max() < 5
    # The noise has replaced most of what the start determined.
    start = np.asarray(eps)[:, 0, 0]
    assert np.abs(z.T @ start / count).max() < 0.6


def test_stochastic_steps():
    """Without noise they are Euler's, and so is a last one that ends at data."""
    keys, times = jax.random.split(jax.random.key(0), 8), samplers.euler_times(6, SHIFT)
    run = samplers.SAMPLERS["euler_maruyama"]
    out = run(swinging, EPS, Y, times, keys, strength=0.0)
    close(out.x, samplers.sample_euler(swinging, EPS, Y, times))
    times = np.append(times, np.float32(0))
    out = run(swinging, EPS, Y, times, keys, keep=(5,))
    x_t, t = out.states[0], jnp.full(8, times[5])
    close(out.x, x_t - column(t) * swinging(x_t, t, Y))
    with pytest.raises(ValueError, match="needs 8 keys"):
        run(swinging, EPS, Y, times, None)


def test_stochastic_samples_do_not_depend_on_the_batch():
    """Alone, in another order, and split over eight devices."""
    sampler = samplers.make_sampler("euler_maruyama", num_points=6)
    keys = jax.random.split(jax.random.key(0), 8)
    run = jax.jit(lambda *args: sampler(swinging, *args).x)
    together = run(EPS, Y, keys)
    assert len(np.unique(together)) == together.size
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put((EPS, Y, keys), NamedSharding(mesh, P("data")))
    close(run(*spread), together)
    turned = slice(None, None, -1)
    close(run(EPS[turned], Y[turned], keys[turned]), together[turned])
    close(run(EPS[3:4], Y[3:4], keys[3:4]), together[3:4])


GUIDED = {
    "classifier_free": lambda velocity: guidance.classifier_free(
        velocity, 1.5, 10, (0.3, 0.9)
    ),
    "autoguidance": lambda velocity: guidance.autoguidance(
        velocity, velocities.split(Swing(0.5)), 1.5, (0.3, 0.9)
    ),
}


class Swing:
    """The least network of two parts."""

    def __init__(self, rate=1.0):
        self.rate = rate

    def __call__(self, x_t, t, y):
        return self.head(x_t, self.trunk(x_t, t, y), t)

    def trunk(self, x_t, t, y):
        return self.rate * jnp.cos(3 * column(t)) + 0.1 * column(y) + 0.1 * x_t

    def head(self, x_t, s, t):
        return s * x_t


def small_dit_dh():
    widths = dict(hidden_size=(32, 48), depth=(2, 1), num_heads=(2, 2))
    shape = dict(input_size=2, in_channels=2, num_classes=10)
    return networks.drawn(dit_dh.DiTDH, **shape, **widths, remat="none")


@pytest.mark.parametrize(
    "name, make", [("classifier_free", small_dit_dh), ("autoguidance", Swing)]
)
def test_shared_trunk(name, make):
    """Equal to steps taken by hand; the trunk runs in those listed and no others."""
    network = make()
    eps = np.random.default_rng(1).standard_normal((4, 2, 2, 2)).astype(np.float32)
    y, times = np.asarray([0, 3, 9, 3], np.int32), samplers.euler_times(5, SHIFT)
    parts, whole = GUIDED[name](velocities.split(network)), GUIDED[name](network)
    assert not isinstance(whole, velocities.Split)
    trunk, head = jax.jit(parts.trunk), jax.jit(parts.head)
    x_t = eps
    for i in range(4):
        t = jnp.full(4, times[i])
        if i in (0, 1, 3):
            s = trunk(x_t, t, y)
            close(head(x_t, t, s), jax.jit(whole)(x_t, t, y))
        x_t = x_t + (times[i + 1] - times[i]) * head(x_t, t, s)

    counts = Counter()
    counting = velocities.Split(counted(parts.trunk, counts, "trunk"), parts.head)
    run = jax.jit(sharing.sample_euler_shared, static_argnames=("velocity", "steps"))
    shared = run(counting, eps, y, times, steps=(0, 1, 3))
    jax.effects_barrier()
    assert counts == {"trunk": 3} and shared.evaluations.tolist() == [3] * 4
    close(shared.x, x_t)


def test_sharing_with_period_one_is_eulers():
    parts = velocities.split(Swing())
    times = samplers.euler_times(50, SHIFT)
    errors = {}
    euler = samplers.sample_euler(parts, EPS, Y, times)
    for period in (1, 2, 4):
        out = sharing.sample_euler_shared(parts, EPS, Y, times, period=period)
        errors[period] = np.abs(out.x - euler).max()
        assert out.evaluations.tolist() == [-(-49 // period)] * 8
    assert errors[1] <= 1e-6 and 1e-3 < errors[2] < errors[4]


def test_trunk_steps():
    steps = lambda *args: np.flatnonzero(sharing.trunk_steps(7, *args)).tolist()  # noqa: E731
    assert steps(1) == list(range(7))
    assert steps(3) == [0, 3, 6]
    assert steps(1, (0, 1, 5)) == [0, 1, 5]
    for args, message in [
        ((0,), "at least 1, got 0"),
        ((2, (0, 1)), "not both"),
        ((1, (1, 2)), "contain 0"),
        ((1, (0, 7)), "below 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            steps(*args)


def test_sharing_needs_two_parts():
    sampler = samplers.make_sampler("euler_shared", options=dict(period=2))
    assert sampler.shares_trunk and not sampler.stochastic
    guided = guidance.classifier_free(swinging, 1.5, 10)
    with pytest.raises(ValueError, match="trunk and head"):
        sampler(guided, EPS, Y)


def test_networks_called_by_guidance():
    """Classifier-free guidance doubles the batch; autoguidance adds a small call."""
    counts, small = Counter(), Counter()
    large, t = counted(swinging, counts), np.full(8, 0.5, np.float32)
    guided = guidance.autoguidance(large, counted(swinging, small), 1.5)
    guided(EPS, t, Y)
    jax.effects_barrier()
    assert counts == small == {8: 1}
    guidance.classifier_free(large, 1.5, 10)(EPS, t, Y)
    jax.effects_barrier()
    assert counts == {8: 1, 16: 1}


def test_internal_guidance():
    """The early prediction is 4 x, the main one 2 x; the interval is inclusive."""
    x_t, t = jnp.asarray(EPS[:4]), jnp.asarray([0.05, 0.1, 0.6, 0.9])

    def both(x_t, t, y):
        return 2 * x_t, 4 * x_t

    guided = guidance.internal_guidance(both, 1.75, (0.1, 0.6))
    close(guided(x_t, t, Y[:4]), column([2.0, 0.5, 0.5, 2.0]) * x_t)
    plain = guidance.internal_guidance(both, 1.0)
    np.testing.assert_array_equal(plain(x_t, t, Y[:4]), 2 * x_t)
    # On top of it, classifier-free guidance sees one velocity.
    doubled = guidance.classifier_free(guided, 3.0, 10)
    close(doubled(x_t, t, Y[:4]), guided(x_t, t, Y[:4]))
    split = velocities.Split(
        lambda x_t, t, y: 2.0, lambda x_t, t, s: (s * x_t, 4 * x_t)
    )
    guided = guidance.internal_guidance(split, 1.75, (0.1, 0.6))
    assert isinstance(guided, velocities.Split)
    close(guided(x_t, t, Y[:4]), column([2.0, 0.5, 0.5, 2.0]) * x_t)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler(name):
    """States are recorded, custom grids accepted, and the program is one loop."""
    keys = jax.random.split(jax.random.key(0), 8)
    velocity = velocities.Split(
        lambda x_t, t, y: t, lambda x_t, t, s: swinging(x_t, s, Y)
    )

    short = samplers.make_sampler(name, times=(1.0, 0.8, 0.5, 0.1))
    long = dataclasses.replace(short, times=np.linspace(1, 0.1, 40))

    def run(sampler, keep):
        return lambda eps: sampler(velocity, eps, Y, keys, keep)

    out = jax.jit(run(short, (0, 3)))(EPS)
    assert out.x.dtype == jnp.float32 and out.evaluations.shape == (8,)
    close(out.states[0], EPS)
    close(out.states[1], out.x)
    size = lambda s: str(jax.make_jaxpr(run(s, (0, 3)))(EPS)).count("\n")  # noqa: E731
    assert size(short) == size(long)
    with pytest.raises(ValueError, match="exceeds a grid of 4"):
        run(short, (4,))(EPS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="ddim"), "'ddim'.*'dopri5', 'euler'"),
        (dict(options=dict(rtol=1)), r"'euler' has no options \['rtol'\], only \[\]"),
        (dict(name="heun", options=dict(tableau=1)), r"no options \['tableau'\]"),
        (dict(name="dopri5", options=dict(rtol=0.0)), "positive, got 0.0"),
        (dict(name="euler_shared", options=dict(period=0)), "at least 1, got 0"),
        (dict(name="euler_maruyama", options=dict(diffusion="x")), "'x'.*constant"),
        (dict(name="euler_maruyama", options=dict(strength=-1)), "negative, got -1"),
        (dict(times=(1.0, 0.5, 0.7)), "fall within"),
        (dict(times=(1.1, 0.5)), "fall within"),
        (dict(times=(1.0,)), "fall within"),
        (dict(num_points=1), "at least 2, got 1"),
    ],
)
def test_wrong_configs_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        samplers.make_sampler(**arguments)
