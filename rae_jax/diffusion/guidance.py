"""Guidance: functions from velocities to a velocity.

A velocity is a callable (x_t (b, h, w, c), t (b,), y (b,)) -> (b, h, w, c). The
interval is inclusive at both ends and applies per sample; outside it the result is
the plain conditional velocity, as in the official code of RAE (arXiv:2510.11690).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rae_jax.diffusion import paths

Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Interval = tuple[float, float]


def classifier_free(
    velocity: Velocity, scale: float, null_label: int, interval: Interval = (0.0, 1.0)
) -> Velocity:
    """Returns v_null + scale (v - v_null), from one call with a doubled batch.

    A scale of 1 returns `velocity` itself (arXiv:2207.12598, intervals
    arXiv:2404.07724).
    """
    if scale == 1:
        return velocity

    def guided(x_t, t, y):
        # A sample and its null copy are neighbours, so that doubling a batch that
        # is split over devices moves nothing between them.
        nulls = jnp.full_like(y, null_label)
        labels = jnp.stack([y, nulls], axis=1).reshape(-1)
        both = velocity(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), labels)
        both = both.reshape(x_t.shape[0], 2, *both.shape[1:])
        return _extrapolate(both[:, 0], both[:, 1], scale, t, interval)

    return guided


def autoguidance(
    velocity: Velocity,
    guide: Velocity,
    scale: float,
    interval: Interval = (0.0, 1.0),
) -> Velocity:
    """Returns v_guide + scale (v - v_guide) for a weaker network `guide`.

    A scale of 1 returns `velocity` itself (arXiv:2406.02507).
    """
    if scale == 1:
        return velocity

    def guided(x_t, t, y):
        v, v_guide = velocity(x_t, t, y), guide(x_t, t, y)
        return _extrapolate(v, v_guide, scale, t, interval)

    return guided


def _extrapolate(v, v_weak, scale, t, interval):
    low, high = interval
    inside = paths.expand((t >= low) & (t <= high), v)
    return jnp.where(inside, v_weak + scale * (v - v_weak), v)
