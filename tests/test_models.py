"""Sizes, initial values, precision and compilation of whole networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.models import decoder, dit, dit_dh, dit_parts, vit

TINY = dict(hidden_size=(24, 32), depth=(3, 2), num_heads=(2, 2), num_classes=10)
TINY_DIT = dict(hidden_size=24, depth=3, num_heads=2, num_classes=10)
TINY_DECODER = dict(hidden_size=24, depth=3, num_heads=2, intermediate_size=40)


def randn(*shape, seed=0):
    draws = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(draws)


def make_dit_dh(**options):
    return dit_dh.DiTDH(4, 6, **TINY | options, rngs=nnx.Rngs(0))


def make_dit(**options):
    return dit.DiT(4, 6, **TINY_DIT | options, rngs=nnx.Rngs(0))


def make_decoder(**options):
    return decoder.RAEDecoder(6, 16, 4, **TINY_DECODER | options, rngs=nnx.Rngs(0))


def inputs(b=2):
    return randn(b, 4, 4, 6), jnp.linspace(0.1, 0.9, b), jnp.arange(b) % 10


def randomised(make):
    """The network's definition, and parameters of which none is zero."""
    graphdef, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    rng = np.random.default_rng(0)

    def draw(path, p):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(center, 0.15, p.shape), p.dtype)

    return graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(state))


def apply(graphdef, params, *args):
    """Runs a compiled network."""
    return jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))(
        params, *args
    )


def compiled(function, *args):
    """Compiles a call as one program, which takes less time than all its parts."""
    return jax.jit(lambda *args: function(*args))(*args)


def count(make):
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state))


DIT_DH_COUNTS = [
    ("s", 16, 196_455_764),
    ("s", 32, 196_750_676),
    ("b", 16, 294_295_892),
    ("l", 16, 621_744_436),
    ("xl", 16, 838_675_796),
    ("xl", 32, 839_560_532),
]


@pytest.mark.parametrize("name, size, expected", DIT_DH_COUNTS)
def test_parameters_of_dit_dh(name, size, expected):
    """Latents of 768 channels; counts include the position table and frequencies."""
    preset = dit_dh.PRESETS[name]
    assert (
        count(lambda: dit_dh.DiTDH(size, 768, **preset, rngs=nnx.Rngs(0))) == expected
    )


DIT_COUNTS = [
    ("s", 33_649_792),
    ("b", 131_884_288),
    ("l", 459_923_424),
    ("xl", 677_248_384),
]


@pytest.mark.parametrize("name, expected", DIT_COUNTS)
def test_parameters_of_dit(name, expected):
    preset = dit.PRESETS[name]
    assert count(lambda: dit.DiT(16, 768, **preset, rngs=nnx.Rngs(0))) == expected


DECODER_COUNTS = [
    ("b", 768, 256, 86_435_328),
    ("l", 768, 256, 304_150_272),
    ("xl", 768, 256, 415_352_704),
    ("xl", 768, 1024, 416_237_440),
    ("xl", 1024, 256, 415_647_616),
    ("xl", 384, 256, 414_910_336),
]


@pytest.mark.parametrize("name, channels, num_patches, expected", DECODER_COUNTS)
def test_parameters_of_the_decoder(name, channels, num_patches, expected):
    def make():
        preset = decoder.PRESETS[name]
        return decoder.RAEDecoder(channels, num_patches, 16, **preset, rngs=nnx.Rngs(0))

    assert count(make) == expected


@pytest.mark.parametrize("family", [dit, dit_dh])
@pytest.mark.parametrize("name", dit.PRESETS)
def test_every_preset_maps_latents_to_velocities(family, name):
    """Shapes alone, so that the largest fit."""
    make = dit.DiT if family is dit else dit_dh.DiTDH
    model = nnx.eval_shape(
        lambda: make(16, 768, **family.PRESETS[name], rngs=nnx.Rngs(0))
    )
    x_t = jax.ShapeDtypeStruct((2, 16, 16, 768), jnp.float32)
    t, y = (jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.float32, jnp.int32))
    out = nnx.eval_shape(lambda model, *args: model(*args), model, x_t, t, y)
    assert out.shape == x_t.shape and out.dtype == jnp.float32


@pytest.mark.parametrize("make", [make_dit, make_dit_dh])
def test_new_network_returns_zero(make):
    out = jax.jit(lambda *args: make()(*args))(*inputs())
    np.testing.assert_array_equal(out, 0)


def test_new_block_is_the_identity():
    x = randn(2, 5, 24)
    for c in (randn(2, 24, seed=1), randn(2, 5, 24, seed=1)):
        out = compiled(
            lambda *args: dit_parts.DiTBlock(24, 2, rngs=nnx.Rngs(0))(*args), x, c
        )
        np.testing.assert_array_equal(out, x)


def test_block_takes_conditions_of_another_width():
    block = nnx.eval_shape(
        lambda: dit_parts.DiTBlock(
            24, 2, cond_size=6, use_swiglu=False, rngs=nnx.Rngs(0)
        )
    )
    assert block.modulation.kernel.shape == (6, 144)
    out = nnx.eval_shape(
        lambda block, *args: block(*args), block, randn(2, 5, 24), randn(2, 6)
    )
    assert out.shape == (2, 5, 24)


def test_initial_values():
    """Xavier patch embeddings, N(0, 0.02) embeddings, PyTorch's U(+-1/sqrt(n))."""
    model = nnx.jit(lambda: make_dit_dh(hidden_size=(96, 128)))()

    def largest_and_std(layer):
        kernel = np.asarray(layer.kernel[...])
        return np.abs(kernel).max(), kernel.std()

    bound = (6 / (6 + 128)) ** 0.5
    np.testing.assert_allclose(
        largest_and_std(model.x_embedder.proj), [bound, bound / 3**0.5], rtol=0.05
    )
    np.testing.assert_array_equal(model.x_embedder.proj.bias[...], 0)
    bound = 1 / 96**0.5
    for layer in (model.s_projector, model.blocks.block.attn.qkv):
        np.testing.assert_allclose(
            largest_and_std(layer), [bound, bound / 3**0.5], rtol=0.05
        )
        assert np.abs(layer.bias[...]).max() > 0
    np.testing.assert_allclose(largest_and_std(model.t_embedder.fc1)[1], 0.02, rtol=0.1)
    assert np.abs(model.t_embedder.fc1.bias[...]).max() > 0
    np.testing.assert_allclose(model.y_embedder.table[...].std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(model.t_embedder.W[...].std(), 1, rtol=0.15)

    model = nnx.jit(make_dit)()
    np.testing.assert_array_equal(model.t_embedder.fc1.bias[...], 0)
    np.testing.assert_array_equal(model.blocks.block.attn.qkv.bias[...], 0)


def test_trunk_and_head_run_apart():
    graphdef, params = randomised(make_dit_dh)

    @jax.jit
    def apart(params, x_t, t, y):
        model = nnx.merge(graphdef, params)
        s = model.trunk(x_t, t, y)
        return s, model.head(x_t, s, t)

    s, out = apart(params, *inputs())
    assert s.shape == (2, 16, 24)
    np.testing.assert_allclose(out, apply(graphdef, params, *inputs()), atol=1e-5)


@pytest.mark.parametrize("make", [make_dit, make_dit_dh])
def test_every_input_matters(make):
    graphdef, params = randomised(make)
    network = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args))
    out = network(*inputs())
    for changed in range(3):
        args = list(inputs())
        args[changed] = args[changed][::-1]
        assert jnp.abs(network(*args) - out).max() > 1e-2


@pytest.mark.parametrize("make", [make_dit, make_dit_dh])
def test_options_are_wired(make):
    graphdef, params = randomised(make)
    out = apply(graphdef, params, *inputs())
    without_rope = nnx.graphdef(nnx.eval_shape(lambda: make(use_rope=False)))
    assert jnp.abs(apply(without_rope, params, *inputs()) - out).max() > 1e-2
    assert nnx.eval_shape(lambda: make(use_pos_embed=False)).pos_embed is None
    model = nnx.eval_shape(lambda: make(qk_norm=True, use_swiglu=False, mlp_ratio=3))
    assert model.blocks.block.attn.q_norm.scale.shape == (3, 12)
    assert model.blocks.block.mlp.fc1.kernel.shape == (3, 24, 72)
    model = nnx.eval_shape(lambda: make(use_rmsnorm=False))
    assert model.blocks.block.norm1.scale is model.final_layer.norm.scale is None


def test_patches_and_dropped_sigma():
    graphdef, params = randomised(lambda: make_dit(patch_size=2, learn_sigma=True))
    assert params["final_layer"]["linear"]["kernel"].shape == (24, 48)
    assert apply(graphdef, params, *inputs()).shape == (2, 4, 4, 6)
    with pytest.raises(ValueError, match="input_size 4.*patch_size 3"):
        make_dit(patch_size=3)


def test_misspelt_options_are_refused():
    for make in (make_dit, make_dit_dh):
        with pytest.raises(TypeError, match="qknorm"):
            make(qknorm=True)


@pytest.mark.parametrize("make", [make_dit, make_dit_dh])
def test_samples_do_not_see_each_other(make):
    graphdef, params = randomised(make)
    together = apply(graphdef, params, *inputs(4))
    alone = apply(graphdef, params, *(a[2:3] for a in inputs(4)))
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


def gradients(make):
    graphdef, params = randomised(make)

    def loss_of(params, *args):
        return jnp.mean(nnx.merge(graphdef, params)(*args) ** 2)

    args = (randn(2, 16, 6),) if "pred" in params else inputs()
    return jax.grad(loss_of), params, args


@pytest.mark.parametrize("make", [make_dit_dh, make_decoder])
def test_remat_does_not_change_gradients(make):
    results = []
    for remat in ("none", "dots", "full"):
        grad, params, args = gradients(lambda remat=remat: make(remat=remat))
        results.append(jax.device_get(jax.jit(grad)(params, *args)))
    scale = max(np.abs(g).max() for g in jax.tree.leaves(results[0]))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale),
            results[0],
            other,
        )


@pytest.mark.parametrize("block", [dit_parts.DiTBlock, vit.ViTBlock])
def test_blocks_are_traced_once_whatever_the_depth(monkeypatch, block):
    """Counts calls of the block's Python code while the gradient is traced."""
    calls, original = [], block.__call__

    def counted(self, *args):
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(block, "__call__", counted)
    numbers = []
    for depth in (2, 7):
        if block is vit.ViTBlock:
            grad, params, args = gradients(lambda d=depth: make_decoder(depth=d))
        else:
            grad, params, args = gradients(lambda d=depth: make_dit(depth=d))
        calls.clear()
        step = jax.jit(grad)
        step.lower(params, *args)
        step.lower(params, *args)
        numbers.append(len(calls))
    assert numbers[0] == numbers[1] == 1


def products(jaxpr):
    """Yields the operand types of every product in a jaxpr, however nested."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(var.aval.dtype.name for var in eqn.invars)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("make", [make_dit, make_dit_dh, make_decoder])
def test_products_are_in_bfloat16(make):
    """Operands are bfloat16; parameters, outputs and gradients are float32."""
    grad, params, args = gradients(lambda: make(dtype="bfloat16", remat="none"))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(dtype="bfloat16")))
    forward = jax.make_jaxpr(lambda p, *args: nnx.merge(graphdef, p)(*args))(
        params, *args
    )
    operands = list(products(forward.jaxpr))
    assert len(operands) >= 6
    assert set(operands) == {("bfloat16", "bfloat16")}
    assert [v.dtype for v in forward.out_avals] == [jnp.float32]
    for tree in (params, jax.eval_shape(grad, params, *args)):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}


@pytest.mark.parametrize("make", [make_dit, make_dit_dh, make_decoder])
def test_bfloat16_stays_near_float32(make):
    """Residual streams in float32 keep the error at a few roundings of 2^-9."""
    graphdef, params = randomised(make)
    args = (randn(2, 16, 6),) if make is make_decoder else inputs()
    exact = apply(graphdef, params, *args)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(dtype="bfloat16")))
    rounded = apply(graphdef, params, *args)
    error = jnp.sqrt(jnp.mean((rounded - exact) ** 2) / jnp.mean(exact**2))
    assert 0 < error < 0.02


@pytest.mark.parametrize("trainable", [True, False])
def test_position_table_of_the_decoder(trainable):
    grad, params, args = gradients(lambda: make_decoder(trainable_pos_embed=trainable))
    grads = jax.jit(grad)(params, *args)
    assert (jnp.abs(grads["pos_embed"]).max() > 0) == trainable
    assert jnp.abs(grads["cls_token"]).max() > 0


def test_decoder_resizes_other_token_counts():
    model = nnx.merge(*randomised(make_decoder))
    assert compiled(model, randn(2, 36, 6)).shape == (2, 16, 16, 3)
    constant = jnp.broadcast_to(randn(1, 1, 6), (1, 25, 6))
    resized, plain = compiled(model, constant), compiled(model, constant[:, :16])
    np.testing.assert_allclose(resized, plain, atol=1e-5)
    with pytest.raises(ValueError, match="square number, got 12"):
        model(randn(2, 12, 6))
    with pytest.raises(ValueError, match="num_patches.*got 12"):
        decoder.RAEDecoder(6, 12, 4, **TINY_DECODER, rngs=nnx.Rngs(0))


def test_layer_scale_gates_the_branches():
    x = randn(2, 5, 24)
    block = vit.ViTBlock(24, 2, 48, layer_scale=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block(x), x)
    plain = vit.ViTBlock(24, 2, 48, rngs=nnx.Rngs(0))
    ones = vit.ViTBlock(24, 2, 48, layer_scale=1.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ones(x), plain(x), rtol=1e-6)
