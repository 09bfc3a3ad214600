"""Runge-Kutta methods along a grid: Euler's, Heun's, the midpoint and Kutta's."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.diffusion import grids, velocities


class Tableau(NamedTuple):
    """Coefficients of an explicit method.

    Attributes:
        rows: For each stage, the weights of the slopes before it.
        weights: Weights of all slopes in the step.
    """

    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def matrix(self) -> np.ndarray:
        """Returns the rows (stages, stages), filled up with zeros."""
        size = len(self.weights)
        return np.float32([[*row, *[0] * (size - len(row))] for row in self.rows])


EULER = Tableau(((),), (1,))
# The last two are "heun2" and "rk4" of the torchdiffeq package, which the official
# code of RAE integrates with: the trapezoid, and the 3/8 rule.
MIDPOINT = Tableau(((), (1 / 2,)), (0, 1))
HEUN = Tableau(((), (1,)), (1 / 2, 1 / 2))
KUTTA = Tableau(((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))


def sample_runge_kutta(
    velocity: velocities.Velocity,
    eps: jax.Array,
    y: jax.Array,
    times: jax.Array,
    *,
    tableau: Tableau = HEUN,
    keep: Sequence[int] = (),
) -> grids.Sampled:
    """Integrates dx = v dt from noise to data along a grid.

    A step that ends at t = 0 is Euler's if the method would look at the velocity
    there, where a prediction of the data defines none; Heun's method stays of second
    order (as in arXiv:2206.00364).

    Args:
        velocity: The network, possibly guided.
        eps: Noise (b, h, w, c), the state at times[0].
        y: Labels (b,).
        times: Decreasing times (n,), as made by `samplers.euler_times`.
        tableau: The method.
        keep: Indices into `times` of the states to record.

    Raises:
        ValueError: If an index of `keep` lies outside the grid.
    """
    matrix, weights = jnp.asarray(tableau.matrix()), jnp.asarray(tableau.weights)
    nodes = matrix.sum(axis=1)
    stages = len(tableau.weights)
    reaches_end = bool(np.any(tableau.matrix().sum(axis=1) > 1 - 1e-6))

    def slopes(x, t, t_next):
        def stage(slopes, inputs):
            index, row, node = inputs
            at = x + (t_next - t) * _combine(row, slopes)
            # Exact at both ends, unlike t + node (t_next - t).
            time = (1 - node) * t + node * t_next
            v = velocity(at, grids.rows(time, x), y).astype(jnp.float32)
            return slopes.at[index].set(v), None

        # The network is traced once, whatever the number of stages.
        empty = jnp.zeros((stages, *x.shape))
        return jax.lax.scan(stage, empty, (jnp.arange(stages), matrix, nodes))[0]

    def step(x, _, index, t, t_next):
        k = slopes(x, t, t_next)
        slope = _combine(weights, k)
        if reaches_end:
            slope = jnp.where(t_next > 0, slope, k[0])
        return x + (t_next - t) * slope, None

    x, states = grids.walk(step, eps, times, keep)
    return grids.Sampled(x, states, grids.rows(stages * (len(times) - 1), x))


def _combine(weights: jax.Array, slopes: jax.Array) -> jax.Array:
    """Returns the weighted sum of slopes (stages, ...), without a matrix product.

    Products would be rounded to fewer bits on accelerators.
    """
    weights = weights.reshape(-1, *(1,) * (slopes.ndim - 1))
    return jnp.sum(weights * slopes, axis=0)
