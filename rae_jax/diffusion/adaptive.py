"""Integration with steps of a size that the error decides."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from rae_jax.diffusion import grids, velocities

STAGES = 6  # Evaluations per step; the seventh is the first of the next.


def sample_dopri5(
    velocity: velocities.Velocity,
    eps: jax.Array,
    y: jax.Array,
    times: jax.Array,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1000,
    keep: Sequence[int] = (),
) -> grids.Sampled:
    """Integrates dx = v dt by the method of Dormand and Prince, of fifth order.

    Every sample has step sizes of its own, so it does not depend on its batch, but
    for rounding, which the error estimate magnifies to a fraction of the tolerance.
    The batch is evaluated until its last sample is done. The velocity is also
    evaluated at the last time.

    Args:
        velocity: The network, possibly guided.
        eps: Noise (b, h, w, c), the state at times[0].
        y: Labels (b,).
        times: Decreasing times (n,). The first two give the first step to try, the
            others only the end and where states are recorded.
        rtol: Admitted error of a step relative to the state, in the root mean
            square over a sample.
        atol: Admitted absolute error, which is added.
        max_steps: Steps after which a sample is given up and becomes NaN, counting
            those that were tried again with a smaller size.
        keep: Indices into `times` of the states to record; by interpolation.

    Raises:
        ValueError: If a tolerance is not positive, or an index of `keep` lies
            outside the grid.
    """
    if rtol <= 0 or atol <= 0:
        raise ValueError(f"rtol and atol must be positive, got {rtol} and {atol}.")
    grids.check_keep(keep, times)
    times = jnp.asarray(times, jnp.float32)
    # The solver wants each time once and in order.
    order, slots = np.unique(np.asarray(keep, np.int32), return_inverse=True)
    eps, y = jnp.asarray(eps, jnp.float32), jnp.asarray(y)
    field = _per_sample(velocity, eps, y)
    solve = _solver(field, times, times[order], rtol, atol, max_steps)
    saved, evaluations = jax.vmap(solve, out_axes=(1, 0))(eps, y)
    return grids.Sampled(saved[-1], saved[slots], evaluations)


def _solver(field, times, saved_times, rtol, atol, max_steps):
    """Returns a function (x (h, w, c), y ()) -> states, evaluations of one sample.

    The states (len(saved_times) + 1, h, w, c) end with that at times[-1].
    """
    import diffrax  # Slow to import.

    term = diffrax.ODETerm(lambda t, x, y: field(x, t, y).astype(jnp.float32))
    ts = saved_times if len(saved_times) else None

    def solve(x, y):
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Dopri5(),
            times[0],
            times[-1],
            times[1] - times[0],
            x,
            args=y,
            saveat=diffrax.SaveAt(ts=ts, t1=True),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            adjoint=diffrax.ForwardMode(),
            max_steps=max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        evaluations = 1 + STAGES * solution.stats["num_steps"]
        return jnp.where(done, solution.ys, jnp.nan), evaluations

    return solve


def _per_sample(
    velocity: velocities.Velocity, eps: jax.Array, y: jax.Array
) -> velocities.Velocity:
    """Returns the velocity of a single sample, which vmap turns into one batched call.

    So the network sees the real batch, as it does under every other sampler. It is
    traced here, because a function with a rule for vmap must not refer to arrays of
    its surroundings, such as parameters.
    """
    program = jax.make_jaxpr(velocity)(eps, grids.rows(jnp.float32(1), eps), y)

    @jax.custom_batching.custom_vmap
    def call(params, *inputs):
        # Reached with abstract values alone: the solver looks at shapes.
        batch = [jnp.broadcast_to(x, (len(eps), *x.shape)) for x in inputs]
        return run(params, *batch)[0]

    @call.def_vmap
    def _(axis_size, in_batched, params, *inputs):
        batch = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(inputs, in_batched[1:], strict=True)
        ]
        return run(params, *batch), True

    def run(params, *batch):
        closed = jax.extend.core.ClosedJaxpr(program.jaxpr, params)
        return jax.extend.core.jaxpr_as_fun(closed)(*batch)[0]

    return partial(call, program.consts)
