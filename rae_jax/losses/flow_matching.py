"""Velocity matching on straight paths, the loss of DiT-DH."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rae_jax.diffusion import paths, schedules, velocities
from rae_jax.losses import alignment

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array | velocities.Outputs]


def flow_matching_loss(
    network: Network,
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    shift: float,
    time: str = "logit_normal",
    min_time: float = 0.0,
    early_weight: float = 1.0,
    align_weight: float = 0.0,
    features: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error between predicted and true velocity (arXiv:2510.11690).

    Args:
        network: Called as network(x_t, t, y); returns a velocity, or
            `velocities.Outputs` with other terms of the loss.
        x: Clean latents (b, h, w, c), normalised to unit variance.
        y: Class labels (b,), null where dropped.
        key: Randomness for times and noise.
        shift: See `diffusion.schedules.dimension_shift`.
        time: Distribution of times before the shift.
        min_time: For networks that predict x, `paths.MIN_TIME_OF_X`: below this time
            the true velocity is x_t - x over it, as the predicted one is (RAEv2).
        early_weight: Weight of the error of an early head (RAEv2: 1).
        align_weight: Weight of the alignment with `features` (REPA: 0.5).
        features: An encoder's tokens (b, n, d) of the clean images.

    Returns:
        The scalar loss and the metrics to log.
    """
    t_key, eps_key = jax.random.split(key)
    t = schedules.sample_time(time, t_key, x.shape[0])
    t = schedules.shift_time(t, shift)
    eps = jax.random.normal(eps_key, x.shape, jnp.float32)
    x_t, v = paths.interpolate(x, eps, t)
    if min_time:
        v = paths.v_from_x(x, x_t, t, min_time)
    out = network(x_t, t, y)
    if not isinstance(out, velocities.Outputs):
        out = velocities.Outputs(out)
    loss = jnp.mean((out.velocity - v) ** 2)
    metrics = {"v_norm": jnp.sqrt(jnp.mean(out.velocity**2))}
    parts = {"loss_main": loss}
    if out.early is not None:
        parts["loss_early"] = jnp.mean((out.early - v) ** 2)
        loss = loss + early_weight * parts["loss_early"]
    if out.aligned is not None and features is not None:
        parts["loss_align"] = alignment.alignment_loss(out.aligned, features)
        loss = loss + align_weight * parts["loss_align"]
    if len(parts) > 1:
        metrics |= parts
    return loss, {"loss": loss} | metrics
