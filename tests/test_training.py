"""State, optimisers, schedules, gradients and the arithmetic of logs."""

import json

import chain
import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax.trainers import registry
from rae_jax.training import flops, logs, optimizers, state


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_optimizer(num_steps=100, **changes):
    config = ConfigDict(blocks.optimizer(**changes))
    return optimizers.make_optimizer(config, num_steps)


# State


def test_ema_of_constant_parameters_keeps_every_bit():
    """decay * ema + (1 - decay) * p would not, for about half of these values."""
    params = {"w": jnp.asarray(normal(1000))}
    ema = params
    for decay in (0.9, 0.9995, 0.9999):
        for _ in range(20):
            ema = jax.jit(state.update_ema, static_argnums=2)(ema, params, decay)
    np.testing.assert_array_equal(ema["w"], params["w"])


def test_ema_is_the_weighted_sum_of_all_parameters():
    """1e-6 rel: ten float32 updates."""
    values = normal(11, 5)
    ema = jnp.asarray(values[0])
    for value in values[1:]:
        ema = state.update_ema(ema, jnp.asarray(value), 0.7)
    weights = 0.3 * 0.7 ** np.arange(10)[::-1]
    expected = 0.7**10 * values[0].astype(np.float64) + weights @ values[1:]
    np.testing.assert_allclose(ema, expected, rtol=1e-6, atol=1e-7)


def test_adamw_with_clipping_and_ema_equals_the_official_trainer():
    """Three steps; parameters 5e-7 abs, EMA 1e-6.

    The official decay * ema + (1 - decay) * p is rounded 7e-7 off the exact average,
    ours 6e-8.
    """
    golden = golden_map.under(golden_map.read("training"), "adamw/")

    def read(name):
        return {k: jnp.asarray(golden[f"{name}/{k}"]) for k in ("w", "b")}

    tx, _ = make_optimizer(peak_lr=2e-4, clip_norm=1.0)
    params = read("param0")
    current = state.TrainState(jnp.int32(0), params, params, tx.init(params))
    for i in range(3):
        grads = read(f"grad{i}")
        np.testing.assert_allclose(
            optax.tree.norm(grads), golden[f"grad_norm{i}"], rtol=1e-6
        )
        current = current.apply_gradients(grads, tx, 0.9995)
        for key, expected in read(f"param{i + 1}").items():
            np.testing.assert_allclose(current.params[key], expected, rtol=0, atol=5e-7)
        for key, expected in read(f"ema{i + 1}").items():
            np.testing.assert_allclose(
                current.ema_params[key], expected, rtol=0, atol=1e-6
            )
    assert current.step == 3
    moved = np.abs(np.asarray(current.params["w"] - params["w"]))
    assert moved.mean() > 2e-4  # The tolerances are a small part of what is tested.


# Optimisers


SCHEDULES = {
    "stage1_cosine": dict(
        peak_lr=2e-4,
        final_lr=2e-5,
        schedule="cosine",
        warmup_steps=10,
        decay_end_step=160,
    ),
    "stage2_linear": dict(
        peak_lr=2e-4,
        final_lr=2e-5,
        schedule="linear",
        warmup_steps=80,
        warmup_from_zero=False,
        decay_end_step=1600,
    ),
    "steps_override": dict(
        peak_lr=1e-3,
        final_lr=1e-4,
        schedule="cosine",
        warmup_steps=5,
        decay_end_step=23,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_the_official_one(name):
    """Entry k is the rate of optimiser step k, past the end too; 1e-6 rel."""
    expected = golden_map.read("training")[f"lr/{name}"]
    schedule = optimizers.make_schedule(**SCHEDULES[name])
    rates = jax.vmap(schedule)(jnp.arange(len(expected)))
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_schedule_that_ends_with_the_run():
    """`decay_end_step` 0 stands for the last step."""
    options = dict(schedule="cosine", warmup_steps=10)
    _, to_the_end = make_optimizer(50, **options)
    _, fixed = make_optimizer(99, decay_end_step=50, **options)
    assert float(to_the_end(30)) == float(fixed(30))
    np.testing.assert_allclose(to_the_end(50), 2e-5, rtol=1e-6)


def test_unusable_optimisers_are_named():
    with pytest.raises(ValueError, match="schedule 'cosin'. Did you mean 'cosine'"):
        make_optimizer(schedule="cosin")
    with pytest.raises(ValueError, match="optimizer 'adam'. Did you mean 'adamw'"):
        make_optimizer(name="adam")
    with pytest.raises(ValueError, match="ends at step 100, within the 200 steps"):
        make_optimizer(schedule="linear", warmup_steps=200)


@pytest.mark.parametrize("name", ["ldae", "rae_decoder", "latent_diffusion"])
def test_weight_decay_acts_on_matrices_alone(name):
    """By name, so that a stacked bias, which has two axes, is not one."""
    design = registry.design(chain.load(name))
    params = jax.eval_shape(design.init, jax.random.key(0)).params
    marked = jax.tree.leaves_with_path(optimizers.matrices(params))
    names = {jax.tree_util.keystr(path, simple=True): on for path, on in marked}
    expected = {n: n.endswith(("kernel", "table")) for n in names}
    assert names == expected
    assert any(names.values()) and not all(names.values())


def test_weight_decay_shrinks_what_it_acts_on():
    """Without gradients AdamW moves a kernel by -lr * decay * kernel and no bias."""
    tx, _ = make_optimizer(peak_lr=0.1, weight_decay=0.5)
    params = {"kernel": jnp.asarray(normal(3, 4)), "bias": jnp.asarray(normal(4))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05 * params["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], zeros["bias"])


def test_lars_scales_matrices_by_their_norm():
    """Trust ratio 0.001 |w| / |g| for a kernel, plain momentum for a bias."""
    tx, _ = make_optimizer(name="lars", peak_lr=2.0, b1=0.9)
    params = {"kernel": jnp.asarray(normal(3, 4)), "bias": jnp.asarray(normal(4))}
    grads = jax.tree.map(lambda p: 2 * p + 1, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    ratio = 1e-3 * jnp.linalg.norm(params["kernel"]) / jnp.linalg.norm(grads["kernel"])
    np.testing.assert_allclose(
        updates["kernel"], -2.0 * ratio * grads["kernel"], rtol=1e-5
    )
    np.testing.assert_allclose(updates["bias"], -2.0 * grads["bias"], rtol=1e-6)


# Gradients


def test_muon_orthogonalises_the_kernels_of_blocks_and_leaves_the_rest_to_nadam():
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"kernel": rng.normal(size=(3, 8, 12)), "bias": np.zeros((3, 12))},
        "embed": {"kernel": rng.normal(size=(8, 12))},
    }
    params = jax.tree.map(jnp.asarray, params)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    config = ConfigDict(blocks.optimizer(name="muon", peak_lr=0.1))
    muon, _ = optimizers.make_optimizer(config, 10)
    adam = optax.nadam(0.1, b1=config.b1, b2=config.b2)
    muon, adam = (tx.update(grads, tx.init(params), params)[0] for tx in (muon, adam))
    for kernel in muon["blocks"]["kernel"] / -0.1:
        # Five steps of the quintic iteration bring singular values to 0.7 ... 1.2;
        # optax scales them by sqrt(max(1, columns / rows)).
        singular = np.linalg.svd(kernel, compute_uv=False) / np.sqrt(12 / 8)
        assert singular.min() > 0.5 and singular.max() < 1.3
    for part, name in (("blocks", "bias"), ("embed", "kernel")):
        np.testing.assert_allclose(muon[part][name], adam[part][name], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_gradients_in_parts_equal_those_of_the_whole_batch(accumulate):
    """A loss without randomness; 1e-5 of the largest entry."""
    batch = {"x": normal(8, 6), "y": normal(8, 3, seed=1)}
    params = {"a": normal(6, 5, seed=2), "b": normal(5, 3, seed=3)}

    def loss_of(params, part, key):
        out = jnp.tanh(part["x"] @ params["a"]) @ params["b"]
        loss = jnp.mean((out - part["y"]) ** 2)
        return loss, {"loss": loss}

    whole = state.gradients(loss_of, params, batch, jax.random.key(0))
    parts = state.gradients(loss_of, params, batch, jax.random.key(0), accumulate)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        scale = np.max(np.abs(a))
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * scale)


def test_parts_draw_their_own_noise():
    """The gradient is the mean of the parts' draws, which differ."""

    def loss_of(params, part, key):
        noise = jax.random.uniform(key)
        return params * noise, {"noise": noise}

    key, batch = jax.random.key(0), {"x": np.zeros((4, 1), np.float32)}
    grads, metrics = state.gradients(loss_of, jnp.float32(1.0), batch, key, 4)
    draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(4)]
    np.testing.assert_allclose(grads, np.mean(draws), rtol=1e-6)
    np.testing.assert_allclose(metrics["noise"], np.mean(draws), rtol=1e-6)
    assert len({float(d) for d in draws}) == 4


def test_steps_draw_their_own_noise_and_count():
    tx, schedule = make_optimizer(schedule="linear", warmup_steps=4)

    def make(rngs):
        return nnx.Linear(2, 2, rngs=rngs)

    def loss_fn(model, frozen, batch, key):
        loss = jnp.sum(model(batch["x"]) ** 2)
        return loss, {"loss": loss, "noise": jax.random.uniform(key)}

    step = state.make_step(
        state.abstract_model(make), loss_fn, tx, ema_decay=0.9, schedule=schedule
    )
    current = state.create_state(make, tx, jax.random.key(1))
    batch, seen = {"x": normal(3, 2)}, []
    for i in range(3):
        current, metrics = step(current, None, batch, jax.random.key(0))
        seen.append(float(metrics["noise"]))
        np.testing.assert_allclose(metrics["lr"], 2e-4 * (i + 1) / 4, rtol=1e-6)
    assert len(set(seen)) == 3 and current.step == 3


# FLOPs


def test_flops_of_products_convolutions_and_loops_are_closed_form():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    matmul = 2 * 3 * 4 * 5
    assert flops.count_flops(jnp.matmul, x, w) == matmul
    assert flops.count_flops(jax.jit(jnp.matmul), x, w) == matmul
    batched = flops.count_flops(
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
        jnp.ones((7, 3, 4)),
        jnp.ones((7, 5, 4)),
    )
    assert batched == 7 * matmul
    # The forward product, and one for each of the two gradients.
    grad = jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=(0, 1))
    assert flops.count_flops(grad, x, w) == 3 * matmul

    def conv(x, w, groups):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    images = jnp.ones((2, 8, 8, 6))
    for groups in (1, 3):
        kernel = jnp.ones((3, 3, 6 // groups, 9))
        found = flops.count_flops(lambda x, w, g=groups: conv(x, w, g), images, kernel)
        assert found == 2 * (2 * 4 * 4 * 9) * (3 * 3 * 6 // groups)

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=11)[0]

    assert flops.count_flops(loop, x, jnp.ones((4, 4))) == 11 * 2 * 3 * 4 * 4


def test_peak_flops_are_from_the_data_sheet_or_measured():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    for kind, tflops in (
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
    ):
        assert flops.peak_flops(Device(kind)) == tflops * 1e12
    assert 1e9 < flops.peak_flops(jax.devices()[0]) < 1e13


# Logs


def test_meter_averages_and_times_what_it_should(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    meter = logs.Meter(batch_size=10, flops_per_step=6e9, peak_flops=4e10)
    meter.add({"loss": 1.0})
    now[0] = 100.0  # The compilation, which the clock leaves out.
    meter.restart_clock()
    for loss in (2.0, 6.0):
        meter.add({"loss": loss})
    now[0] = 104.0
    assert meter.summary() == {"loss": 3.0, "images_per_second": 5.0, "mfu": 0.075}
    meter.add({"loss": 5.0})
    now[0] = 105.0
    assert meter.summary() == {"loss": 5.0, "images_per_second": 10.0, "mfu": 0.15}


def test_meter_continues_an_interval_after_a_restart():
    values, meter = [0.1, 0.2, 0.7], logs.Meter(8, 0.0, 1.0)
    for value in values[:2]:
        meter.add({"loss": value})
    given = meter.get_state()
    stored = json.loads(json.dumps(given))
    meter.add({"loss": values[2]})
    assert given == stored  # It may be written while the next steps go on.
    resumed = logs.Meter(8, 0.0, 1.0)
    resumed.set_state(stored)
    resumed.add({"loss": values[2]})
    assert resumed.summary()["loss"] == meter.summary()["loss"]


def test_resumed_log_drops_what_is_repeated_and_a_cut_line(tmp_path):
    log = logs.MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": step / 3})
    log.close()
    path = tmp_path / logs.METRICS_NAME
    with path.open("ab") as file:
        file.write(b'{"step": 6, "lo\xff')
    assert [r["step"] for r in logs.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    log = logs.MetricsLog(tmp_path, 3)
    log.write(4, {"loss": 9.0, "psnr": 7.0})
    log.close()
    records = logs.read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[2] == {"step": 3, "loss": 1.0} and records[3]["loss"] == 9.0
    assert logs.last_scores(tmp_path, "l") == {"loss": 9.0}
    assert logs.read_metrics(tmp_path / "nowhere") == []
