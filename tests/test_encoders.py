"""Pretrained encoders as networks and in runs; files are in test_encoder_files."""

import flax.traverse_util
import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.convert import encoder_names, sources, tables
from rae_jax.models import encoders, rae, vit_encoder
from rae_jax.trainers import frozen, rae_decoder

EVERY_FAMILY = pytest.mark.parametrize("name", encoder_names.FAMILIES)
EVERY_GOLDEN = pytest.mark.parametrize("golden", tiny_encoders.GOLDENS)


# Reference values of the official code


def golden_cases():
    for golden, size in tiny_encoders.GOLDENS.items():
        for key in golden_map.read(f"rae_encode_{golden}"):
            case, *rest = key.split("/")
            if rest[1:] == ["z"] and case not in ("var", "meanvar", "tokens"):
                given = int(case[5:]) if case.startswith("input") else size
                yield pytest.param(golden, key, given, id=f"{golden}-{case}-{rest[0]}")


@pytest.mark.parametrize("golden, key, size", list(golden_cases()))
def test_latents_of_the_official_code(golden, key, size):
    """Resized, squashed and plain images; other input sizes; affine norm kept."""
    arrays = golden_map.read(f"rae_encode_{golden}")
    pixels = golden_map.last(arrays[f"images/{key.split('/')[1]}"])
    encoder = tiny_encoders.load(
        golden, size, normalize=not key.startswith("affine_kept")
    )
    assert encoder.input_size == size
    # In PyTorch, source coordinates of resized images are rounded to float32.
    atol = 1e-5 if pixels.shape[1:3] == (size, size) else 1e-4
    z = tiny_encoders.encode(encoder, pixels)
    np.testing.assert_allclose(z, golden_map.last(arrays[key]), rtol=0, atol=atol)


@EVERY_GOLDEN
def test_pixel_statistics_come_from_the_preprocessor(golden):
    arrays = golden_map.read(f"rae_encode_{golden}")
    encoder = tiny_encoders.load(golden, tiny_encoders.GOLDENS[golden])
    for ours, key in (("image_mean", "encoder_mean"), ("image_std", "encoder_std")):
        np.testing.assert_allclose(getattr(encoder, ours), arrays[key].ravel())


# The network


@EVERY_FAMILY
def test_tokens_of_any_size_are_normalised(name):
    encoder = tiny_encoders.make(name)
    tokens = tiny_encoders.run(encoder, tiny_encoders.images(16, 40))
    assert tokens.shape == (2, 10, 16) and tokens.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(tokens, -1), 0, atol=1e-5)
    np.testing.assert_allclose(np.var(tokens, -1), 1, atol=1e-2)
    with pytest.raises(ValueError, match="36x32 is not a multiple of patch_size 8"):
        encoder(tiny_encoders.images(36, 32))


def test_products_in_bfloat16_keep_tokens_and_parameters_in_float32():
    exact, rounded = (
        tiny_encoders.make("dinov2", dtype=d) for d in ("float32", "bfloat16")
    )
    assert {x.dtype for x in tiny_encoders.parameters(rounded).values()} == {
        np.dtype("f4")
    }
    out = tiny_encoders.run(rounded, tiny_encoders.images(32, 32))
    assert out.dtype == jnp.float32
    difference = np.abs(
        out - tiny_encoders.run(exact, tiny_encoders.images(32, 32))
    ).max()
    assert 1e-5 < difference < 0.2


@pytest.mark.parametrize("name", ["dinov3", "siglip"])
def test_block_features_lead_to_the_tokens(name):
    encoder = tiny_encoders.make(name)
    first, last = tiny_encoders.block_features(
        encoder, tiny_encoders.images(32, 24), (0, 2)
    )
    assert first.shape == last.shape == (2, 12, 16)
    assert np.abs(first - last).max() > 1e-3
    np.testing.assert_allclose(
        encoder.norm(last),
        tiny_encoders.run(encoder, tiny_encoders.images(32, 24)),
        rtol=0,
        atol=1e-5,
    )
    for wrong in ((2, 0), (1, 1), (3,), (-1,)):
        with pytest.raises(ValueError, match=r"must increase and lie in 0\.\.2"):
            encoder.block_features(tiny_encoders.images(32, 24), wrong)


@pytest.mark.parametrize("layers", [(0, 2), (0, 1)])
def test_layers_are_combined_as_in_raev2(layers):
    """Of the released code: mean of normalised layers and the last's spatial mean."""
    x = tiny_encoders.images(32, 24)
    encoder = tiny_encoders.make("dinov3", normalize=False)
    features = [
        encoder.norm(f) for f in tiny_encoders.block_features(encoder, x, layers)
    ]
    mean = sum(features) / len(features)
    expected = {
        "mean_global": mean + features[-1].mean(axis=1, keepdims=True),
        "sum": sum(features),
    }
    for mode, tokens in expected.items():
        several = tiny_encoders.make(
            "dinov3", normalize=False, layers=layers, layer_mode=mode
        )
        np.testing.assert_allclose(
            tiny_encoders.run(several, x), tokens, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=30), "image_size 30 is not a multiple of patch_size 8"),
        (dict(layers=(2, 1)), "must increase"),
        (dict(layers=(3,)), "lie in 0..2"),
        (dict(layer_mode="mean"), "layer_mode 'mean'; choose from"),
        (dict(num_register=4), "'num_register'. Did you mean 'num_registers'"),
        (dict(activation="relu"), "activation 'relu'"),
        (dict(num_heads=3), "16 is not a multiple of num_heads 3"),
    ],
)
def test_mistakes_in_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_encoders.make("dinov2", **changes)


def test_unknown_encoders_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'dinov4'. Did you mean 'dinov3'"):
        tiny_encoders.make("dinov4")


# Presets

# Of transformers' classes at these sizes, without final norm, mask token and pooling
# head; of DINOv3 with its key bias, which here is zero. Published totals: 86.6 M for
# DINOv2-B, 1.14 B for g, 303 M for DINOv3-L, 428 M for SigLIP So400m with its head.
COUNTS = {
    "dinov2_s": 22_058_112 - 3 * 384,
    "dinov2_b": 86_583_552 - 3 * 768,
    "dinov2_b_512": 86_583_552 - 3 * 768,
    "dinov2_l": 304_372_736 - 3 * 1024,
    "dinov2_g": 1_136_486_912 - 3 * 1536,
    "dinov2_noreg_b": 86_580_480 - 3 * 768,
    "mae_b": 85_798_656 - 2 * 768,
    "mae_l": 303_301_632 - 2 * 1024,
    "mae_h": 630_764_800 - 2 * 1280,
    "siglip2_b": 92_930_304 - 7_088_640,
    "siglip2_l": 315_956_224 - 12_597_248,
    "siglip2_so400m": 427_888_064 - 15_240_656,
    "siglip2_so400m_p14_384": 428_225_600 - 15_240_656,
    "dinov3_s": 21_596_544 - 3 * 384 + 12 * 384,
    "dinov3_b": 85_660_416 - 3 * 768 + 12 * 768,
    "dinov3_l": 303_129_600 - 3 * 1024 + 24 * 1024,
    "dinov3_l_k7": 303_129_600 - 3 * 1024 + 24 * 1024,
    "dino_s8": 21_670_272 - 2 * 384,
}


@pytest.mark.parametrize("preset", encoders.PRESETS)
def test_presets_build_and_name_every_parameter(preset):
    """The table and the module agree at every size; counts are the known ones."""
    config = ConfigDict(blocks.pretrained_encoder(encoders.PRESETS[preset]))
    sizes = config.sizes.to_dict()
    assert config.weights.count("/") == 1
    _, params = frozen.encoder(config)
    flat = flax.traverse_util.flatten_dict(params)
    shapes = {".".join(path): leaf.shape for path, leaf in flat.items()}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count == COUNTS.get(preset, count)
    table = encoder_names.table(config.name, **sizes)
    foreign = {e.name: tables.foreign_shape(e, shapes) for e in table.entries}
    foreign.pop("", None)
    zeros = {name: np.broadcast_to(np.float32(0), s) for name, s in foreign.items()}
    source = sources.TensorSource(
        "", foreign, dict.fromkeys(foreign, np.dtype("f4")), zeros.__getitem__
    )
    tables.check(table, source, shapes)


def test_raev2_layers():
    k7, k23 = (encoders.PRESETS[f"dinov3_l_k{k}"]["sizes"]["layers"] for k in (7, 23))
    assert k7 == (11, 13, 15, 17, 19, 21, 23) and k23 == tuple(range(1, 24))


# Runs


def block(weights, golden: str = "dinov2", **sizes) -> ConfigDict:
    arguments = vit_encoder.read_arguments(tiny_encoders.hf_folder(golden))
    sizes = {k: v for k, v in arguments.items() if k != "name"} | sizes
    preset = dict(name=arguments["name"], weights=str(weights), sizes=sizes)
    return ConfigDict(blocks.pretrained_encoder(preset))


def test_runs_read_pretrained_encoders(tmp_path):
    """Of Hugging Face's layout and ours; beside the workdir first."""
    config = block(tiny_encoders.hf_folder("dinov2"), image_size=56)
    tiny_encoders.load("dinov2", 56).save_pretrained(tmp_path / "converted")
    beside = block("../converted", image_size=56)
    for c in (config, beside):
        params = frozen.load_encoder(c, tmp_path / "run")
        graphdef, shapes = frozen.encoder(c)
        frozen.check_shapes("The encoder", shapes, params)
        tokens = tiny_encoders.run(
            nnx.merge(graphdef, params), tiny_encoders.images(56, 56)
        )
        expected = tiny_encoders.run(
            tiny_encoders.load("dinov2", 56), tiny_encoders.images(56, 56)
        )
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(num_heads=4), "num_heads = 4, the files have 3"),
        (dict(depth=3, hidden_size=24), "(?s)hidden_size = 24.*48; depth = 3.* 2"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps = 1e-05, the files have 1e-06"),
        (dict(table_size=112), "table_size = 112, the files have 126"),
        (dict(image_mean=(0.5, 0.5, 0.5)), "image_mean = .* the files have"),
    ],
)
def test_sizes_that_contradict_the_files_are_listed(sizes, message, tmp_path):
    tiny_encoders.load("dinov2", 56).save_pretrained(tmp_path)
    for folder in (tiny_encoders.hf_folder("dinov2"), tmp_path):
        with pytest.raises(configs.ConfigError, match=message):
            frozen.load_encoder(block(folder, image_size=56, **sizes), tmp_path)


def test_another_family_contradicts_the_files(tmp_path):
    config = block(tiny_encoders.hf_folder("dinov2"), image_size=56)
    config.name = "dinov2"
    with pytest.raises(configs.ConfigError, match="name = dinov2, the files have di"):
        frozen.load_encoder(config, tmp_path)


def test_decoder_makes_images_of_the_data_size():
    """16 x 16 tokens of 224 pixels in patches of 14 become 256 pixels."""
    config = ConfigDict(dict(data=dict(image_size=256)))
    config.encoder = blocks.pretrained_encoder(encoders.PRESETS["dinov2_b"])
    config.model = dict(hidden_size=8, depth=1, num_heads=2, intermediate_size=8)
    encoder_def, params = frozen.encoder(config.encoder)
    decoder_def, decoder_params = frozen.abstract(rae_decoder.make_model(config))
    pixels = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)

    def run(params, decoder_params, pixels):
        encoder = nnx.merge(encoder_def, params)
        decoder = nnx.merge(decoder_def, decoder_params)
        return rae.decode(decoder, rae.encode(encoder, pixels), encoder)

    assert jax.eval_shape(run, params, decoder_params, pixels).shape == pixels.shape
    config.data.image_size = 250
    with pytest.raises(configs.ConfigError, match="250 is not a multiple of the enco"):
        rae_decoder.make_model(config)
