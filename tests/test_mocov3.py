"""MoCo v3: the loss, the momentum encoder, batch statistics, published files."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from tiny_encoders import TINY, make, parameters

from rae_jax import config as configs
from rae_jax.convert import encoder_names, sources, tables, torch_files
from rae_jax.layers import positions
from rae_jax.losses import contrastive
from rae_jax.models import mocov3, vit_encoder
from rae_jax.trainers import backbones, frozen, inputs, registry, weights
from rae_jax.trainers import mocov3 as trainer
from rae_jax.training import checkpoints, sharding, state

PATH = "configs/mocov3.py"
TIERS = ("", "_tier_small", "_photos", "_digits", "_smoke")


def load(variant: str, *overrides: str) -> ConfigDict:
    return configs.load_config(
        f"{PATH}:{variant}", [f"--config.{o}" for o in overrides]
    )


@functools.cache
def network() -> mocov3.MoCoV3:
    """One block of 32 features, heads of 32, 16 patches of 8 pixels."""
    make_model = trainer.make_model(load("smoke"))
    return nnx.jit(lambda: make_model(nnx.Rngs(0)))()


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (8, 32, 32, 3)
    return {k: rng.integers(0, 256, shape, dtype="u1") for k in ("image", "image2")}


def vectors(*shape: int) -> jax.Array:
    rng = np.random.default_rng(len(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


# The loss


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_of_known_vectors(temperature):
    b, scale = 6, 2 * temperature
    apart, same = 3 * jnp.eye(b), jnp.ones((b, 4))
    loss, accuracy = contrastive.info_nce(apart, 5 * apart, temperature)
    expected = np.log(1 + (b - 1) * np.exp(-1 / temperature))
    np.testing.assert_allclose(loss, scale * expected, rtol=1e-5)
    assert accuracy == 1
    loss, _ = contrastive.info_nce(same, same, temperature)
    np.testing.assert_allclose(loss, scale * np.log(b), rtol=1e-6)
    loss, accuracy = contrastive.info_nce(apart, jnp.roll(apart, 1, 0), temperature)
    expected = np.log(b - 1 + np.exp(1 / temperature))
    np.testing.assert_allclose(loss, scale * expected, rtol=1e-5)
    assert accuracy == 0


def test_both_views_are_asked_for():
    q, k = vectors(5, 2, 7), vectors(5, 2, 7)[::-1]
    loss, metrics = contrastive.symmetric_loss(q, k, 0.2)
    cosine = np.einsum(
        "ivd,jvd->vij", contrastive.unit(q), contrastive.unit(k)[:, ::-1]
    )
    shares = np.exp(cosine / 0.2) / np.exp(cosine / 0.2).sum(axis=2, keepdims=True)
    expected = -0.4 * np.log(np.diagonal(shares, axis1=1, axis2=2)).mean(axis=1).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["loss"] is loss
    constant, _ = jnp.broadcast_arrays(q[:1], q)
    assert contrastive.symmetric_loss(constant, k, 0.2)[1]["query_std"] < 1e-6
    many = vectors(4000, 2, 16)
    spread = contrastive.symmetric_loss(many[:500], many[:500], 0.2)[1]["query_std"]
    np.testing.assert_allclose(spread, 1, rtol=0.02)


def test_keys_get_no_gradient_and_zero_vectors_a_finite_one():
    grads = jax.grad(
        lambda q, k: contrastive.symmetric_loss(q, k, 0.2)[0], argnums=(0, 1)
    )(vectors(4, 2, 3).at[0].set(0), vectors(4, 2, 3))
    assert jnp.isfinite(grads[0]).all() and jnp.abs(grads[0]).max() > 0.1
    assert not grads[1].any()
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        contrastive.info_nce(vectors(4, 3), vectors(4, 3), 0)


def test_momentum_rises_by_half_a_cosine():
    momentum = trainer.make_momentum(0.99, 400)
    found = [float(momentum(step)) for step in (0, 100, 200, 400, 500)]
    expected = [0.99, 0.99 + 0.01 * (1 - np.sqrt(0.5)) / 2, 0.995, 1, 1]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    with pytest.raises(configs.ConfigError, match="momentum must be within"):
        trainer.make_momentum(1.1, 400)


# The network


def test_batch_norm_takes_the_statistics_of_each_view():
    x = 3 + 2 * vectors(64, 2, 5) + jnp.arange(2.0)[None, :, None]
    plain, affine = mocov3.BatchNorm(5, affine=False), mocov3.BatchNorm(5)
    affine.scale[...], affine.bias[...] = jnp.full(5, 2.0), jnp.full(5, -1.0)
    found = np.asarray(plain(x))
    expected = (x - x.mean(0)[None]) / np.sqrt(x.var(0)[None] + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(affine(x), 2 * expected - 1, atol=1e-5)
    np.testing.assert_allclose(found[:, 0], plain(x[:, :1])[:, 0], atol=1e-6)


def test_heads_are_those_of_the_paper():
    model = nnx.eval_shape(lambda: trainer.make_model(load("t4_mocov3_b"))(nnx.Rngs(0)))
    shapes = jax.tree.map(lambda x: x.shape, state.param_dict(model))
    kernels = {k: [x["kernel"] for x in shapes[k]["linears"].values()] for k in HEADS}
    assert kernels == HEADS
    for head in HEADS:
        assert all(x.keys() == {"kernel"} for x in shapes[head]["linears"].values())
        affine = shapes[head]["norms"].values()  # All but the last.
        assert len(affine) == len(HEADS[head]) - 1
        assert all(x.keys() == {"scale", "bias"} for x in affine)


HEADS = {
    "projector": [(768, 4096), (4096, 4096), (4096, 256)],
    "predictor": [(256, 4096), (4096, 256)],
}


def test_initial_values_are_those_of_the_official_code():
    """Queries, keys and values count apart; positions begin with the row."""
    params = state.param_dict(network())["encoder"]
    qkv = params["blocks"]["block"]["attn"]["qkv"]["kernel"]
    bound = np.sqrt(6 / 64)
    assert 0.97 * bound < np.abs(qkv).max() <= bound
    rows = positions.sincos_2d(32, 4)[:, 16:], params["pos_embed"][0, 1:, :16]
    np.testing.assert_array_equal(*rows)
    assert not params["pos_embed"][0, 0].any()
    assert params["cls_token"].std() < 1e-5


def test_no_gradient_in_patch_embedding_positions_and_momentum_branch():
    graphdef, params = nnx.graphdef(network()), state.param_dict(network())

    def loss(*networks):
        return trainer.contrast(graphdef, networks, batch(), 0.2)[0]

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, params)
    assert not any(jnp.any(x) for x in jax.tree.leaves(grads[1]))
    flat = flax.traverse_util.flatten_dict(grads[0])
    for path, grad in flat.items():
        assert np.any(grad) != bool({"patch_embed", "pos_embed"} & set(path)), path


def test_sharded_batch_is_one_batch():
    """Negatives and batch statistics of all eight devices; to 1e-5."""
    graphdef, params = nnx.graphdef(network()), state.param_dict(network())

    def metrics_of(batch):
        return trainer.contrast(graphdef, (params, params), batch, 0.2)[1]

    single = jax.jit(metrics_of)(batch())
    mesh = sharding.make_mesh(8)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
        assert len(rows["image"].sharding.device_set) == 8
        split = jax.jit(metrics_of)(rows)
    for name, value in single.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-5, err_msg=name)


def test_steps_move_the_average_and_leave_the_patch_embedding():
    config = load("smoke", "num_steps=60", "optimizer.peak_lr=3e-3")
    design, key = registry.design(config), jax.random.key(0)
    first, step = jax.jit(design.init)(key), jax.jit(design.step)
    second, metrics = step(first, {}, batch(), key)
    momentum = float(trainer.make_momentum(0.99, 60)(1))
    np.testing.assert_allclose(metrics["momentum"], momentum, rtol=1e-6)
    expected = jax.tree.map(
        lambda e, p: momentum * e + (1 - momentum) * p, first.params, second.params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        second.ema_params,
        expected,
    )
    run_state, losses = second, [metrics["loss"]]
    for _ in range(25):
        run_state, metrics = step(run_state, {}, batch(), key)
        losses.append(metrics["loss"])
    assert np.mean(losses[-5:]) < 0.7 * losses[0] and metrics["accuracy"] > 0.9
    for params in (run_state.params, run_state.ema_params):
        for name in ("patch_embed", "pos_embed"):
            pairs = [
                jax.tree.leaves(p["encoder"][name]) for p in (params, first.params)
            ]
            for a, b in zip(*pairs, strict=True):
                np.testing.assert_array_equal(a, b)
    bias = run_state.params["projector"]["norms"][0]["bias"]
    marks = trainer.decayed(run_state.params)
    assert marks["projector"]["norms"][0]["bias"] and np.any(bias)


# Runs and files


@pytest.mark.parametrize("row", ["t4_mocov3_b", "t4_mocov3_l"])
def test_rows_are_those_of_the_table(row):
    """Sizes of the paper's encoders: 85.8 and 303.3 M parameters."""
    for tier in TIERS:
        config = load(row + tier)
        assert (config.row, config.trainer) == (row, "mocov3")
        assert config.tier == (tier.removeprefix("_tier_").strip("_") or "paper")
        assert config.data.validation_size >= config.data.batch_size
        assert inputs.abstract_batch(config.data).keys() >= {"image", "image2"}
    config = load(row)
    model = nnx.eval_shape(lambda: trainer.make_model(config)(nnx.Rngs(0)))
    leaves = jax.tree.leaves(state.param_dict(model)["encoder"])
    expected = {"t4_mocov3_b": 85_798_656, "t4_mocov3_l": 303_301_632}[row]
    assert sum(x.size for x in leaves) == expected
    assert (config.num_steps, config.optimizer.peak_lr) == (300 * 312, 2.4e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.accumulate=2", "must be one part"),
        ("data.transform=mae", "needs two views"),
        ("data.validation_size=4", "needs one batch of 8"),
    ],
)
def test_settings_that_change_the_loss_are_refused(override, message):
    with pytest.raises(configs.ConfigError, match=message):
        registry.design(load("smoke", override))


def test_encoder_of_a_run_is_one_of_the_family(tmp_path):
    config = load("smoke")
    configs.save_config(config, tmp_path / checkpoints.CONFIG_NAME)
    params = state.param_dict(network())
    average = jax.tree.map(lambda x: x / 2, params)
    writer = checkpoints.Checkpoints(tmp_path, keep=1)
    writer.save(1, state.TrainState(jnp.ones(()), params, average, ()), {})
    writer.close()
    sizes = backbones.arguments(config)
    block = ConfigDict(dict(name=sizes.pop("name"), weights=".", sizes=sizes))
    found = frozen.load_encoder(block, tmp_path)
    frozen.check_shapes("The encoder", frozen.encoder(block)[1], found)
    same = jax.tree.map(np.array_equal, found, {k: params["encoder"][k] for k in found})
    assert all(jax.tree.leaves(same))
    opened = weights.open_source(str(tmp_path))  # What was trained itself.
    assert opened.arguments["name"] == "mocov3" and not opened.arguments["normalize"]
    kernel = "patch_embed.proj.kernel"
    np.testing.assert_array_equal(
        opened.parameters.read(kernel),
        params["encoder"]["patch_embed"]["proj"]["kernel"],
    )
    with pytest.raises(ValueError, match="gives encoder, not decoder"):
        weights.open_source(str(tmp_path), "decoder")


def test_published_checkpoints_are_read(tmp_path):
    """`module.base_encoder.*` of a whole training checkpoint, heads left out."""
    model = make("mocov3", normalize=False)
    ours = sources.from_arrays(parameters(model), "ours")
    table = encoder_names.table("mocov3", normalize=False, **TINY)
    shapes = {name: x.shape for name, x in parameters(model).items()}
    found = dict(tables.to_foreign(table, ours, shapes))
    arrays = {f"module.momentum_encoder.{k}": x + 1 for k, x in found.items()}
    arrays |= {f"module.base_encoder.{k}": x for k, x in found.items()}
    for part in ("momentum_encoder.head", "base_encoder.head", "predictor"):
        arrays[f"module.{part}.0.weight"] = np.zeros((4, 16), np.float32)
        arrays[f"module.{part}.1.running_mean"] = np.zeros(4, np.float32)
        arrays[f"module.{part}.1.num_batches_tracked"] = np.zeros((), np.int64)
    path = tmp_path / "vit-t-300ep.pth.tar"
    torch_files.write_pt(path, arrays.items(), specs(arrays))
    read = vit_encoder.ViTEncoder.from_pretrained(
        path, name="mocov3", normalize=False, **TINY
    )
    for name, x in parameters(model).items():
        np.testing.assert_array_equal(parameters(read)[name], x, name)
    block = dict(name="mocov3", weights=str(path), sizes=TINY | {"table_size": 32})
    loaded = frozen.load_encoder(ConfigDict(block), tmp_path)
    np.testing.assert_array_equal(loaded["cls_token"], model.cls_token[...])


def specs(arrays):
    return {name: (x.shape, x.dtype) for name, x in arrays.items()}
