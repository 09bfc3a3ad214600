"""Identities and properties of the network parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.layers import (
    attention,
    conditioning,
    linear,
    mlp,
    norm,
    patches,
    positions,
    resize,
    stack,
)
from rae_jax.training import flops


def randn(*shape, seed=0):
    draws = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(draws)


class Block(nnx.Module):
    """A small block with a condition, for the stack."""

    def __init__(self, *, rngs):
        self.norm = norm.LayerNorm(8, rngs=rngs)
        self.mlp = mlp.SwiGLU(8, 12, rngs=rngs)

    def __call__(self, x, c):
        return x + self.mlp(self.norm(x) * c)


@pytest.mark.parametrize("init", ["torch", "xavier", "zeros", "normal"])
def test_linear_initialisation(init):
    layer = linear.linear(400, 100, init=init, rngs=nnx.Rngs(0))
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    bound = {"torch": 1 / 20, "xavier": (6 / 500) ** 0.5, "zeros": 0.0}.get(init)
    if init == "normal":
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.02)
    else:
        assert np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.02)
    assert (np.abs(bias).max() > 0) == (init == "torch")
    assert np.abs(bias).max() <= 1 / 20


def test_linear_rejects_unknown_init():
    with pytest.raises(ValueError, match="'kaiming'.*xavier"):
        linear.linear(2, 2, init="kaiming", rngs=nnx.Rngs(0))


def test_layer_norm_keeps_small_variance():
    """E[x^2] - E[x]^2 would lose the variance of 1e-4 beside the mean of 100.

    The mean itself is only known to a float32 step at 100, a thousandth of 1e-2.
    """
    x = 100 + 1e-2 * randn(3, 64)
    out = norm.LayerNorm(64, eps=1e-12, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(out.mean(-1), 0, atol=3e-3)
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-4)


@pytest.mark.parametrize("make", [norm.LayerNorm, norm.RMSNorm])
def test_norms_compute_in_float32(make):
    x = (100 + randn(3, 64)).astype(jnp.bfloat16)
    layer = make(64, rngs=nnx.Rngs(0))
    out = layer(x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, layer(x.astype(jnp.float32)))


def test_modulation_per_sample_equals_per_token():
    x, shift, scale = randn(2, 5, 8), randn(2, 8, seed=1), randn(2, 8, seed=2)
    repeated = (jnp.repeat(m[:, None], 5, axis=1) for m in (shift, scale))
    out = norm.modulate(x, shift, scale)
    np.testing.assert_array_equal(out, norm.modulate(x, *repeated))
    np.testing.assert_allclose(out[1, 3], x[1, 3] * (1 + scale[1]) + shift[1])


def test_attention_oracle():
    """Compares with softmax attention written out in NumPy."""
    layer = attention.Attention(12, 3, rngs=nnx.Rngs(0))
    x = randn(2, 5, 12)
    qkv = np.asarray(layer.qkv(x)).reshape(2, 5, 3, 3, 4)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (b, k, n, head_dim) each
    logits = q @ k.transpose(0, 1, 3, 2) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = (weights @ v).transpose(0, 2, 1, 3).reshape(2, 5, 12)
    np.testing.assert_allclose(layer(x), layer.proj(out), atol=1e-6)


def test_attention_rejects_uneven_heads():
    with pytest.raises(ValueError, match="10.*3"):
        attention.Attention(10, 3, rngs=nnx.Rngs(0))


def test_attention_without_positions_is_permutation_equivariant():
    layer = attention.Attention(16, 2, qk_norm=True, rngs=nnx.Rngs(0))
    x, order = randn(2, 9, 16), jnp.asarray([3, 1, 4, 0, 5, 8, 2, 6, 7])
    np.testing.assert_allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-6)
    rotary = positions.rotary_2d(8, 3)
    difference = layer(x[:, order], rotary) - layer(x, rotary)[:, order]
    assert jnp.abs(difference).max() > 1e-3


def test_rotary_products_depend_on_offsets_alone():
    """q at (r, c) and k at (r', c') interact by (r - r', c - c')."""
    cos, sin = positions.rotary_2d(16, 6)
    q, k = (jnp.broadcast_to(randn(16, seed=i), (1, 36, 1, 16)) for i in (0, 1))
    q, k = (positions.apply_rotary(x, cos, sin)[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T).reshape(6, 6, 6, 6)
    np.testing.assert_allclose(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2],
                               atol=1e-5)  # fmt: skip
    assert abs(products[0, 0, 1, 0] - products[0, 0, 0, 1]) > 1e-2
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1),
                               jnp.linalg.norm(randn(16)), rtol=1e-5)  # fmt: skip


def test_sincos_encodes_the_column_first():
    table = positions.sincos_2d(8, 3).reshape(3, 3, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[2, :, :4])
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])
    np.testing.assert_allclose(table[0, 1, 0], np.sin(1), rtol=1e-6)


@pytest.mark.parametrize("make", [positions.sincos_2d, positions.rotary_2d])
def test_positions_reject_odd_sizes(make):
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        make(6, 4)


def test_patches_round_trip():
    images = randn(2, 6, 9, 4)
    tokens = patches.patchify(images, 3)
    assert tokens.shape == (2, 6, 36)
    np.testing.assert_array_equal(patches.unpatchify(tokens, 3, (2, 3)), images)
    # Token 4 is row 1, column 1; entry (2 * 3 + 1) * 4 + 2 its row 2, column 1.
    np.testing.assert_array_equal(tokens[:, 4, 30], images[:, 5, 4, 2])


def test_patches_reject_uneven_sizes():
    with pytest.raises(ValueError, match="7x6.*3"):
        patches.patchify(randn(1, 7, 6, 1), 3)
    with pytest.raises(ValueError, match="6 tokens.*2x2"):
        patches.unpatchify(randn(1, 6, 4), 2)
    with pytest.raises(ValueError, match="width 6.*4"):
        patches.unpatchify(randn(1, 4, 6), 2)


RESIZES = [
    (resize.bicubic_matrix, resize.resize_bicubic),
    (resize.bicubic_antialias_matrix, resize.resize_bicubic_antialias),
    (resize.bilinear_matrix, resize.resize_bilinear),
]


@pytest.mark.parametrize("matrix, function", RESIZES)
def test_resize_properties(matrix, function):
    for n, m in [(16, 7), (7, 16), (5, 5)]:
        np.testing.assert_allclose(matrix(n, m).sum(axis=1), 1, atol=1e-12)
        np.testing.assert_allclose(matrix(n, m)[::-1, ::-1], matrix(n, m), atol=1e-12)
    np.testing.assert_allclose(matrix(5, 5), np.eye(5), atol=1e-12)
    images = randn(2, 16, 7, 3)
    out = function(images, 7, 9)
    expected = np.einsum("ih,bhwc->biwc", matrix(16, 7), images)
    expected = np.einsum("jw,biwc->bijc", matrix(7, 9), expected)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_array_equal(function(images, 16, 7), images)


def test_fourier_frequencies_are_fixed_unless_asked():
    def gradient(trainable):
        model = conditioning.FourierTimeEmbedding(
            8, trainable_tables=trainable, rngs=nnx.Rngs(0)
        )
        grads = nnx.grad(lambda m: m(jnp.asarray([0.1, 0.7])).sum())(model)
        return jnp.abs(grads["W"][...]).max()

    assert gradient(False) == 0
    assert gradient(True) > 0


def test_sinusoidal_time_embedding_oracle():
    model = conditioning.SinusoidalTimeEmbedding(6, 4, in_dim=8, rngs=nnx.Rngs(0))
    t = np.asarray([0.0, 1.0, 250.0])
    phase = t[:, None] * 10000.0 ** (-np.arange(4)[None, :] / 4)
    features = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
    expected = model.fc2(jax.nn.silu(model.fc1(jnp.asarray(features, jnp.float32))))
    np.testing.assert_allclose(model(jnp.asarray(t)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="even, got 7"):
        conditioning.SinusoidalTimeEmbedding(6, 4, in_dim=7, rngs=nnx.Rngs(0))


def test_label_embedding_has_a_null_row():
    model = conditioning.LabelEmbedding(10, 4, rngs=nnx.Rngs(0))
    out = model(jnp.asarray([0, 10]))
    np.testing.assert_array_equal(out, model.table[...][jnp.asarray([0, 10])])


def test_labels_are_dropped_at_the_rate():
    y = jnp.arange(20000) % 10
    dropped = conditioning.drop_labels(y, jax.random.key(0), 0.1, 10)
    assert jnp.all((dropped == y) | (dropped == 10))
    # Five standard deviations of the mean.
    np.testing.assert_allclose((dropped == 10).mean(), 0.1, atol=0.011)
    np.testing.assert_array_equal(
        conditioning.drop_labels(y, jax.random.key(0), 0.0, 10), y
    )


@pytest.mark.parametrize("remat", [*stack.REMAT_POLICIES, "none"])
def test_stack_equals_a_loop(remat):
    """Values and gradients, also of the condition that the body closes over."""
    graphdef, state = nnx.split(
        stack.Stack(Block, 4, remat=remat, rngs=nnx.Rngs(0)), nnx.Param
    )
    block_def = nnx.graphdef(Block(rngs=nnx.Rngs(0)))
    x, c = randn(2, 5, 8), 1 + 0.1 * randn(2, 5, 8, seed=1)

    def looped(state, x, c, start=0, stop=4):
        for i in range(start, stop):
            layer = jax.tree.map(lambda p, i=i: p[i], state["block"])
            x = nnx.merge(block_def, layer)(x, c)
        return x

    def scanned(state, x, c):
        return nnx.merge(graphdef, state)(x, c)

    check = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    check(scanned(state, x, c), looped(state, x, c))
    blocks = nnx.merge(graphdef, state)
    check(blocks(x, c, start=1, stop=3), looped(state, x, c, 1, 3))
    last, outputs = blocks.features(x, c)
    check(outputs[2], looped(state, x, c, 0, 3))
    np.testing.assert_array_equal(outputs[-1], last)
    expected, actual = (
        jax.jit(jax.grad(lambda *args, f=f: (f(*args) ** 2).sum(), argnums=(0, 1, 2)))
        for f in (looped, scanned)
    )
    jax.tree.map(check, actual(state, x, c), expected(state, x, c))


@pytest.mark.parametrize(
    "remat, depth, loops", [("unrolled", 4, 0), ("weights", 4, 2), ("weights", 2, 0)]
)
def test_a_stack_may_be_no_loop(remat, depth, loops):
    """Then the backward pass computes no product of the forward pass again."""
    x, c = randn(2, 5, 8), randn(2, 5, 8, seed=1)
    model = stack.Stack(Block, depth, remat=remat, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model, nnx.Param)
    blocks = [jax.tree.map(lambda p, i=i: p[i], model.block) for i in range(depth)]

    def of_stack(state):
        return (nnx.merge(graphdef, state)(x, c) ** 2).sum()

    def of_blocks(blocks):
        y = x
        for block in blocks:
            y = block(y, c)
        return (y**2).sum()

    text = jax.jit(jax.grad(of_stack)).lower(state).as_text()
    assert text.count("stablehlo.while") == loops
    executed = flops.count_flops(jax.grad(of_stack), state)
    least = flops.count_flops(jax.grad(of_blocks), blocks)
    assert executed > least if loops else executed == least


def test_blocks_of_a_stack_differ():
    kernel = stack.Stack(Block, 3, rngs=nnx.Rngs(0)).block.mlp.w12.kernel[...]
    assert kernel.shape == (3, 8, 24)
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.1


def test_stack_rejects_bad_options():
    with pytest.raises(ValueError, match="'some'.*full.*none"):
        stack.Stack(Block, 2, remat="some", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        stack.Stack(Block, 0, rngs=nnx.Rngs(0))


def test_stack_keeps_the_batch_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    graphdef, state = nnx.split(stack.Stack(Block, 2, rngs=nnx.Rngs(0)), nnx.Param)

    @jax.jit
    def run(state, x, c):
        return nnx.merge(graphdef, state)(x, c)

    x, c = randn(8, 5, 8), randn(8, 5, 8, seed=1)
    expected = run(state, x, c)
    with jax.set_mesh(mesh):
        out = run(state, x, c)
        assert out.sharding.spec == jax.sharding.PartitionSpec(("data",))
        # A batch that eight devices cannot share is left alone.
        np.testing.assert_allclose(run(state, x[:3], c[:3]), expected[:3], atol=1e-6)
    np.testing.assert_allclose(out, expected, atol=1e-6)
