"""Ancestral sampling against the DDPM scheduler of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.diffusion import ancestral, schedules

pytestmark = pytest.mark.parity
SHAPE = (2, 3, 3, 4)
BETAS = {
    "ddpm_linear": np.linspace(1e-4, 2e-2, 1000),
    "linear_gamma2": None,  # Follow from gamma^2, whose last is held at 1e-4.
}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def make_betas(schedule):
    if BETAS[schedule] is not None:
        return BETAS[schedule]
    bar = np.maximum(schedules.exact_schedule(schedule, 1000)[0] ** 2, 1e-4)
    return 1 - bar / np.append(1.0, bar[:-1])


def network(z, t):
    """A prediction and a coefficient of the variance, in NumPy."""
    phase = t.reshape(-1, 1, 1, 1) / 100
    return 0.7 * z + 0.3 * np.sin(z + phase), np.tanh(z - 0.2)


@pytest.mark.parametrize("prediction", ancestral.PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", BETAS)
def test_trajectory_is_that_of_diffusers(monkeypatch, schedule, variance, prediction):
    """Twenty respaced steps with the same noise; float32 tables, 2e-4."""
    torch = pytest.importorskip("torch")
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    steps = 20
    scheduler = ddpm.DDPMScheduler(
        trained_betas=make_betas(schedule),
        variance_type=VARIANCES[variance],
        clip_sample=False,
        prediction_type="epsilon" if prediction == "eps" else "sample",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    z = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), len(z))

    def denoise(z, t):
        phase = t.reshape(-1, 1, 1, 1) / 100
        return 0.7 * z + 0.3 * jnp.sin(z + phase), jnp.tanh(z - 0.2)

    levels = ancestral.make_levels(schedule, steps)
    assert levels.t[::-1].tolist() == scheduler.timesteps.tolist()
    options = dict(prediction=prediction, variance=variance, keep=range(steps + 1))
    found = ancestral.sample_ancestral(denoise, z, keys, levels, **options).states

    state = torch.from_numpy(z).permute(0, 3, 1, 2)
    for i, t in enumerate(scheduler.timesteps):
        noise = np.stack(
            [jax.random.normal(jax.random.fold_in(k, i), SHAPE[1:]) for k in keys]
        )
        noise = torch.from_numpy(noise).permute(0, 3, 1, 2)
        monkeypatch.setattr(ddpm, "randn_tensor", lambda *a, n=noise, **k: n)
        out, v = network(state.permute(0, 2, 3, 1).numpy(), np.full(len(z), int(t)))
        parts = [out, v] if variance == "learned" else [out]
        joined = torch.from_numpy(np.concatenate(parts, -1).astype(np.float32))
        state = scheduler.step(joined.permute(0, 3, 1, 2), t, state).prev_sample
        expected = state.permute(0, 2, 3, 1).numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[i + 1], expected, atol=2e-4 * scale)
