"""Integration of the probability-flow equation dx = v dt from noise to data."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.diffusion import guidance, schedules


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
    if any(not 0 <= index < len(times) for index in keep):
        raise ValueError(f"keep {list(keep)} exceeds a grid of {len(times)} times.")
    times = jnp.asarray(times, jnp.float32)
    slots = jnp.asarray(keep, jnp.int32).reshape(-1, *(1,) * eps.ndim)

    def record(states, index, x_t):
        return jnp.where(slots == index, x_t[None], states)

    def step(carry, inputs):
        x_t, states = carry
        index, t, t_next = inputs
        v = velocity(x_t, jnp.broadcast_to(t, x_t.shape[:1]), y)
        x_t = x_t + (t_next - t) * v.astype(jnp.float32)
        return (x_t, record(states, index, x_t)), None

    x_t = eps.astype(jnp.float32)
    states = record(jnp.zeros((len(keep), *eps.shape)), 0, x_t)
    inputs = (jnp.arange(1, len(times)), times[:-1], times[1:])
    (x_t, states), _ = jax.lax.scan(step, (x_t, states), inputs)
    return x_t, states
