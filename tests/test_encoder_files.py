"""Files of pretrained encoders: names, config.json, conversion and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
from flax import nnx

from rae_jax.convert import encoder_configs, encoder_names, sources, tables
from rae_jax.models import encoders, pretrained, vit_encoder

FAMILIES = list(encoder_names.FAMILIES)
EVERY_GOLDEN = pytest.mark.parametrize("golden", tiny_encoders.GOLDENS)


# Names


def respelled(golden: str) -> dict[str, str]:
    """Names as transformers 5 has them, of those of version 4."""
    renames = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    if golden == "mae":
        renames |= {
            "intermediate.dense": "mlp.fc1",
            ".output.dense": ".mlp.fc2",
            "encoder.layer.": "layers.",
        }
    return renames


@EVERY_GOLDEN
@pytest.mark.parametrize("prefix", ["", "encoder.model."])
@pytest.mark.parametrize("version", [4, 5])
def test_every_spelling_of_names_is_read(golden, prefix, version):
    """Also those in the state dict of an RAE, whose decoder lies beside."""
    original = encoder_names.canonical(
        sources.open_tensors(tiny_encoders.hf_folder(golden))
    )
    names = {}
    for name in original.shapes:
        new = name
        for old, other in respelled(golden).items() if version == 5 else ():
            new = new.replace(old, other)
        names[prefix + new] = name
    arrays = {new: original.read(old) for new, old in names.items()}
    if prefix:
        arrays["decoder.decoder_embed.weight"] = np.zeros(1)
    again = encoder_names.canonical(sources.from_arrays(arrays))
    assert set(again.shapes) == set(original.shapes)
    for name in original.shapes:
        np.testing.assert_array_equal(again.read(name), original.read(name))


def test_halves_of_a_gated_mlp_are_joined():
    """Version 5 of transformers splits DINOv2's `weights_in`, the gate first."""
    parts = {
        "embeddings.patch_embeddings.projection.weight": np.zeros((2, 3, 4, 4)),
        "encoder.layer.0.mlp.up_proj.weight": np.full((3, 2), 2.0),
        "encoder.layer.0.mlp.gate_proj.weight": np.full((3, 2), 1.0),
        "encoder.layer.0.mlp.down_proj.weight": np.full((2, 3), 3.0),
    }
    source = encoder_names.canonical(sources.from_arrays(parts))
    fused, out = (f"encoder.layer.0.mlp.weights_{x}.weight" for x in ("in", "out"))
    assert source.shapes[fused] == (6, 2) and source.shapes[out] == (2, 3)
    np.testing.assert_array_equal(source.read(fused)[:, 0], [1, 1, 1, 2, 2, 2])


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="memory holds none of .* no encoder of the"):
        encoder_names.canonical(sources.from_arrays({"decoder.weight": np.zeros(1)}))


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    arrays = tiny_encoders.stored(tiny_encoders.hf_folder("dinov2"))
    lost = "encoder.layer.1.norm2.bias"
    arrays["encoder.layer.2.norm2.bias"] = arrays.pop(lost)
    write_hf(tmp_path, tiny_encoders.hf_folder("dinov2"), arrays)
    with pytest.raises(ValueError, match=rf"(?s)missing: {lost}.*unexpected: encoder."):
        vit_encoder.ViTEncoder.from_pretrained(tmp_path)


def write_hf(folder: Path, like: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(folder / "model.npz", **arrays)
    for file in like.glob("*.json"):
        (folder / file.name).write_text(file.read_text())


# Hugging Face's config.json


SIZES = {
    "dinov2": dict(table_size=56, patch_size=14, image_size=28),
    "dinov2_with_registers": dict(table_size=518, num_registers=2),
    "siglip": dict(table_size=40, layer_norm_eps=1e-5, image_std=(0.2, 0.3, 0.4)),
    "mae": dict(table_size=40, activation="gelu_tanh"),
    "dinov3": dict(gated=True, rope_theta=50.0, num_registers=1),
}


@pytest.mark.parametrize("name", SIZES)
def test_config_json_tells_all_sizes(name):
    sizes = tiny_encoders.TINY | SIZES[name]
    config, preprocessor = encoder_configs.config_from_sizes(name, sizes)
    again = encoder_configs.sizes_from_config(
        json.loads(json.dumps(config)), json.loads(json.dumps(preprocessor))
    )
    assert again == (name, sizes)


@pytest.mark.parametrize("preset", ["dinov2_b", "mae_h", "siglip2_so400m", "dinov3_l"])
def test_published_config_json_gives_the_preset(preset):
    """With what the files state; the rest is the default of their classes."""
    published = {
        "dinov2_b": dict(model_type="dinov2_with_registers", image_size=518)
        | dict(patch_size=14),
        "mae_h": dict(model_type="vit_mae", hidden_size=1280, patch_size=14)
        | dict(num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120),
        "siglip2_so400m": dict(
            model_type="siglip",
            vision_config=dict(
                hidden_size=1152,
                image_size=256,
                intermediate_size=4304,
                num_attention_heads=16,
                num_hidden_layers=27,
            ),
        ),
        "dinov3_l": dict(model_type="dinov3_vit", hidden_size=1024, key_bias=False)
        | dict(num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        | dict(num_register_tokens=4),
    }
    block = encoders.PRESETS[preset]
    size = block["sizes"]["image_size"]
    crop = dict(crop_size=dict(height=size, width=size), size=dict(shortest_edge=256))
    name, sizes = encoder_configs.sizes_from_config(published[preset], crop)
    assert (name, sizes) == (block["name"], block["sizes"])


def test_input_size_without_a_preprocessor_fills_the_table():
    settings = dict(model_type="siglip_vision_model", image_size=384, patch_size=14)
    _, sizes = encoder_configs.sizes_from_config(settings)
    assert (sizes["image_size"], sizes["table_size"]) == (378, 384)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(model_type="dinov2_with_register"), "Did you mean 'dinov2_with_reg"),
        (dict(model_type="dinov2", qkv_bias=False), "qkv_bias=False, which our"),
        (dict(model_type="dinov3_vit", use_gated_mlp=True), "hidden_act 'gelu'"),
        (dict(model_type="vit_mae", hidden_act="relu"), "hidden_act 'relu'; choose"),
        (dict(model_type="vit_mae", image_size=[224, 192]), "is not square"),
    ],
)
def test_unusable_config_json(settings, message):
    with pytest.raises(ValueError, match=message):
        encoder_configs.sizes_from_config(settings)


def test_sizes_that_transformers_cannot_have():
    with pytest.raises(ValueError, match="cannot have intermediate_size 33"):
        encoder_configs.config_from_sizes(
            "dinov2", tiny_encoders.TINY | dict(intermediate_size=33)
        )
    with pytest.raises(ValueError, match="no class for the encoder 'dino'"):
        encoder_configs.config_from_sizes("dino", tiny_encoders.TINY)


# Files


@EVERY_GOLDEN
def test_conversion_and_back_is_bit_equal(golden, tmp_path):
    """Through our own layout, with what no parameter holds."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    tiny_encoders.load(golden, tiny_encoders.GOLDENS[golden]).save_pretrained(ours)
    again = vit_encoder.ViTEncoder.from_pretrained(ours)
    assert again.input_size == tiny_encoders.GOLDENS[golden]
    again.save_pretrained(back, layout="huggingface")
    original = encoder_names.canonical(
        sources.open_tensors(tiny_encoders.hf_folder(golden))
    )
    prefix = encoder_names.HUB_PREFIXES.get(again.name, "")
    written = tiny_encoders.stored(back)
    assert set(written) == {prefix + name for name in original.shapes}
    for name in original.shapes:
        np.testing.assert_array_equal(written[prefix + name], original.read(name))
    assert (
        vit_encoder.read_arguments(back)["table_size"] == again.arguments["table_size"]
    )


TIMM = ("dino", "mocov3")  # In no class of transformers.


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in TIMM])
def test_random_encoders_survive_both_layouts(name, tmp_path):
    changes = dict(table_size=40, layers=(0, 2)) | (
        dict(gated=True, intermediate_size=24) if name.startswith("dinov2") else {}
    )
    encoder = tiny_encoders.make(name, **changes)
    encoder.save_pretrained(tmp_path / "ours")
    encoder.save_pretrained(tmp_path / "hf", layout="huggingface")
    own = vit_encoder.ViTEncoder.from_pretrained(tmp_path / "ours")
    assert own.arguments == encoder.arguments
    foreign = vit_encoder.ViTEncoder.from_pretrained(tmp_path / "hf", layers=(0, 2))
    for other in (own, foreign):
        for key, value in tiny_encoders.parameters(encoder).items():
            np.testing.assert_array_equal(
                tiny_encoders.parameters(other)[key], value, key
            )
        assert other.layers == encoder.layers


def test_a_file_without_config_needs_name_and_sizes(tmp_path):
    """timm's DINO, under the names of Facebook's files, and its fused map."""
    encoder = tiny_encoders.make("dino")
    source, shapes = pretrained.parameters_of(encoder)
    table = encoder_names.table("dino", **tiny_encoders.TINY)
    arrays = dict(tables.to_foreign(table, source, shapes))
    assert arrays["blocks.2.attn.qkv.weight"].shape == (48, 16)
    np.savez(tmp_path / "dino.npz", **arrays)
    with pytest.raises(ValueError, match="Give name, image_size, patch_size"):
        vit_encoder.ViTEncoder.from_pretrained(tmp_path / "dino.npz")
    again = vit_encoder.ViTEncoder.from_pretrained(
        tmp_path / "dino.npz", name="dino", **tiny_encoders.TINY
    )
    for key, value in tiny_encoders.parameters(encoder).items():
        np.testing.assert_array_equal(tiny_encoders.parameters(again)[key], value, key)


def test_keys_of_dinov3_have_no_bias(tmp_path):
    """Ours is zero; an encoder that was trained on cannot be written without it."""
    encoder = encoders.make_encoder(
        "dinov3", rngs=nnx.Rngs(0), **(tiny_encoders.TINY | dict(depth=1))
    )
    bias = encoder.blocks.block.attn.qkv.bias
    assert not np.any(bias[:, 16:32]) and np.all(np.any(bias[:, :16], axis=1))
    bias[...] = bias[...].at[0, 20].set(0.1)
    with pytest.raises(ValueError, match=r"part \(1, 3\) of .*qkv.bias is not zero"):
        encoder.save_pretrained(tmp_path, layout="huggingface")
