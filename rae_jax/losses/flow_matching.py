"""Velocity matching on straight paths, the loss of DiT-DH."""

import jax
import jax.numpy as jnp

from rae_jax.diffusion import guidance, paths, schedules


def flow_matching_loss(
    velocity: guidance.Velocity,
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    shift: float,
    time: str = "logit_normal",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error between predicted and true velocity (arXiv:2510.11690).

    Args:
        velocity: The network, called as velocity(x_t, t, y).
        x: Clean latents (b, h, w, c), normalised to unit variance.
        y: Class labels (b,), null where dropped.
        key: Randomness for times and noise.
        shift: See `diffusion.schedules.dimension_shift`.
        time: Distribution of times before the shift.

    Returns:
        The scalar loss and the metrics to log.
    """
    t_key, eps_key = jax.random.split(key)
    t = schedules.sample_time(time, t_key, x.shape[0])
    t = schedules.shift_time(t, shift)
    eps = jax.random.normal(eps_key, x.shape, jnp.float32)
    x_t, v = paths.interpolate(x, eps, t)
    v_pred = velocity(x_t, t, y)
    loss = jnp.mean((v_pred - v) ** 2)
    return loss, {"loss": loss, "v_norm": jnp.sqrt(jnp.mean(v_pred**2))}
