"""Euler's method with the trunk's output shared between neighbouring steps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.diffusion import grids, velocities


def sample_euler_shared(
    velocity: velocities.Split,
    eps: jax.Array,
    y: jax.Array,
    times: jax.Array,
    *,
    period: int = 1,
    steps: Sequence[int] = (),
    keep: Sequence[int] = (),
) -> grids.Sampled:
    """Integrates dx = v dt, running the trunk in some steps and the head in all.

    The conditions that a trunk such as DiT-DH's computes change slowly along the
    way, so a step can use those of an earlier one. Where guidance needs two results
    of the trunk, both are kept.

    Args:
        velocity: The network in two parts, possibly guided.
        eps: Noise (b, h, w, c), the state at times[0].
        y: Labels (b,).
        times: Decreasing times (n,), as made by `samplers.euler_times`.
        period: The trunk runs in steps 0, period, 2 period...; 1 is Euler's method.
        steps: The steps in which the trunk runs, instead of a period.
        keep: Indices into `times` of the states to record.

    Raises:
        ValueError: If `velocity` is no `velocities.Split`, both `period` and `steps`
            are given, or they or `keep` do not fit the grid.
    """
    if not isinstance(velocity, velocities.Split):
        raise ValueError(
            "Sharing needs a network of trunk and head; give velocities.split(network)."
        )
    eps = jnp.asarray(eps, jnp.float32)
    fresh = trunk_steps(len(times) - 1, period, steps)
    runs_trunk = jnp.asarray(fresh)

    def step(x, s, index, t, t_next):
        t_rows = grids.rows(t, x)
        # The predicate is a scalar, so only one branch is executed.
        s = jax.lax.cond(
            runs_trunk[index], lambda: velocity.trunk(x, t_rows, y), lambda: s
        )
        v = velocity.head(x, t_rows, s)
        return x + (t_next - t) * v.astype(jnp.float32), s

    shapes = jax.eval_shape(velocity.trunk, eps, grids.rows(times[0], eps), y)
    memory = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    x, states = grids.walk(step, eps, times, keep, memory)
    return grids.Sampled(x, states, grids.rows(int(fresh.sum()), x))


def trunk_steps(num_steps: int, period: int, steps: Sequence[int] = ()) -> np.ndarray:
    """Returns for each step (num_steps,) whether the trunk runs in it.

    Raises:
        ValueError: If the period is below one, the steps do not begin with 0 or
            exceed the grid, or both are given.
    """
    fresh = np.zeros(num_steps, bool)
    if not steps:
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}.")
        fresh[::period] = True
        return fresh
    if period != 1:
        raise ValueError("Give a period or a list of steps, not both.")
    if min(steps) != 0 or max(steps) >= num_steps:
        raise ValueError(
            f"steps must contain 0 and lie below {num_steps}, got {list(steps)}."
        )
    fresh[list(steps)] = True
    return fresh
