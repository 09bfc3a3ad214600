"""Integration of stochastic equations whose marginals are those of the flow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rae_jax.diffusion import grids, paths, velocities

# Diffusion coefficients by the names of SiT (arXiv:2401.08740). The noise level of
# the straight path is t, so there "sigma" and "linear" are the same.
DIFFUSIONS = {
    "constant": jnp.ones_like,
    "sigma": lambda t: t,
    "linear": lambda t: t,
}


def sample_euler_maruyama(
    velocity: velocities.Velocity,
    eps: jax.Array,
    y: jax.Array,
    times: jax.Array,
    keys: jax.Array,
    *,
    diffusion: str = "sigma",
    strength: float = 1.0,
    keep: Sequence[int] = (),
) -> grids.Sampled:
    """Integrates dx = (v - d score) dt + sqrt(2 d) dw from noise to data.

    With time running backwards x_t has the same distribution as under dx = v dt,
    whatever d(t) >= 0 is: the score pulls towards dense regions as much as the noise
    scatters (arXiv:2011.13456, arXiv:2401.08740). The score follows from the
    velocity of the same call. A step that ends at t = 0 takes the mean of the data
    given x_t, x_t - t v, at whatever time it starts, and adds no noise.

    Args:
        velocity: The network, possibly guided; the score is then guided likewise.
        eps: Noise (b, h, w, c), the state at times[0].
        y: Labels (b,).
        times: Decreasing times (n,), as made by `samplers.euler_times`.
        keys: One key (b,) per sample. They are folded with the step, so a sample
            does not depend on its batch; they must not be the keys that made `eps`.
        diffusion: Name in `DIFFUSIONS` of d(t).
        strength: Factor of d(t); 0 gives Euler's method.
        keep: Indices into `times` of the states to record.

    Raises:
        ValueError: If `diffusion` is unknown, `strength` is negative, keys are
            missing, or an index of `keep` lies outside the grid.
    """
    if diffusion not in DIFFUSIONS:
        choices = sorted(DIFFUSIONS)
        raise ValueError(f"Unknown diffusion {diffusion!r}; choose from {choices}.")
    if strength < 0:
        raise ValueError(f"strength must not be negative, got {strength}.")
    if keys is None or keys.shape != eps.shape[:1]:
        raise ValueError(f"Euler-Maruyama needs {len(eps)} keys, one per sample.")

    def noise(index):
        def one(key):
            return jax.random.normal(jax.random.fold_in(key, index), eps.shape[1:])

        return jax.vmap(one)(keys)

    def step(x, _, index, t, t_next):
        t_rows, h = grids.rows(t, x), t - t_next
        v = velocity(x, t_rows, y).astype(jnp.float32)
        d = strength * DIFFUSIONS[diffusion](t)
        score = paths.score_from_v(v, x, t_rows)
        kick = h * d * score + jnp.sqrt(2 * d * h) * noise(index)
        return x - h * v + jnp.where(t_next > 0, kick, 0), None

    x, states = grids.walk(step, eps, times, keep)
    return grids.Sampled(x, states, grids.rows(len(times) - 1, x))
