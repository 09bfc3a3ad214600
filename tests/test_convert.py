"""`rae-jax convert`, and sampling and reconstructing with what it wrote.

Official weights are those of the golden files.
"""

import functools
import json

import golden_map
import networks
import numpy as np
import pytest
import weight_data

from rae_jax import main
from rae_jax.commands import convert
from rae_jax.convert import (
    critic_names,
    dit_names,
    sources,
    stats_files,
    tables,
    torch_files,
)
from rae_jax.models import conversion, inception, kinds, pretrained, rae

RAE_HEADS = ("encoder.num_heads=3", "decoder.num_heads=4")


def run(*argv):
    return main.main([str(word) for word in argv])


def converts(source, target, /, *settings, **flags):
    """Converts and must succeed; settings are KEY=VALUE, flags are options."""
    argv = ["convert", source, target]
    for text in settings:
        argv += ["--set", text]
    for name, value in flags.items():
        option = "--" + name.replace("_", "-")
        argv += [option] if value is True else [option, value]
    assert run(*argv) == 0


def refuses(capsys, source, target, *argv):
    """Must fail and write nothing; returns what it said."""
    before = sorted(target.parent.rglob("*"))
    capsys.readouterr()
    assert run("convert", source, target, *argv) == 1
    assert sorted(target.parent.rglob("*")) == before
    return capsys.readouterr().err


@pytest.fixture
def nested(tmp_path):
    """Writes dicts of arrays as a training checkpoint, under their keywords."""

    def write(**parts):
        storages, entries = {}, b""
        for part, arrays in parts.items():
            tensors = b""
            for name, array in arrays.items():
                key = str(len(storages))
                storages[key] = array
                ops = torch_files._tensor_ops(key, "FloatStorage", array.shape)
                tensors += torch_files._ops(name) + ops
            entries += torch_files._ops(part) + b"}(" + tensors + b"u"
        tree = b"\x80\x02}(" + torch_files._ops("epoch") + torch_files._ops(8)
        tree += entries + b"u."
        return weight_data.write_zip(tmp_path / "ep-last.pt", tree, storages)

    return write


def with_rotary(official, config):
    """Adds the buffers that the golden files leave out, moved by a rounding."""
    names = {"hidden_size", "depth", "num_heads", "input_size", "in_channels"}
    sizes = {k: v for k, v in config.items() if k in names}
    extras = dit_names.dit_dh_table(**sizes).extras
    return official | {e.name: e.make() + np.float32(1e-6) for e in extras}


def dit_dh_weights(case):
    arrays = golden_map.under(golden_map.read(f"dit_dh_{case}"), f"{case}/")
    official = golden_map.under(arrays, "params/")
    return with_rotary(official, golden_map.config(arrays, "config"))


def lpips_weights():
    """The golden trunk under the names of the package lpips."""
    arrays = golden_map.under(golden_map.read("lpips_vgg"), "reduced/params/")
    table = critic_names.lpips_table("vgg", "lpips")
    names = {e.path: e.name for e in table.entries}
    trunk = critic_names.lpips_table("vgg", "torchvision").entries
    constants = {e.name: e.make() + np.float32(1e-6) for e in table.extras if e.make}
    return {names[e.path]: arrays[e.name] for e in trunk} | constants


OFFICIAL = {
    "dit_dh": (lambda: dit_dh_weights("base"), ()),
    "dit": (
        lambda: golden_map.under(golden_map.read("dit"), "base/params/"),
        ("num_heads=3", "use_rope=False"),
    ),
    "decoder": (
        lambda: golden_map.under(golden_map.read("decoder"), "params/"),
        ("num_heads=4",),
    ),
    "discriminator": (
        lambda: golden_map.under(
            golden_map.read("discriminator"), "gn_nosn_ks3/params/"
        ),
        ("norm_groups=32",),
    ),
    "lpips": (lpips_weights, ()),
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_official_files_and_back(kind, tmp_path, capsys):
    """The kind is guessed; bits, and what no parameter holds, come back."""
    weights, settings = OFFICIAL[kind]
    source = networks.write_pt(tmp_path / "model.pt", weights(), step=3)
    converts(source, tmp_path / "ours", *settings)
    printed = capsys.readouterr().out
    assert f"{kind} in layout official" in printed and "left out: step = 3" in printed
    settings = pretrained.read_config(tmp_path / "ours")
    assert settings["class"] == kinds.KINDS[kind].classes[0].__name__
    converts(tmp_path / "ours", tmp_path / "back.safetensors")
    networks.assert_same_file(tmp_path / "back.safetensors", source)


def test_inception_of_the_ports(tmp_path):
    """A batch norm's counter keeps its type; values are zero to save time."""
    _, shapes = conversion.structure(inception.InceptionV3, {})
    table = critic_names.inception_table()
    weights = {
        e.name: np.zeros(tables.foreign_shape(e, shapes), np.float32)
        for e in table.entries
    }
    weights |= {e.name: np.array(7) for e in table.extras}
    source = networks.write_pt(tmp_path / "pt_inception.pth", weights)
    converts(source, tmp_path / "ours")
    converts(tmp_path / "ours", tmp_path / "back.pth", target="official")
    networks.assert_same_file(tmp_path / "back.pth", source)


def test_critic_inside_a_checkpoint(tmp_path, nested):
    weights = golden_map.read("discriminator")
    heads = golden_map.under(weights, "bn_sn_ks9/params/")
    path = nested(model={"w": np.ones(2, np.float32)}, disc=heads)
    converts(path, tmp_path / "ours", kind="discriminator")
    converts(tmp_path / "ours", tmp_path / "disc.pt")
    networks.assert_same_file(
        tmp_path / "disc.pt", networks.write_pt(tmp_path / "heads.pt", heads)
    )
    converts(path, tmp_path / "again", part="disc")  # Its kind is guessed.


def test_lpips_of_a_trunk_and_its_heads(tmp_path, capsys):
    arrays = golden_map.under(golden_map.read("lpips_vgg"), "reduced/params/")
    heads = {k: v for k, v in arrays.items() if k.startswith("lin")}
    trunk = {k: v for k, v in arrays.items() if k not in heads}
    trunk["classifier.0.weight"] = np.ones((2, 2), np.float32)
    trunk = networks.write_pt(tmp_path / "vgg16.pth", trunk)
    assert "heads=vgg.pth" in refuses(capsys, trunk, tmp_path / "ours")
    heads = networks.write_pt(tmp_path / "heads.pth", heads)
    converts(trunk, tmp_path / "ours", f"heads={heads}")
    converts(tmp_path / "ours", tmp_path / "whole.pt")
    whole = sources.open_tensors(tmp_path / "whole.pt")
    assert set(whole.shapes) == set(lpips_weights())
    for name, value in lpips_weights().items():
        atol = 2e-6 if name.startswith("scaling") else 0  # Made anew.
        np.testing.assert_allclose(whole.read(name), value, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["dinov2", "mae", "siglip2"])
def test_encoders_of_huggingface_and_back(family, tmp_path):
    """Other networks in the folder are left out, pooling heads carried along."""
    folder = golden_map.FOLDER / f"hf_{family}"
    converts(folder, tmp_path / "ours")
    converts(tmp_path / "ours", tmp_path / "back", target="huggingface")
    stored = sources.open_tensors(folder)
    back = sources.open_tensors(tmp_path / "back")
    assert len(back.shapes) > 30
    names = {name: name for name in stored.shapes}
    names |= {name.split(".", 1)[1]: name for name in names if name[:4] == "vit."}
    for name in back.shapes:
        np.testing.assert_array_equal(back.read(name), stored.read(names[name]))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    stored = json.loads((folder / "config.json").read_text())
    stored = stored.get("vision_config", stored)
    same = [k for k in config if k in stored and k not in ("architectures", "dtype")]
    assert len(same) > 5 and all(config[k] == stored[k] for k in same)


@functools.cache
def rae_weights(family):
    arrays = golden_map.read(f"rae_encode_{family}")
    return golden_map.under(arrays, "params/"), arrays["stats/var"]


@pytest.fixture
def checkpoint(tmp_path, nested):
    """An official stage-1 checkpoint and its statistics, whose mean is None."""
    official, var = rae_weights("dinov2")
    zeros = {name: np.zeros_like(value) for name, value in official.items()}
    ema = {f"module.{name}": value for name, value in official.items()}
    path = nested(model=zeros, ema=ema)
    return path, networks.write_pt(tmp_path / "stat.pt", {"var": var}, mean=None)


def test_autoencoders_from_checkpoints_and_back(tmp_path, checkpoint):
    """EMA weights by default; the statistics come to lie beside the file."""
    source, stats = checkpoint
    converts(source, tmp_path / "ours", *RAE_HEADS, f"latent_stats={stats}")
    converts(tmp_path / "ours", tmp_path / "to" / "rae.pt")
    official = networks.write_pt(tmp_path / "flat.pt", rae_weights("dinov2")[0])
    networks.assert_same_file(tmp_path / "to" / "rae.pt", official)
    networks.assert_same_file(tmp_path / "to" / "stat.pt", stats)
    converts(source, tmp_path / "zeros", *RAE_HEADS, part="model")
    zeros = sources.open_tensors(tmp_path / "zeros")
    assert not zeros.read("decoder.pred.kernel").any()

    converts(source, tmp_path / "decoder.pt", "num_heads=4", kind="decoder")
    decoder = golden_map.under(rae_weights("dinov2")[0], "decoder.")
    expected = networks.write_pt(tmp_path / "expected.pt", decoder)
    networks.assert_same_file(tmp_path / "decoder.pt", expected)


def test_diffusers_and_back(tmp_path, capsys):
    """Our folder, diffusers' and back: all bits, and deviations stay deviations."""
    model = networks.drawn(
        rae.RAE,
        encoder=networks.network("ViTEncoder", networks.ENCODER),
        decoder=networks.network("RAEDecoder", networks.DECODER),
        latent_shape=(4, 4, 64),
        normalization="deviation",
    )
    model.save_pretrained(tmp_path / "ours")
    argv = ("--target", "diffusers")
    said = refuses(capsys, tmp_path / "ours", tmp_path / "diffusers", *argv)
    assert "fixed position table" in said
    flags = dict(target="diffusers", allow_fixed_table=True)
    converts(tmp_path / "ours", tmp_path / "diffusers", **flags)
    settings = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    assert settings["_class_name"] == "AutoencoderRAE"
    capsys.readouterr()
    converts(tmp_path / "diffusers", tmp_path / "again", source="diffusers")
    assert "autoencoder in layout diffusers" in capsys.readouterr().out
    ours, again = (sources.open_tensors(tmp_path / n) for n in ("ours", "again"))
    for name in ours.shapes:
        if name != "decoder.pos_embed":
            np.testing.assert_array_equal(again.read(name), ours.read(name), name)
    converts(tmp_path / "again", tmp_path / "second", target="diffusers")
    networks.assert_same_file(tmp_path / "second", tmp_path / "diffusers")


@pytest.mark.parametrize("has_mean", [True, False])
def test_latent_statistics_and_back(tmp_path, has_mean, capsys):
    arrays = {"var": rae_weights("mae")[1]}
    values = {} if has_mean else {"mean": None}
    if has_mean:
        arrays["mean"] = arrays["var"] * 2
    source = networks.write_pt(tmp_path / "stat.pt", arrays, **values)
    converts(source, tmp_path / "ours")
    found = stats_files.read_stats(tmp_path / "ours")
    np.testing.assert_array_equal(found.var, np.moveaxis(arrays["var"], 0, -1))
    assert (found.mean is not None) == has_mean
    converts(tmp_path / "ours" / "latent_stats.npz", tmp_path / "back.pt")
    networks.assert_same_file(tmp_path / "back.pt", source)
    assert "latent_stats in layout rae_jax" in capsys.readouterr().out
    said = refuses(capsys, source, tmp_path / "a.npz", "--target", "official")
    assert "end in .pt, not '.npz'" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_types(tmp_path, dtype, capsys):
    """Parameters are rounded once; extras keep their bits; too large is an error."""
    weights = dit_dh_weights("guide")
    source = networks.write_pt(tmp_path / "model.pt", weights)
    converts(source, tmp_path / "ours", dtype=dtype)
    ours = sources.open_tensors(tmp_path / "ours")
    kernel = ours.read("final_layer.linear.kernel")
    expected = weights["final_layer.linear.weight"].T.astype(kernel.dtype)
    assert str(kernel.dtype) == dtype
    np.testing.assert_array_equal(kernel, expected)
    converts(tmp_path / "ours", tmp_path / "back.pt", dtype=dtype)
    converts(tmp_path / "back.pt", tmp_path / "again", dtype=dtype)
    networks.assert_same_file(tmp_path / "again", tmp_path / "ours")

    weights["final_layer.linear.bias"][3] = np.finfo(np.float32).max  # Rounds up.
    source = networks.write_pt(tmp_path / "large.pt", weights)
    said = refuses(capsys, source, tmp_path / "new", "--dtype", dtype)
    assert "final_layer.linear.bias" in said and "not finite" in said


# What must not be converted


def test_what_does_not_fit_is_listed_and_nothing_written(tmp_path, capsys):
    weights = dit_dh_weights("guide")
    del weights["blocks.1.attn.proj.bias"]
    weights["blocks.0.norm1.weight"] = np.ones(3, np.float32)
    weights["blocks.0.attn.surplus"] = np.ones(3, np.float32)
    path = networks.write_pt(tmp_path / "bad.pt", weights)
    said = refuses(capsys, path, tmp_path / "new")
    assert str(path) in said
    assert "missing: blocks.1.attn.proj.bias" in said
    assert "unexpected: blocks.0.attn.surplus" in said
    assert "shape: blocks.0.norm1.weight is (3,), expected (32,)" in said

    weights = dit_dh_weights("guide")
    weights["dec_feat_rope.freqs_cos"] = weights["dec_feat_rope.freqs_sin"]
    path = networks.write_pt(tmp_path / "bad.pt", weights)
    assert "dec_feat_rope.freqs_cos" in refuses(capsys, path, tmp_path / "new")


def test_damaged_and_foreign_files(tmp_path, capsys):
    path = networks.write_pt(tmp_path / "model.pt", dit_dh_weights("guide"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    said = refuses(capsys, path, tmp_path / "new")
    assert str(path) in said and "truncated" in said
    path.write_text("<!doctype html>")
    assert "web page" in refuses(capsys, path, tmp_path / "new")
    networks.write_pt(path, {"conv.weight": np.ones(3, np.float32)})
    said = refuses(capsys, path, tmp_path / "new")
    assert "conv.weight" in said and "--kind" in said
    said = refuses(capsys, tmp_path / "absent.pt", tmp_path / "new")
    assert "no file or folder" in said


def test_wrong_kinds_layouts_and_targets(tmp_path, capsys):
    path = networks.write_pt(tmp_path / "model.pt", dit_dh_weights("guide"))
    new = tmp_path / "new"
    assert "decoder_embed.weight" in refuses(capsys, path, new, "--kind", "decoder")
    assert "not diffusers" in refuses(capsys, path, new, "--source", "diffusers")
    said = refuses(capsys, path, new, "--target", "huggingface")
    assert "layout of DiTDH 'huggingface'" in said and "official" in said
    said = refuses(capsys, path, new, "--allow-fixed-table")
    assert "goes with --target diffusers" in said
    assert "KEY=VALUE" in refuses(capsys, path, new, "--set", "num_heads")
    assert "no part 'best'" in refuses(capsys, path, new, "--part", "best")

    converts(path, new)
    assert "exists. Give --force" in refuses(capsys, path, new)
    converts(path, new, force=True)
    assert "of the kind 'dit_dh'" in refuses(
        capsys, new, tmp_path / "x.pt", "--kind", "dit"
    )
    assert "Give --target" in refuses(capsys, new, tmp_path / "folder")
    wrong = refuses(capsys, new, tmp_path / "x.pt", "--set", "num_clases=3")
    assert "num_clases" in wrong
    assert not list(tmp_path.glob(".*"))


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    path = networks.write_pt(tmp_path / "model.pt", dit_dh_weights("base"))
    converts(path, tmp_path / "new", dry_run=True)
    out = capsys.readouterr().out
    assert "blocks.{0..2}.attn.qkv.weight" in out and "blocks.block.attn.qkv" in out
    assert "enc_feat_rope.freqs_cos" in out and "carried along" in out
    assert "Nothing was written" in out and not (tmp_path / "new").exists()


def test_a_file_beside_another_is_not_replaced(tmp_path, capsys, checkpoint):
    """Statistics would come to lie on those that are there."""
    source, stats = checkpoint
    converts(source, tmp_path / "ours", *RAE_HEADS, f"latent_stats={stats}")
    said = refuses(capsys, tmp_path / "ours", tmp_path / "rae.pt")
    assert "stat.pt exists" in said
    converts(tmp_path / "ours", tmp_path / "rae.pt", force=True)


def test_settings():
    texts = ["num_heads=6,16", "encoder.num_heads=3", "name=dino", "use_rope=false"]
    assert convert.parse_settings(texts) == {
        "num_heads": (6, 16),
        "encoder": {"num_heads": 3},
        "name": "dino",
        "use_rope": False,
    }
