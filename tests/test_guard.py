"""Spikes of gradients and losses: counted, left out, and too many of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_run
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax.training import logs, loop, optimizers

USUAL = optimizers.GUARD_MIN_STEPS + 5


def make(spike_factor=4.0, skip=True, tx=None):
    config = ConfigDict(dict(spike_factor=spike_factor, skip=skip))
    return optimizers.guarded(tx or optax.adamw(1e-2, weight_decay=0.1), config)


@jax.jit
def usual(i):
    """A gradient with a norm of 2, of changing sign."""
    return {"w": jnp.cos(jnp.full(4, i * jnp.pi))}


def run(tx, scales, losses=None):
    """Returns parameters and state after each step, the first before any."""
    params = {"w": jnp.ones(4)}
    found = [(params, tx.init(params))]
    update = jax.jit(tx.update)
    for i, scale in enumerate(scales):
        grads = jax.tree.map(lambda g, s=scale: s * g, usual(i))
        loss = None if losses is None else jnp.float32(losses[i])
        updates, state = update(grads, found[-1][1], found[-1][0], value=loss)
        found.append((optax.apply_updates(found[-1][0], updates), state))
    return found


def counts(state):
    return {k: int(v) for k, v in optimizers.guard_metrics(state).items()}


@pytest.mark.parametrize("scale", [10.0, np.nan, np.inf])
def test_skipped_step_changes_nothing(scale):
    """Parameters, moments and step counter, to the bit; then all goes on."""
    found = run(make(), [1.0] * USUAL + [scale, 1.0])
    before, after, next_one = found[USUAL], found[USUAL + 1], found[USUAL + 2]
    jax.tree.map(np.testing.assert_array_equal, before[0], after[0])
    jax.tree.map(np.testing.assert_array_equal, before[1].inner, after[1].inner)
    expected = dict(loss_spikes=0, grad_spikes=1, skipped_steps=1)
    assert counts(after[1]) == expected | {"skips_in_a_row": 1}
    assert counts(next_one[1]) == expected | {"skips_in_a_row": 0}
    assert (next_one[0]["w"] != after[0]["w"]).all()
    assert optimizers.num_updates(jnp.int32(USUAL + 2), next_one[1]) == USUAL + 1


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_step_of_a_loss_that_is_no_number_is_skipped(loss):
    """Even if its gradient is one."""
    found = run(make(), [1.0] * 3, [1.0, loss, 1.0])
    jax.tree.map(np.testing.assert_array_equal, found[1][0], found[2][0])
    expected = dict(loss_spikes=1, grad_spikes=0, skipped_steps=1)
    assert counts(found[2][1]) == expected | {"skips_in_a_row": 1}
    assert counts(found[3][1]) == expected | {"skips_in_a_row": 0}


def test_guard_that_only_counts_changes_no_bit():
    scales = [1.0] * USUAL + [10.0, 1.0]
    plain = optax.adamw(1e-2, weight_decay=0.1)
    guarded = run(make(skip=False), scales)
    expected = run(optax.with_extra_args_support(plain), scales)
    for (params, state), (plain_params, plain_state) in zip(
        guarded, expected, strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, params, plain_params)
        jax.tree.map(np.testing.assert_array_equal, state.inner, plain_state)
    assert counts(guarded[-1][1])["grad_spikes"] == 1
    assert counts(guarded[-1][1])["skipped_steps"] == 0


def test_usual_and_early_values_are_no_spikes():
    """Nothing is known of the first steps, and three times the mean is below four."""
    scales = [1.0, 100.0] + [1.0] * (optimizers.GUARD_MIN_STEPS - 3) + [3.0] * 5
    assert counts(run(make(), scales)[-1][1])["grad_spikes"] == 0
    early = run(make(), [np.nan])[-1][1]
    assert counts(early)["skipped_steps"] == 1


def test_lasting_change_becomes_usual():
    """A single spike moves the mean by 3 % at most; after many it has followed."""
    found = run(make(skip=False), [1.0] * 100 + [10.0] * 100)
    mean = [float(state.norm.mean) for _, state in found]
    np.testing.assert_allclose(mean[100], 2.0, rtol=1e-5)
    np.testing.assert_allclose(mean[101], 2.06, rtol=1e-5)
    spikes = [counts(state)["grad_spikes"] for _, state in found]
    assert 20 < spikes[-1] < 40 and spikes[-1] == spikes[150]


def test_spikes_of_the_loss_are_counted_alone():
    found = run(make(), [1.0] * (USUAL + 2), [1.0] * USUAL + [9.0, 1.0])
    assert counts(found[-1][1])["loss_spikes"] == 1
    assert counts(found[-1][1])["skipped_steps"] == 0


def test_guard_is_off_by_default_and_refuses_small_factors():
    config = blocks.run("toy", num_steps=3)
    tx, _ = optimizers.make_optimizer(ConfigDict(blocks.optimizer()), 3, config.guard)
    state = tx.init({"w": jnp.ones(2)})
    assert optimizers.guard_metrics(state) == {}
    assert optimizers.num_updates(5, state) == 5
    with pytest.raises(ValueError, match="spike_factor must be above 1, or 0, not 0.9"):
        make(spike_factor=0.9)


# ---- Whole runs


class Poisoned(toy_run.Batches):
    """Holds a NaN in every batch from one on."""

    def __next__(self):
        batch = super().__next__()
        if self.position >= 4:
            batch["x"][0, 0] = np.nan
        return batch


def guarded_config(**changes):
    return toy_run.config(guard=dict(skip=True, max_skips=2), **changes)


def test_run_passes_over_a_nan(tmp_path):
    """The log has no NaN: means are over the other steps, the rate over updates."""
    config = guarded_config(every=dict(log=2, checkpoint=1, evaluate=0))
    config.optimizer.update(warmup_steps=6)
    final = loop.run(toy_run.program(config, poison=3), config, tmp_path)
    assert final.step == 6 and np.isfinite(final.params["kernel"]).all()
    records = logs.read_metrics(tmp_path)
    assert [r["skipped_steps"] for r in records] == [0, 1, 1]
    assert all(np.isfinite(list(r.values())).all() for r in records)
    # Updates 1 and 2; then 3 alone; then 4 and 5, of six steps of warm-up.
    np.testing.assert_allclose(
        [r["lr"] for r in records], np.array([1.5, 3, 4.5]) * 1e-2 / 6, rtol=1e-6
    )


def test_run_stops_after_too_many(tmp_path):
    """And again when it is resumed, because the count is in the state."""
    config = guarded_config()
    program = dataclasses.replace(toy_run.program(config), batches=Poisoned)
    message = r"Step 6: the guard has left out 3 steps in a row.*max_skips = 2"
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=message):
            loop.run(program, config, tmp_path)
    records = logs.read_metrics(tmp_path)
    assert [r["skips_in_a_row"] for r in records] == [0, 0, 0, 1, 2]
