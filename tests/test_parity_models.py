"""Networks and operators against PyTorch, transformers and diffusers.

Random weights; the reference runs in float64 where a difference would otherwise be
its own rounding.
"""

import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.layers import attention, mlp, norm, resize
from rae_jax.models import decoder, vit

pytestmark = pytest.mark.parity

DIFFUSERS_NAMES = {
    "attention.to_q.": "attention.attention.query.",
    "attention.to_k.": "attention.attention.key.",
    "attention.to_v.": "attention.attention.value.",
    "attention.to_out.0.": "attention.output.dense.",
}
DINOV2_NAMES = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
}


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw_parameters(torch, module):
    """Moves every parameter away from its initial value, zeros and ones included."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def state_dict(module, names):
    """Returns the module's parameters under official names."""
    arrays = {}
    for key, value in module.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        arrays[key] = value.numpy()
    return arrays


def run(model, *args):
    return jax.jit(lambda *args: model(*args))(*map(jnp.asarray, args))


@pytest.mark.parametrize("num_tokens", [16, 9, 36])
def test_decoder_equals_diffusers(torch, num_tokens):
    rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae")
    sizes = dict(num_patches=16, patch_size=4)
    reference = rae.RAEDecoder(
        hidden_size=24,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=96,
        image_size=16,
        **sizes,
    )
    draw_parameters(torch, reference)
    with torch.no_grad():
        tokens = randn(2, num_tokens, 24)
        logits = reference(torch.from_numpy(tokens)).logits
        expected = reference.unpatchify(logits).numpy()

    shape = dict(hidden_size=48, depth=3, num_heads=4, intermediate_size=96)
    model = nnx.eval_shape(
        lambda: decoder.RAEDecoder(24, **sizes, **shape, rngs=nnx.Rngs(0))
    )
    official = state_dict(reference, DIFFUSERS_NAMES)
    official["decoder_pos_embed"] = reference.decoder_pos_embed.numpy()
    model = golden_map.load(model, official)
    np.testing.assert_allclose(
        run(model, tokens), np.moveaxis(expected, 1, -1), atol=1e-5
    )


def test_position_table_equals_diffusers(torch):
    """At 256 tokens; diffusers stretches every other grid to these 16 positions."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    expected = embeddings.get_2d_sincos_pos_embed(
        48, 16, cls_token=True, extra_tokens=1, output_type="pt"
    )
    model = decoder.RAEDecoder(6, 256, 4, 48, 1, 2, 4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model.pos_embed[0], expected.numpy(), atol=2e-6)


def test_vit_block_equals_dinov2(torch):
    """With layer scale, exact GELU and eps 1e-6."""
    dinov2 = pytest.importorskip(
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    )
    config = dinov2.Dinov2WithRegistersConfig(
        hidden_size=48, num_attention_heads=3, mlp_ratio=2, layer_norm_eps=1e-6
    )
    config._attn_implementation = "eager"
    reference = draw_parameters(torch, dinov2.Dinov2WithRegistersLayer(config))
    x = randn(2, 7, 48)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x)).numpy()
    model = nnx.eval_shape(
        lambda: vit.ViTBlock(48, 3, 96, layer_scale=1.0, rngs=nnx.Rngs(0))
    )
    model = golden_map.load(model, state_dict(reference, DINOV2_NAMES))
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)


def test_attention_equals_torch(torch):
    reference = torch.nn.MultiheadAttention(48, 3, batch_first=True)
    draw_parameters(torch, reference)
    x = randn(2, 7, 48)
    with torch.no_grad():
        tokens = torch.from_numpy(x)
        expected = reference(tokens, tokens, tokens)[0].numpy()
    names = {"in_proj_": "qkv.", "out_proj": "proj"}
    model = nnx.eval_shape(lambda: attention.Attention(48, 3, rngs=nnx.Rngs(0)))
    model = golden_map.load(model, state_dict(reference, names))
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)


@pytest.mark.parametrize("name, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_activations_equal_torch(torch, name, approximate):
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    gelu = torch.nn.functional.gelu
    expected = gelu(torch.from_numpy(x).double(), approximate=approximate).numpy()
    np.testing.assert_allclose(mlp.ACTIVATIONS[name](x), expected, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_layer_norm_equals_torch(torch, eps):
    x = 5 + 1e-3 * randn(3, 64)
    reference = torch.nn.functional.layer_norm
    expected = reference(torch.from_numpy(x).double(), (64,), eps=eps).numpy()
    out = norm.LayerNorm(64, eps=eps, affine=False, rngs=nnx.Rngs(0))(jnp.asarray(x))
    # The mean of 5 is known to a float32 step, 5e-7, of a deviation of 1e-3.
    np.testing.assert_allclose(out, expected, atol=1e-3)
    x = randn(3, 64)
    expected = reference(torch.from_numpy(x).double(), (64,), eps=eps).numpy()
    out = norm.LayerNorm(64, eps=eps, affine=False, rngs=nnx.Rngs(0))(jnp.asarray(x))
    np.testing.assert_allclose(out, expected, atol=2e-6)


RESIZES = {
    "bicubic": (resize.bicubic_matrix, resize.resize_bicubic, {}),
    "bicubic_antialias": (
        resize.bicubic_antialias_matrix,
        resize.resize_bicubic_antialias,
        dict(antialias=True),
    ),
    "bilinear": (resize.bilinear_matrix, resize.resize_bilinear, {}),
}
SIZES = [(256, 224), (37, 16), (37, 32), (37, 40), (14, 16), (12, 8), (64, 224)]


@pytest.mark.parametrize("name", RESIZES)
@pytest.mark.parametrize("n, m", SIZES)
def test_resize_equals_torch(torch, name, n, m):
    """Operators agree in float64, results in float32 with that exact reference."""
    make_matrix, function, options = RESIZES[name]
    options = dict(mode=name.split("_")[0], align_corners=False, **options)
    interpolate = torch.nn.functional.interpolate
    matrix = make_matrix(n, m)
    eye = torch.eye(n, dtype=torch.float64)[:, None, :, None].expand(-1, -1, -1, 4)
    columns = interpolate(eye, size=(m, 4), **options)[:, 0, :, 0].numpy()
    np.testing.assert_allclose(matrix, columns.T, atol=1e-13)

    images = randn(1, 2, n, n + 3)
    exact = interpolate(torch.from_numpy(images).double(), size=(m, m), **options)
    out = function(golden_map.last(images), m, m)
    exact = np.moveaxis(exact.numpy(), 1, -1)
    np.testing.assert_allclose(out, exact, atol=2e-6)
    # In float32 PyTorch rounds its source coordinates, which white noise magnifies.
    rounded = interpolate(torch.from_numpy(images), size=(m, m), **options)
    rounded = np.moveaxis(rounded.numpy(), 1, -1)
    np.testing.assert_allclose(out, rounded, atol=3e-4)
