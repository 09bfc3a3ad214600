"""Ancestral sampling (DDPM, arXiv:2006.11239) of any discrete Gaussian process.

The process is z_t = gamma_t x + sigma_t eps for levels t = 0 .. T - 1, from little
noise to much, as in `schedules.noise_schedule`; it need not preserve the variance. A
sampler may visit some of the levels alone (respacing, arXiv:2102.09672).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.diffusion import grids, paths, schedules

PREDICTIONS = ("eps", "x")
VARIANCES = ("small", "large", "learned")
MIN_GAMMA2 = 1e-4  # A level without any signal says nothing of x from eps.
_TINY = 1e-20

# Called as denoise(z_t, t (b,)); returns the prediction and, where the variance is
# learned, its coefficient in [-1, 1] in the same shape, else None.
Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """Levels that a sampler visits, with what a step down from each needs.

    The step from level t to the one below it, s, draws from
    q(z_s | z_t, x) = N(from_z z_t + from_x x, small); below the lowest lies x itself.

    Attributes:
        t: Their indices (n,) int32, rising.
        gamma, sigma: Scales (n,) of signal and noise.
        from_z, from_x: Coefficients (n,) of the posterior mean.
        small: Variance (n,) of that posterior, 0 for the lowest level.
        large: Variance (n,) of z_t given z_s, the upper bound of what z_s can have
            if x is unit normal; beta_t if all levels are visited.
    """

    t: np.ndarray
    gamma: np.ndarray
    sigma: np.ndarray
    from_z: np.ndarray
    from_x: np.ndarray
    small: np.ndarray
    large: np.ndarray

    def log_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns logarithms (n,) of `small` and `large`, finite.

        The lowest level borrows the small variance of the next (arXiv:2102.09672).
        """
        small = self.small.astype(np.float64)
        small[0] = small[min(1, len(small) - 1)]
        bounds = (np.log(np.maximum(v, _TINY)) for v in (small, self.large))
        return tuple(bound.astype(np.float32) for bound in bounds)


def make_levels(schedule: str, num_steps: int = 250, num_levels: int = 1000) -> Levels:
    """Returns `num_steps` of a schedule's levels, evenly spaced, both ends included.

    A level without noise is x itself and is left out. Where no signal is left, as at
    the end of "linear_gamma2", gamma^2 counts as 1e-4 and sigma^2 as the rest.

    Raises:
        ValueError: There are not as many levels, or they do not grow noisier.
    """
    if not 1 <= num_steps <= num_levels:
        raise ValueError(f"{num_steps} steps, but there are {num_levels} levels.")
    gamma, sigma = schedules.exact_schedule(schedule, num_levels)
    if num_steps > 1:
        t = np.round(np.linspace(0, num_levels - 1, num_steps)).astype(np.int32)
    else:
        t = np.array([num_levels - 1], np.int32)
    t = t[sigma[t] > 0]
    gamma, sigma = gamma[t], sigma[t]
    empty = gamma**2 < MIN_GAMMA2 if schedule == "linear_gamma2" else gamma <= 0
    gamma = np.where(empty, np.sqrt(MIN_GAMMA2), gamma)
    sigma = np.where(empty, np.sqrt(1 - MIN_GAMMA2), sigma)
    return _with_posteriors(schedule, t, gamma, sigma)


def _with_posteriors(
    schedule: str, t: np.ndarray, gamma: np.ndarray, sigma: np.ndarray
) -> Levels:
    gamma_s, sigma_s = np.append(1.0, gamma[:-1]), np.append(0.0, sigma[:-1])
    ratio = gamma / gamma_s
    large = sigma**2 - ratio**2 * sigma_s**2
    if (large <= 0).any():
        raise ValueError(
            f"Levels of {schedule!r} do not grow noisier from one to the next, so "
            "there is nothing to sample along."
        )
    arrays = dict(
        gamma=gamma,
        sigma=sigma,
        from_z=ratio * sigma_s**2 / sigma**2,
        from_x=gamma_s * large / sigma**2,
        small=large * sigma_s**2 / sigma**2,
        large=large,
    )
    return Levels(t, **{k: v.astype(np.float32) for k, v in arrays.items()})


def predicted_x(
    out: jax.Array, z_t: jax.Array, gamma: jax.Array, sigma: jax.Array, prediction: str
) -> jax.Array:
    """Returns the clean array of a prediction "eps" or "x" at scales (b,)."""
    if prediction == "x":
        return out
    gamma, sigma = paths.expand(gamma, z_t), paths.expand(sigma, z_t)
    return (z_t - sigma * out) / gamma


def learned_log_variance(v: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Maps v in [-1, 1] to the log variance between two bounds (b,).

    arXiv:2102.09672, Eq. 15. Beyond these values of v it goes on linearly.
    """
    share = (v + 1) / 2
    return share * paths.expand(high, v) + (1 - share) * paths.expand(low, v)


def sample_ancestral(
    denoise: Denoise,
    z: jax.Array,
    keys: jax.Array,
    levels: Levels,
    *,
    prediction: str = "eps",
    variance: str = "large",
    keep: Sequence[int] = (),
) -> grids.Sampled:
    """Draws from the learned process, level by level, in one scan.

    Args:
        denoise: The network, see `Denoise`.
        z: The state (b, h, w, c) at the noisiest level. For levels that preserve the
            variance and end in noise, that is N(0, 1).
        keys: One key (b,) per sample, folded with the step, so that a sample does not
            depend on its batch; not those that made `z`.
        levels: From `make_levels`.
        prediction: What `denoise` predicts: "eps" or "x".
        variance: Of a step: "small", right for data that is a point; "large", right
            for unit normal data; "learned" between the two.
        keep: States to record: 0 is `z` itself, i the state after i steps.

    Returns:
        The sample, the recorded states and the number of evaluations. The last step
        adds no noise.

    Raises:
        ValueError: For an unknown name, missing keys, or an index outside the steps.
    """
    _check(prediction, variance, z, keys)
    n = len(levels.t)
    tables = {f.name: getattr(levels, f.name) for f in dataclasses.fields(levels)}
    tables["low"], tables["high"] = levels.log_bounds()
    down = {name: jnp.asarray(table[::-1]) for name, table in tables.items()}

    def noise(index):
        def one(key):
            return jax.random.normal(jax.random.fold_in(key, index), z.shape[1:])

        return jax.vmap(one)(keys)

    def step(z, _, index, t, t_next):
        at = {name: grids.rows(table[index], z) for name, table in down.items()}
        out, v = denoise(z, at["t"])
        x = predicted_x(out, z, at["gamma"], at["sigma"], prediction)
        mean = paths.expand(at["from_z"], z) * z + paths.expand(at["from_x"], z) * x
        if variance == "learned":
            scale = jnp.exp(0.5 * learned_log_variance(v, at["low"], at["high"]))
        else:
            scale = jnp.sqrt(paths.expand(at[variance], z))
        return jnp.where(index < n - 1, mean + scale * noise(index), mean), None

    times = np.append(levels.t[::-1], -1)
    z, states = grids.walk(step, z, times, keep)
    return grids.Sampled(z, states, grids.rows(n, z))


def _check(prediction: str, variance: str, z: jax.Array, keys: jax.Array) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"Unknown prediction {prediction!r}; choose from {PREDICTIONS}."
        )
    if variance not in VARIANCES:
        raise ValueError(f"Unknown variance {variance!r}; choose from {VARIANCES}.")
    if keys is None or keys.shape != z.shape[:1]:
        raise ValueError(f"Ancestral sampling needs {len(z)} keys, one per sample.")
