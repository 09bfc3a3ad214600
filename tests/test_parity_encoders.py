"""Pretrained encoders against transformers, random weights, both directions."""

import functools
import importlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.convert import encoder_configs, encoder_names, sources, tables
from rae_jax.models import encoders, vit_encoder

pytestmark = pytest.mark.parity

SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3)
DINOV2 = SIZES | dict(image_size=126, patch_size=14, mlp_ratio=2)
PATCH8 = SIZES | dict(image_size=72, patch_size=8, intermediate_size=96)
CASES = {
    "dinov2_with_registers": ("Dinov2WithRegistersModel", DINOV2),
    "dinov2_with_registers_gated": (
        "Dinov2WithRegistersModel",
        DINOV2 | dict(use_swiglu_ffn=True, num_register_tokens=2),
    ),
    "dinov2": ("Dinov2Model", DINOV2),
    "dinov2_gated": ("Dinov2Model", DINOV2 | dict(use_swiglu_ffn=True)),
    "siglip": ("SiglipVisionModel", PATCH8),
    "mae": ("ViTMAEModel", PATCH8 | dict(mask_ratio=0.0)),
    "dinov3": ("DINOv3ViTModel", PATCH8 | dict(num_register_tokens=4)),
    "dinov3_gated": (
        "DINOv3ViTModel",
        PATCH8
        | dict(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
        | dict(rope_theta=50.0, layer_norm_eps=1e-6),
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
# Of a table of 9 x 9: shrunk; not square, one axis grows and one shrinks.
GRIDS = [(6, 6), (11, 7)]


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def make_reference(torch, transformers, case: str):
    """Every parameter, norms and zeros included, away from its initial value."""
    architecture, settings = CASES[case]
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def reference_tokens(torch, model, images, **options):
    """Final tokens, prefix included; MAE keeps all patches in their order."""
    x = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    if type(model).__name__ == "ViTMAEModel":
        count = images.shape[1] * images.shape[2] // 64
        noise = torch.arange(count).repeat(len(images), 1).float()
        options |= dict(noise=noise, interpolate_pos_encoding=True)
    if type(model).__name__ == "SiglipVisionModel":
        options |= dict(interpolate_pos_encoding=True)
    with torch.no_grad():
        return model(x, **options)


def ours_from(reference, **changes) -> vit_encoder.ViTEncoder:
    """Our encoder with the reference's weights, as its own state dict names them."""
    name, sizes = encoder_configs.sizes_from_config(reference.config.to_dict())
    sizes |= dict(normalize=False) | changes
    arrays = {k: v.numpy() for k, v in reference.state_dict().items()}
    return filled(name, sizes, encoder_names.canonical(sources.from_arrays(arrays)))


def filled(name, sizes, source) -> vit_encoder.ViTEncoder:
    model = nnx.eval_shape(
        lambda: encoders.make_encoder(name, rngs=nnx.Rngs(0), **sizes)
    )
    graphdef, params = nnx.split(model, nnx.Param)
    flat = flax.traverse_util.flatten_dict(nnx.to_pure_dict(params), sep=".")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    table = encoder_names.table(name, **sizes)
    tables.check(table, source, shapes)
    flat = {k: jnp.asarray(v) for k, v in tables.to_ours(table, source, shapes)}
    return nnx.merge(graphdef, flax.traverse_util.unflatten_dict(flat, sep="."))


run = jax.jit(lambda encoder, images: encoder(images))


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual, desired, rtol=5e-6):
    """To the largest value; float32 itself costs 1e-6 here."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max() <= rtol * np.abs(desired).max()


@EVERY_CASE
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tokens_equal_transformers(torch, transformers, case, grid):
    reference = make_reference(torch, transformers, case)
    encoder = ours_from(reference)
    images = randn(2, *(g * encoder.patch_size for g in grid), 3)
    expected = reference_tokens(torch, reference, images).last_hidden_state
    assert_close(run(encoder, images), expected[:, encoder.prefix :])


@pytest.mark.parametrize("case", ["dinov2_with_registers", "siglip", "mae", "dinov3"])
def test_norm_without_affine_part(torch, transformers, case):
    """As the official code of RAE makes it, at the size of the table."""
    reference = make_reference(torch, transformers, case)
    final = {"siglip": "post_layernorm", "dinov3": "norm"}.get(case, "layernorm")
    with torch.no_grad():
        getattr(reference, final).weight.fill_(1)
        getattr(reference, final).bias.zero_()
    encoder = ours_from(reference, normalize=True)
    size = 9 * encoder.patch_size
    images = randn(1, size, size, 3)
    expected = reference_tokens(torch, reference, images).last_hidden_state
    assert_close(run(encoder, images), expected[:, encoder.prefix :])


def test_layers_equal_the_released_code_of_raev2(torch, transformers):
    """The mean of the layers' normalised patch tokens, plus the last's mean."""
    reference = make_reference(torch, transformers, "dinov3")
    encoder = ours_from(reference, layers=(0, 2))
    images = randn(2, 48, 64, 3)
    out = reference_tokens(torch, reference, images, output_hidden_states=True)
    with torch.no_grad():
        # Entry 0 is the input of the first block.
        layers = [reference.norm(out.hidden_states[i + 1])[:, 5:] for i in (0, 2)]
        mean = torch.stack(layers).mean(dim=0)
        expected = mean + layers[-1].mean(dim=1, keepdim=True)
    assert_close(layers[-1], out.last_hidden_state[:, 5:])
    assert_close(run(encoder, images), expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_dino_equals_a_plain_vit(torch, transformers, activation):
    """Under the names of Facebook's files, with their fused map of q, k and v."""
    names = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    config = transformers.ViTConfig(
        **(PATCH8 | dict(image_size=48)),
        hidden_act=names[activation],
        layer_norm_eps=1e-6,
    )
    reference = transformers.ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source = encoder_names.canonical(sources.from_arrays(dino_arrays(reference)))
    sizes = dict(
        image_size=48,
        patch_size=8,
        hidden_size=48,
        depth=3,
        num_heads=3,
        intermediate_size=96,
        activation=activation,
        normalize=False,
    )
    encoder = filled("dino", sizes, source)
    images = randn(2, 48, 48, 3)
    out = reference_tokens(torch, reference, images, output_hidden_states=True)
    assert_close(run(encoder, images), out.last_hidden_state[:, 1:])
    features = jax.jit(lambda e, x: e.block_features(x, (0, 1)))(encoder, images)
    for i, feature in enumerate(features):
        assert_close(feature, out.hidden_states[i + 1][:, 1:])


def dino_arrays(reference) -> dict[str, np.ndarray]:
    """Facebook's names and fusion of a transformers ViT's weights."""
    arrays = {k: v.numpy() for k, v in reference.state_dict().items()}
    renames = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layers.": "blocks.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "layernorm.": "norm.",
    }
    found = {}
    for name, value in arrays.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        found[name] = value
    for layer in range(3):
        for kind in ("weight", "bias"):
            parts = [
                found.pop(f"blocks.{layer}.attention.{x}_proj.{kind}") for x in "qkv"
            ]
            found[f"blocks.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
    return found


@EVERY_CASE
def test_transformers_loads_what_we_write(torch, transformers, case, tmp_path):
    """And we what it writes, in whichever spelling it does."""
    reference = make_reference(torch, transformers, case)
    reference.save_pretrained(tmp_path / "theirs")
    encoder = vit_encoder.ViTEncoder.from_pretrained(
        tmp_path / "theirs", normalize=False
    )
    size = 9 * encoder.patch_size
    images = randn(1, size, size, 3)
    expected = reference_tokens(torch, reference, images).last_hidden_state
    assert_close(run(encoder, images), expected[:, encoder.prefix :])

    encoder.save_pretrained(tmp_path / "ours", layout="huggingface")
    for cls in (type(reference), transformers.AutoModel):
        again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
        for name, value in reference.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


@functools.cache
def config_class(name: str):
    transformers = importlib.import_module("transformers")
    architecture = encoder_configs.config_from_sizes(
        name, encoders.PRESETS[PRESET_OF[name]]["sizes"]
    )[0]["architectures"][0]
    return getattr(transformers, architecture)


PRESET_OF = {
    "dinov2": "dinov2_noreg_b",
    "dinov2_with_registers": "dinov2_b",
    "siglip": "siglip2_b",
    "mae": "mae_b",
    "dinov3": "dinov3_l",
}


@pytest.mark.parametrize("name", PRESET_OF)
def test_defaults_are_those_of_transformers(transformers, name):
    """Published files leave defaults out."""
    config = config_class(name).config_class()
    for key, value in encoder_configs.DEFAULTS[name].items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("preset", [*PRESET_OF.values(), "dinov2_g", "siglip2_so400m"])
def test_presets_have_the_shapes_of_transformers(torch, transformers, preset):
    """Every tensor of the class at full size, none allocated."""
    block = encoders.PRESETS[preset]
    settings, _ = encoder_configs.config_from_sizes(block["name"], block["sizes"])
    cls = getattr(transformers, settings["architectures"][0])
    with torch.device("meta"):
        reference = cls(cls.config_class(**settings))
    given = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    types = dict.fromkeys(given, np.dtype(np.float32))
    source = sources.TensorSource("meta", given, types, lambda name: np.zeros(0))
    model = nnx.eval_shape(
        lambda: encoders.make_encoder(block["name"], rngs=nnx.Rngs(0), **block["sizes"])
    )
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat = flax.traverse_util.flatten_dict(state, sep=".")
    table = encoder_names.table(block["name"], **block["sizes"])
    canonical = encoder_names.canonical(source)
    tables.check(table, canonical, {path: leaf.shape for path, leaf in flat.items()})
    assert {e.name for e in table.extras} <= set(canonical.shapes)
