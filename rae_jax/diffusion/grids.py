"""Walking along a grid of times in one scan, and what every sampler returns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Called as step(x, memory, index, t, t_next); returns x at t_next and a new memory.
Step = Callable[..., tuple[jax.Array, Any]]


class Sampled(NamedTuple):
    """What a sampler returns.

    Attributes:
        x: The state (b, h, w, c) at the last time, float32.
        states: The recorded states (len(keep), b, h, w, c), float32.
        evaluations: Calls of the network (b,) that each sample took; of its trunk
            alone where that is shared between steps.
    """

    x: jax.Array
    states: jax.Array
    evaluations: jax.Array


def walk(
    step: Step,
    x: jax.Array,
    times: jax.Array,
    keep: Sequence[int] = (),
    memory: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Takes one step per interval of a grid, compiled as one scan.

    Args:
        step: See `Step`; `index` counts the intervals from 0.
        x: The state (b, h, w, c) at times[0].
        times: Decreasing times (n,).
        keep: Indices into `times` of the states to record; 0 is x itself.
        memory: What the first step finds as its memory: arrays of any structure.

    Returns:
        The last state and the recorded ones (len(keep), b, h, w, c), float32.

    Raises:
        ValueError: If an index lies outside the grid.
    """
    check_keep(keep, times)
    times = jnp.asarray(times, jnp.float32)
    slots = jnp.asarray(keep, jnp.int32).reshape(-1, *(1,) * x.ndim)

    def record(states, index, x):
        return jnp.where(slots == index, x[None], states)

    def body(carry, inputs):
        x, memory, states = carry
        index, t, t_next = inputs
        x, memory = step(x, memory, index, t, t_next)
        return (x, memory, record(states, index + 1, x)), None

    x = x.astype(jnp.float32)
    states = record(jnp.zeros((len(keep), *x.shape)), 0, x)
    inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    (x, _, states), _ = jax.lax.scan(body, (x, memory, states), inputs)
    return x, states


def rows(value: jax.Array | float, x: jax.Array) -> jax.Array:
    """Returns one number (b,) for every sample of x (b, ...)."""
    return jnp.broadcast_to(value, x.shape[:1])


def check_keep(keep: Sequence[int], times: jax.Array) -> None:
    """Raises ValueError if an index lies outside the grid."""
    if any(not 0 <= index < len(times) for index in keep):
        raise ValueError(f"keep {list(keep)} exceeds a grid of {len(times)} times.")


def checked(times: Sequence[float]) -> np.ndarray:
    """Returns times as float32.

    Raises:
        ValueError: If they are not two or more decreasing numbers from 1 to 0.
    """
    grid = np.asarray(times, np.float32)
    falling = grid.ndim == 1 and len(grid) >= 2 and (np.diff(grid) < 0).all()
    if not falling or grid[0] > 1 or grid[-1] < 0:
        raise ValueError(
            f"times must be two or more numbers that fall within [0, 1], got {times}."
        )
    return grid
