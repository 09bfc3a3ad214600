"""Programs for attention: the TPU's kernel equals XLA's, and which one is chosen."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from rae_jax.layers import attention, linear, positions, tpu_attention
from rae_jax.training import sharding

N, HEADS, HEAD_DIM = 256, 2, 24
WIDTH = HEADS * HEAD_DIM


def randn(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def abstract_mesh(platform="tpu", kind="TPU v5", **sizes):
    sizes = dict(data=2, fsdp=1, tensor=1) | sizes
    return AbstractMesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        abstract_device=AbstractDevice(kind, num_cores=2, platform=platform),
    )


def reference(qkv, rotary, pairs):
    """Attention of a fused projection, by JAX's own function."""
    q, k, v = (
        x.reshape(*x.shape[:2], HEADS, HEAD_DIM) for x in jnp.split(qkv, 3, axis=-1)
    )
    if rotary is not None:
        q, k = (positions.apply_rotary(x, *rotary, pairs) for x in (q, k))
    return jax.nn.dot_product_attention(q, k, v).reshape(*qkv.shape[:2], WIDTH)


@pytest.mark.parametrize("pairs", ["adjacent", "halves", None])
def test_kernel_equals_xla_forwards_and_backwards(pairs):
    """1e-5 of the largest entry; two blocks of queries, with and without rotation."""
    rotary, tables = None, ()
    if pairs:
        rotary = tuple(jnp.asarray(x) for x in positions.rotary_2d(HEAD_DIM, 16))
        tables = (*rotary, jnp.asarray(tpu_attention.rotation(pairs, HEAD_DIM)))
    sizes = tpu_attention.Sizes(HEADS, HEAD_DIM, bool(pairs), interpret=True)
    qkv, g = randn(2, N, 3 * WIDTH), randn(2, N, WIDTH, seed=1)

    @jax.jit
    def both(qkv, g):
        expected, pull = jax.vjp(lambda x: reference(x, rotary, pairs), qkv)
        found, pull2 = jax.vjp(lambda x: tpu_attention.attend(x, tables, sizes), qkv)
        return (expected, *pull(g)), (found, *pull2(g))

    for a, b in zip(*both(qkv, g), strict=True):
        assert jnp.abs(a - b).max() < 1e-5 * jnp.abs(a).max()


def test_layer_with_the_kernel_equals_the_layer_without(monkeypatch):
    """Also with normalised queries and keys, and on a mesh that splits the heads."""
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    rotary = positions.rotary_2d(HEAD_DIM, 16)
    x = randn(4, N, WIDTH)
    attend = tpu_attention.attend

    def interpreted(qkv, tables, sizes):
        sizes = tpu_attention.Sizes(**{**vars(sizes), "interpret": True})
        return attend(qkv, tables, sizes)

    monkeypatch.setattr(tpu_attention, "attend", interpreted)
    for qk_norm in (False, True):
        graphdef, params = nnx.split(
            attention.Attention(WIDTH, HEADS, qk_norm=qk_norm, rngs=nnx.Rngs(0))
        )

        def run(params, x, graphdef=graphdef):
            return nnx.merge(graphdef, params)(x, rotary)

        expected = jax.jit(run)(params, x)
        with monkeypatch.context() as patch, jax.set_mesh(mesh):
            patch.setattr(attention, "choose", lambda *sizes: "tpu")
            assert "pallas_call" in str(jax.make_jaxpr(run)(params, x))
            found = jax.jit(lambda *args: run(*args))(params, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_program_equals_that_of_jax(dtype):
    """In bfloat16 to 2 % of the largest gradient: the logits' gradient is rounded."""
    q, k, v, g = (randn(2, 9, HEADS, HEAD_DIM, seed=i, dtype=dtype) for i in range(4))
    expected, pull = jax.vjp(jax.nn.dot_product_attention, q, k, v)
    found, pull2 = jax.vjp(attention.attend, q, k, v)
    limit = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip((expected, *pull(g)), (found, *pull2(g)), strict=True):
        assert b.dtype == a.dtype
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.abs(a - b).max() <= limit * jnp.abs(a).max()


@pytest.mark.parametrize(
    ("mesh", "sizes", "program", "reason"),
    [
        ({}, (64, 256, 16, 72), "tpu", ""),
        (dict(tensor=4), (64, 256, 16, 72), "tpu", ""),
        (dict(kind="TPU v6 lite"), (64, 1024, 16, 72), "tpu", ""),
        (dict(kind="TPU v3"), (64, 256, 16, 72), "xla", "TPU v3 has too little"),
        ({}, (64, 257, 12, 64), "xla", "257 tokens are no multiple of 128"),
        ({}, (64, 4096, 16, 128), "xla", "exceed the vector memory"),
        ({}, (63, 256, 16, 72), "xla", "63 samples cannot be split over 2"),
        (dict(tensor=3), (64, 256, 16, 72), "xla", "16 heads cannot be split"),
        (dict(platform="gpu", kind="H100"), (64, 256, 16, 72), "xla", "without a GPU"),
        (dict(platform="cpu", kind="cpu"), (64, 256, 16, 72), "xla", None),
    ],
)
def test_choice_is_logged_with_its_reason(mesh, sizes, program, reason, caplog):
    attention._report.cache_clear()
    with (
        jax.sharding.use_abstract_mesh(abstract_mesh(**mesh)),
        caplog.at_level(logging.INFO),
    ):
        for _ in range(2):
            assert attention.choose(*sizes, "bfloat16") == program
    if reason is None:
        assert not caplog.records
        return
    (record,) = caplog.records  # Once for each shape.
    assert record.levelname == ("WARNING" if reason else "INFO")
    assert reason in record.message
    assert f"{sizes[1]} tokens, {sizes[2]} heads of {sizes[3]}" in record.message


def test_gpus_need_types_and_heads_that_cudnn_has(monkeypatch):
    assert "no float32" in attention._refusal_on_gpu(64, "float32")
    assert "not 136" in attention._refusal_on_gpu(136, "bfloat16")
    assert "not 36" in attention._refusal_on_gpu(36, "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert attention._refusal_on_gpu(72, "bfloat16") == ""  # DiT-DH-XL.
    Device.compute_capability = "7.5"
    assert "compute capability" in attention._refusal_on_gpu(72, "bfloat16")


def test_batch_stays_split_through_the_kernel():
    """What leaves the kernel lies as its input, sample by sample."""
    graphdef, params = nnx.split(attention.Attention(WIDTH, HEADS, rngs=nnx.Rngs(0)))
    mesh = abstract_mesh()
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x))(
            params, randn(4, N, WIDTH)
        )
    (mapped,) = (e for e in jaxpr.eqns if e.primitive.name == "shard_map")
    assert set(mapped.params["in_specs"]) == {P(("data", "fsdp"), None, None)}


@pytest.mark.parametrize(("kind", "first"), [("TPU v5", True), ("TPU v6 lite", False)])
def test_what_a_product_takes_is_made_first_where_that_is_faster(kind, first):
    layer = linear.linear(8, 16, rngs=nnx.Rngs(0))
    with jax.sharding.use_abstract_mesh(abstract_mesh(kind=kind)):
        program = jax.make_jaxpr(lambda x: layer.columns(x)[0])(randn(2, 4, 8))
    assert ("optimization_barrier" in str(program)) == first
