"""Samplers by name: from noise to data along a grid of times.

Every sampler is a pure function sample(velocity, eps, y, times, *, keep, ...) that
returns `grids.Sampled` and compiles to one loop. Stochastic ones take `keys` too.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.diffusion import (
    adaptive,
    grids,
    guidance,
    runge_kutta,
    schedules,
    sharing,
    stochastic,
    velocities,
)

_runge_kutta = runge_kutta.sample_runge_kutta
SAMPLERS: dict[str, Callable[..., grids.Sampled]] = {
    "euler": partial(_runge_kutta, tableau=runge_kutta.EULER),
    "midpoint": partial(_runge_kutta, tableau=runge_kutta.MIDPOINT),
    "heun": partial(_runge_kutta, tableau=runge_kutta.HEUN),
    "rk4": partial(_runge_kutta, tableau=runge_kutta.KUTTA),
    "dopri5": adaptive.sample_dopri5,
    "euler_maruyama": stochastic.sample_euler_maruyama,
    "euler_shared": sharing.sample_euler_shared,
}
# Arguments of these functions that are no options.
NOT_OPTIONS = {"velocity", "eps", "y", "times", "keys", "keep", "tableau"}


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler with its grid and options, made by `make_sampler`.

    Attributes:
        name: Name in `SAMPLERS`.
        times: Decreasing float32 times.
        options: What else the function takes.
    """

    name: str
    times: np.ndarray
    options: Mapping[str, Any]

    @property
    def stochastic(self) -> bool:
        """Whether calls need `keys`."""
        return "keys" in inspect.signature(SAMPLERS[self.name]).parameters

    @property
    def shares_trunk(self) -> bool:
        """Whether `velocity` has to be a `velocities.Split`."""
        return SAMPLERS[self.name] is sharing.sample_euler_shared

    def __call__(
        self,
        velocity: velocities.Velocity,
        eps: jax.Array,
        y: jax.Array,
        keys: jax.Array | None = None,
        keep: Sequence[int] = (),
    ) -> grids.Sampled:
        """Samples from noise eps (b, h, w, c) and labels y (b,).

        Args:
            velocity: The network, possibly guided.
            eps: Noise, the state at times[0].
            y: Labels.
            keys: One key (b,) per sample, other than those that made `eps`; used by
                stochastic samplers alone.
            keep: Indices into `times` of the states to record.
        """
        extra = {"keys": keys} if self.stochastic else {}
        sample = SAMPLERS[self.name]
        return sample(velocity, eps, y, self.times, keep=keep, **extra, **self.options)


def make_sampler(
    name: str = "euler",
    *,
    num_points: int = 50,
    shift: float = 1.0,
    t_max: float = 0.999,
    final_zero: bool = False,
    times: Sequence[float] = (),
    options: Mapping[str, Any] | None = None,
) -> Sampler:
    """Returns the sampler that a config describes.

    Args:
        name: Name in `SAMPLERS`.
        num_points, shift, t_max, final_zero: The grid, see `euler_times`.
        times: A grid of its own instead: decreasing times as the network sees them.
        options: Options of that sampler, such as `rtol` or `period`.

    Raises:
        ValueError: If a name, an option, its value or the grid is not admitted.
    """
    if name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; choose from {sorted(SAMPLERS)}.")
    options = dict(options or {})
    allowed = sorted(set(inspect.signature(SAMPLERS[name]).parameters) - NOT_OPTIONS)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"Sampler {name!r} has no options {unknown}, only {allowed}.")
    if len(times):
        grid = grids.checked(times)
    else:
        grid = euler_times(num_points, shift, t_max, final_zero)
    sampler = Sampler(name, grid, options)
    _rehearse(sampler)
    return sampler


def _rehearse(sampler: Sampler) -> None:
    """Traces a call on one number, so that wrong options fail before a run."""
    velocity = velocities.Split(lambda x_t, t, y: x_t, lambda x_t, t, s: s)

    def sample(eps, y, key):
        return sampler(velocity, eps, y, jax.random.split(key, 1))

    jax.eval_shape(sample, jnp.zeros((1, 1, 1, 1)), jnp.zeros(1), jax.random.key(0))


def euler_times(
    num_points: int = 50,
    shift: float = 1.0,
    t_max: float = 0.999,
    final_zero: bool = False,
) -> np.ndarray:
    """Returns a decreasing float32 grid of times that starts at 1.

    The official grid of RAE (arXiv:2510.11690) has `num_points` points, hence one
    evaluation fewer, and stops short of data: at 1 - t_max, shifted (0.0068874 for
    its 256-pixel models).

    Args:
        num_points: Points of the official grid.
        shift: See `schedules.dimension_shift`.
        t_max: One minus the last time before the shift.
        final_zero: Appends t = 0, so that there are `num_points` evaluations and
            the result is clean. A grid that ends at 0 already stays as it is.

    Raises:
        ValueError: If there are fewer than two points.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}.")
    times = schedules.shift_time(1 - np.linspace(0, t_max, num_points), shift)
    if final_zero:
        times = np.append(times[times > 0], 0.0)
    return times.astype(np.float32)


def sample_euler(
    velocity: guidance.Velocity, eps: jax.Array, y: jax.Array, times: jax.Array
) -> jax.Array:
    """Integrates by Euler's method along a grid.

    Args:
        velocity: The network, possibly guided.
        eps: Noise (b, h, w, c), the state at times[0].
        y: Labels (b,).
        times: Decreasing times, as made by `euler_times`.

    Returns:
        The state (b, h, w, c) at times[-1], float32.
    """
    return sample_euler_states(velocity, eps, y, times, ())[0]


def sample_euler_states(
    velocity: guidance.Velocity,
    eps: jax.Array,
    y: jax.Array,
    times: jax.Array,
    keep: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """Integrates like `sample_euler` and records states on the way.

    Args:
        velocity, eps, y, times: See `sample_euler`.
        keep: Indices into `times` of the states to record; 0 is the noise itself.

    Returns:
        The last state and the recorded ones (len(keep), b, h, w, c).

    Raises:
        ValueError: If an index lies outside the grid.
    """
    sampled = SAMPLERS["euler"](velocity, eps, y, times, keep=keep)
    return sampled.x, sampled.states
