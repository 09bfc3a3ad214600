"""Whole autoencoders: official checkpoints, parts, diffusers folders, statistics.

Weights are those of the golden files, whose outputs the loaded networks must give.
"""

import functools
import json

import golden_map
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from rae_jax.convert import (
    diffusers_names,
    hub,
    published,
    rae_names,
    safetensor_files,
    sources,
    stats_files,
)
from rae_jax.layers import positions
from rae_jax.models import decoder, dit_dh, pretrained, rae, vit_encoder

HEADS = dict(encoder=dict(num_heads=3), decoder=dict(num_heads=4))


def close(actual, desired, atol):
    """Compares channels-last with channels-first."""
    desired = golden_map.last(desired)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


@functools.cache
def golden_rae(family):
    """Returns official weights and statistics, a batch that is not resized, all."""
    arrays = golden_map.read(f"rae_encode_{family}")
    official = golden_map.under(arrays, "params/")
    config = golden_map.config(arrays, "config")
    return official, f"x{config['encoder_input_size']}", arrays


@pytest.mark.parametrize("family", ["dinov2", "siglip2", "mae"])
def test_official_autoencoder(family, tmp_path):
    """With statistics whose mean is None, and back to the same two files."""
    official, name, arrays = golden_rae(family)
    path = networks.write_pt(tmp_path / "ep-last.pt", official)
    stats = networks.write_pt(
        tmp_path / "stat.pt", {"var": arrays["stats/var"]}, mean=None
    )
    model = rae.RAE.from_pretrained(path, latent_stats=stats, **HEADS)

    images = golden_map.last(arrays[f"images/{name}"])
    z = networks.encode(model, images)
    scale = np.sqrt(golden_map.last(arrays["stats/var"][None]) + 1e-5)
    desired = golden_map.last(arrays[f"var/{name}/z"]) * scale
    np.testing.assert_allclose(z * scale, desired, rtol=0, atol=1e-5)
    resized = next(
        k.split("/")[1] for k in arrays if k.startswith("var/x") and "recon" in k
    )
    out = networks.decode(model, golden_map.last(arrays[f"var/{resized}/z"]))
    close(out, arrays[f"var/{resized}/recon"], 1e-5)

    model.save_pretrained(tmp_path / "ours")
    again = rae.RAE.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "official", layout="official")
    networks.assert_same_file(tmp_path / "official" / "model.pt", path)
    networks.assert_same_file(tmp_path / "official" / "stat.pt", stats)
    assert (
        sources.open_tensors(tmp_path / "official" / "stat.pt").values["mean"] is None
    )


@pytest.mark.parametrize("family", ["dinov2", "siglip2", "mae"])
def test_autoencoder_from_parts(family, tmp_path):
    """An encoder of Hugging Face, an official decoder, no statistics: raw latents."""
    official, name, arrays = golden_rae(family)
    path = networks.write_pt(
        tmp_path / "model.pt", golden_map.under(official, "decoder.")
    )
    folder = golden_map.FOLDER / f"hf_{family}"
    net = decoder.RAEDecoder.from_pretrained(path, num_heads=4)
    model = rae.RAE.from_parts(folder, net, encoder_input_size=int(name[1:]))
    z = networks.encode(model, golden_map.last(arrays[f"images/{name}"]))
    close(z, arrays[f"nostats/{name}/z"], 1e-5)
    model.save_pretrained(tmp_path / "official", layout="official")
    networks.assert_same_file(
        tmp_path / "official", networks.write_pt(tmp_path / "whole.pt", official)
    )
    assert not (tmp_path / "official" / "stat.pt").exists()

    wrong = networks.drawn(decoder.RAEDecoder, **networks.DECODER)
    with pytest.raises(ValueError, match="latents of 64 channels"):
        rae.RAE.from_parts(folder, wrong)


def tiny_rae(**options):
    """An RAE that diffusers can build but for the decoder's positions."""
    return networks.drawn(
        rae.RAE,
        encoder=networks.network("ViTEncoder", networks.ENCODER),
        decoder=networks.network("RAEDecoder", networks.DECODER),
        latent_shape=(4, 4, 64),
        **options,
    )


@pytest.mark.parametrize("normalization", ["variance", "deviation"])
def test_diffusers_round_trip(normalization, tmp_path):
    model = tiny_rae(normalization=normalization, scaling_factor=0.7)
    with pytest.raises(ValueError, match="allow_fixed_table"):
        model.save_pretrained(tmp_path / "d", layout="diffusers")
    assert not (tmp_path / "d").exists()
    model.decoder.pos_embed[...] = jnp.asarray(diffusers_names.fixed_table(32, 4))
    model.save_pretrained(tmp_path / "d", layout="diffusers")
    again = rae.RAE.from_pretrained(tmp_path / "d")
    assert again.arguments["normalization"] == "deviation"
    assert again.arguments["scaling_factor"] == 0.7
    images = jax.random.uniform(jax.random.key(3), (1, 56, 56, 3))
    z = networks.encode(model, images)
    np.testing.assert_allclose(networks.encode(again, images), z, rtol=1e-5, atol=1e-5)
    out = networks.decode(model, z)
    np.testing.assert_allclose(networks.decode(again, z), out, rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "e", layout="diffusers")
    networks.assert_same_file(tmp_path / "e", tmp_path / "d")
    read = pretrained.read_config
    assert read(tmp_path / "e") == read(tmp_path / "d")


def test_diffusers_table_is_the_official_one_on_a_grid_of_16_only():
    official = np.pad(positions.sincos_2d(48, 16), ((1, 0), (0, 0)))
    table = diffusers_names.fixed_table(48, 16)[0]
    np.testing.assert_allclose(table, official, rtol=0, atol=1e-7)
    difference = diffusers_names.fixed_table(48, 32)[0, 1:] - positions.sincos_2d(
        48, 32
    )
    assert np.abs(difference).max() > 1


def test_diffusers_ignores_a_stored_position_table(tmp_path):
    """As diffusers does; the stored one is kept for the way back."""
    model = tiny_rae(normalization="deviation")
    table = np.asarray(model.decoder.pos_embed[...])
    model.save_pretrained(tmp_path / "d", layout="diffusers", allow_fixed_table=True)
    source = sources.open_tensors(tmp_path / "d")
    arrays = {name: source.read(name) for name in source.shapes}
    assert "decoder.decoder_pos_embed" not in arrays
    arrays["decoder.decoder_pos_embed"] = table
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    file = tmp_path / "d" / diffusers_names.WEIGHTS_NAME
    safetensor_files.write_safetensors(file, arrays.items(), specs)
    with pytest.warns(UserWarning, match="It is ignored, as diffusers does"):
        again = rae.RAE.from_pretrained(tmp_path / "d")
    fixed = diffusers_names.fixed_table(32, 4)
    np.testing.assert_array_equal(again.decoder.pos_embed[...], fixed)
    again.save_pretrained(tmp_path / "e", layout="diffusers")
    networks.assert_same_file(tmp_path / "e", file)


def test_layouts_that_cannot_hold_a_network_are_refused(tmp_path):
    model = tiny_rae(scaling_factor=0.5)
    with pytest.raises(ValueError, match="scaling_factor"):
        model.save_pretrained(tmp_path / "x", layout="official")
    with pytest.raises(ValueError, match="Choose from: rae_jax, official, diffusers"):
        model.save_pretrained(tmp_path / "x", layout="offical")
    mae = dict(name="mae", num_heads=2, intermediate_size=64, table_size=None)
    mae = networks.drawn(vit_encoder.ViTEncoder, **networks.ENCODER | mae)
    model = rae.RAE(mae, model.decoder, (4, 4, 64))
    with pytest.raises(ValueError, match=r"2 encoder heads.*MLP of 64.*for 56 pixels"):
        model.save_pretrained(tmp_path / "x", "diffusers", allow_fixed_table=True)
    assert not (tmp_path / "x").exists()


def test_overrides_reach_inner_networks(tmp_path):
    tiny_rae().save_pretrained(tmp_path)
    model = rae.RAE.from_pretrained(
        tmp_path, dtype=jnp.bfloat16, encoder=dict(remat="none"), eps=1e-3
    )
    encoder, net = (model.arguments[k]["arguments"] for k in ("encoder", "decoder"))
    assert (encoder["dtype"], encoder["remat"]) == ("bfloat16", "none")
    assert (net["dtype"], net["remat"], model.eps) == ("bfloat16", "full", 1e-3)
    assert model.decoder.pred.dtype == jnp.bfloat16
    assert model.decoder.pred.kernel.dtype == jnp.float32


@pytest.mark.parametrize("has_mean", [True, False])
def test_latent_statistics(has_mean, tmp_path):
    """Official -> ours -> official, to the bit."""
    values = np.random.default_rng(0).random((2, 6, 4, 4), np.float32)
    arrays = {"mean": values[0], "var": values[1]}
    if not has_mean:
        del arrays["mean"]
    nothing = {} if has_mean else {"mean": None}
    first = networks.write_pt(tmp_path / "stat.pt", arrays, **nothing)
    stats = stats_files.read_stats(first)
    assert stats.var.shape == (4, 4, 6)
    assert stats.var[1, 2, 3] == values[1, 3, 1, 2]
    assert (stats.mean is not None) == has_mean
    stats_files.write_stats(tmp_path / stats_files.OWN_NAME, stats)
    with np.load(tmp_path / stats_files.OWN_NAME) as own:
        np.testing.assert_array_equal(own["mean"], stats.arrays()["mean"])
    ours = stats_files.read_stats(tmp_path)  # Prefers our file.
    stats_files.write_stats(tmp_path / "again.pt", ours)
    networks.assert_same_file(tmp_path / "again.pt", first)
    values = [sources.open_tensors(f).values for f in (tmp_path / "again.pt", first)]
    assert values[0] == values[1]


def test_other_files_are_no_statistics(tmp_path):
    path = networks.write_pt(tmp_path / "model.pt", {"weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="no file of latent statistics"):
        stats_files.read_stats(path)
    with pytest.raises(FileNotFoundError, match="holds no latent_stats.npz"):
        stats_files.read_stats(tmp_path)
    stats = stats_files.LatentStats(None, np.ones((2, 2, 3), np.float32))
    stats_files.write_stats(tmp_path / "stat.pt", stats)
    net = decoder.RAEDecoder(64, 16, 4, 32, 1, 2, 64, rngs=nnx.Rngs(1))
    with pytest.raises(
        ValueError, match=r"\(2, 2, 3\), these latents are \(4, 4, 64\)"
    ):
        rae.RAE.from_parts(tiny_rae().encoder, net, latent_stats=tmp_path / "stat.pt")


def test_published_names_lead_to_their_files(monkeypatch, tmp_path):
    """Every file that a short name stands for is asked of the hub."""
    asked = []

    def locate(source, *, allow):
        asked.append(str(source))
        raise FileNotFoundError(source)

    monkeypatch.setattr(hub, "locate", locate)
    for name, source in published.SOURCES.items():
        cls = dit_dh.DiTDH if name.startswith("dit") else rae.RAE
        with pytest.raises(FileNotFoundError):
            cls.from_pretrained(name)
        assert asked.pop() == source
    official, name, arrays = golden_rae("dinov2")
    files = {
        "facebook/dinov2-with-registers-base": golden_map.FOLDER / "hf_dinov2",
        "decoders/dinov2/wReg_base/ViTXL_n08/model.pt": networks.write_pt(
            tmp_path / "model.pt", golden_map.under(official, "decoder.")
        ),
        "stats/dinov2/wReg_base/imagenet1k/stat.pt": networks.write_pt(
            tmp_path / "stat.pt", {"var": arrays["stats/var"]}, mean=None
        ),
    }

    def found(source, *, allow):
        return files.get(str(source).split(":")[-1], source)

    monkeypatch.setattr(hub, "locate", found)
    monkeypatch.setitem(rae_names.DECODER_HEADS, (48, 1), 4)
    model = rae.RAE.from_pretrained("rae-dinov2-b", encoder_input_size=int(name[1:]))
    z = networks.encode(model, golden_map.last(arrays[f"images/{name}"]))
    desired = arrays[f"var/{name}/z"]
    close(z, desired, 1e-4 * np.abs(desired).max())


def test_our_configs_are_json_that_names_class_and_arguments(tmp_path):
    tiny_rae().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["class"] == "RAE"
    assert settings["arguments"]["encoder"]["class"] == "ViTEncoder"
    names = sources.open_tensors(tmp_path).shapes
    assert "decoder.blocks.block.attn.qkv.kernel" in names
