"""Guidance: functions from velocities to a velocity.

A velocity is a callable (x_t (b, h, w, c), t (b,), y (b,)) -> (b, h, w, c); a guided
`velocities.Split` is a `Split` again. The interval is inclusive at both ends and
applies per sample; outside it the result is the plain conditional velocity, as in the
official code of RAE (arXiv:2510.11690). With a scale of 1 nothing but that velocity
is computed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rae_jax.diffusion import paths, velocities

Velocity = velocities.Velocity
# Returns the velocity of the last layer and that of an earlier one.
Velocities = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
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
    parts = velocities.as_split(velocity)

    def trunk(x_t, t, y):
        # A sample and its null copy are neighbours, so that doubling a batch that
        # is split over devices moves nothing between them.
        nulls = jnp.full_like(y, null_label)
        labels = jnp.stack([y, nulls], axis=1).reshape(-1)
        return parts.trunk(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), labels)

    def head(x_t, t, s):
        both = parts.head(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), s)
        both = both.reshape(x_t.shape[0], 2, *both.shape[1:])
        return _extrapolate(both[:, 0], both[:, 1], scale, t, interval)

    return velocities.like(velocity, velocities.Split(trunk, head))


def autoguidance(
    velocity: Velocity,
    guide: Velocity,
    scale: float,
    interval: Interval = (0.0, 1.0),
) -> Velocity:
    """Returns v_guide + scale (v - v_guide) for a weaker network `guide`.

    Each network is called once, with the batch as it is. A scale of 1 returns
    `velocity` itself (arXiv:2406.02507).
    """
    if scale == 1:
        return velocity
    strong, weak = velocities.as_split(velocity), velocities.as_split(guide)

    def trunk(x_t, t, y):
        return strong.trunk(x_t, t, y), weak.trunk(x_t, t, y)

    def head(x_t, t, s):
        v, v_guide = strong.head(x_t, t, s[0]), weak.head(x_t, t, s[1])
        return _extrapolate(v, v_guide, scale, t, interval)

    return velocities.like(velocity, velocities.Split(trunk, head))


def internal_guidance(
    both: Velocities, scale: float, interval: Interval = (0.0, 1.0)
) -> Velocity:
    """Returns early + scale (main - early) for the two velocities of one network.

    The weaker prediction is read from an earlier layer of the same network, so it
    is almost free (RAEv2, arXiv:2605.18324).

    Args:
        both: Returns (main, early); or a `velocities.Split` whose head does.
        scale: Guidance scale; 1 gives the main velocity.
        interval: Times at which to guide.
    """
    parts = velocities.as_split(both)

    def head(x_t, t, s):
        main, early = parts.head(x_t, t, s)
        return main if scale == 1 else _extrapolate(main, early, scale, t, interval)

    return velocities.like(both, velocities.Split(parts.trunk, head))


def _extrapolate(v, v_weak, scale, t, interval):
    low, high = interval
    inside = paths.expand((t >= low) & (t <= high), v)
    return jnp.where(inside, v_weak + scale * (v - v_weak), v)
