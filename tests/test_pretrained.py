"""Loading and saving of networks in our own, the official and diffusers' layout.

Weights are those of the golden files, whose outputs the loaded networks must give.
"""

import functools
import subprocess
import sys

import golden_map
import jax
import networks
import numpy as np
import pytest
from flax import nnx

import rae_jax
from rae_jax.convert import (
    dit_names,
    rae_names,
    sources,
)
from rae_jax.models import decoder, dit, dit_dh, encoders, pretrained, rae


def close(actual, desired, atol):
    """Compares channels-last with channels-first."""
    desired = golden_map.last(desired)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def rotary_buffers(head_dim, grid):
    """The official float32 tables, moved by more than a rounding."""
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    angles = np.repeat(np.float32(10000) ** -exponents, 2)[None, :]
    angles = np.arange(grid, dtype=np.float32)[:, None] * angles
    rows = np.broadcast_to(angles[:, None], (grid, grid, half))
    columns = np.broadcast_to(angles[None], (grid, grid, half))
    angles = np.concatenate([rows, columns], -1).reshape(grid**2, head_dim)
    return {"cos": np.cos(angles) + np.float32(1e-6), "sin": np.sin(angles)}


@functools.cache
def golden_dit(family, case):
    """Returns class, file content and other arrays of a case."""
    name = f"dit_dh_{case}" if family == "dit_dh" else "dit"
    arrays = golden_map.under(golden_map.read(name), f"{case}/")
    config = golden_map.config(arrays, "config")
    official = golden_map.under(arrays, "params/")
    names = {"dit": ["feat"], "dit_dh": ["enc_feat", "dec_feat"]}[family]
    widths, heads = (np.ravel(config[k]) for k in ("hidden_size", "num_heads"))
    grid = config["input_size"] // config["patch_size"]
    for name, width, count in zip(names, widths, heads, strict=True):
        for kind, table in rotary_buffers(int(width // count), grid).items():
            if config["use_rope"]:
                official[f"{name}_rope.freqs_{kind}"] = table
    return official, arrays, config


DIT_CASES = [("dit_dh", c) for c in ("base", "qknorm", "same_width", "layernorm_gelu")]
DIT_CASES += [("dit", c) for c in ("base", "qknorm")]
DIT_CASES += [("dit", "patch2_layernorm_gelu_learn_sigma_norope")]
CLASSES = {"dit": dit.DiT, "dit_dh": dit_dh.DiTDH}


@pytest.mark.parametrize("family, case", DIT_CASES)
def test_diffusion_transformers(family, case, tmp_path):
    """Official -> ours -> official: golden output, and the same file to the bit."""
    cls = CLASSES[family]
    official, arrays, config = golden_dit(family, case)
    path = networks.write_pt(tmp_path / "stage2_model.pt", official)
    untold = {}
    if case == "same_width":
        with pytest.raises(ValueError, match="both 48 wide"):
            cls.from_pretrained(path)
        untold = {"depth": tuple(config["depth"])}
    if not config["use_rope"]:
        with pytest.raises(ValueError, match="num_heads"):
            cls.from_pretrained(path)
        untold = {"num_heads": config["num_heads"]}
    model = cls.from_pretrained(path, remat="none", **untold)
    assert model.arguments["remat"] == "none"
    for name in ("hidden_size", "depth", "num_heads", "mlp_ratio", "input_size"):
        assert model.arguments[name] == config[name], name

    x_t = golden_map.last(arrays["x"])
    out = networks.call(model, x_t, arrays["t"], arrays["y"])
    close(out, arrays["out"], 1e-5)

    model.save_pretrained(tmp_path / "official", layout="official")
    networks.assert_same_file(tmp_path / "official", path)
    model.save_pretrained(tmp_path / "ours")
    again = cls.from_pretrained(tmp_path / "ours")
    assert again.arguments == model.arguments
    assert nnx.graphdef(again) == nnx.graphdef(model)
    again.save_pretrained(tmp_path / "again", layout="official")
    networks.assert_same_file(tmp_path / "again", path)


def test_entries_are_in_the_order_of_the_official_parameters():
    for family, case in [("dit_dh", "base"), ("dit", "base")]:
        official, _, config = golden_dit(family, case)
        make = getattr(dit_names, f"{family}_table")
        names = [entry.name for entry in make(**config).entries]
        assert names == [name for name in official if "freqs" not in name]
    official = golden_map.under(golden_map.read("decoder"), "params/")
    names = [entry.name for entry in rae_names.decoder_table(depth=3).entries]
    assert names == list(official)


def test_buffers_are_made_where_a_network_is_new(tmp_path):
    """A network of ours has no buffers; the official layout gets them all the same."""
    official, _, config = golden_dit("dit_dh", "base")
    keys = ("input_size", "in_channels", "hidden_size", "depth", "num_heads")
    sizes = {key: config[key] for key in (*keys, "num_classes")}
    model = networks.drawn(dit_dh.DiTDH, **sizes)
    model.save_pretrained(tmp_path, layout="official")
    written = sources.open_tensors(tmp_path)
    assert written.shapes == {name: x.shape for name, x in official.items()}
    for name in ("enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"):
        np.testing.assert_allclose(written.read(name), official[name], atol=5e-6)


@functools.cache
def golden_decoder():
    arrays = golden_map.read("decoder")
    return golden_map.under(arrays, "params/"), arrays


def test_decoder(tmp_path):
    official, arrays = golden_decoder()
    path = networks.write_pt(tmp_path / "model.pt", official)
    with pytest.raises(ValueError, match="Give num_heads"):
        decoder.RAEDecoder.from_pretrained(path)
    model = decoder.RAEDecoder.from_pretrained(path, num_heads=4)
    out = networks.call(model, arrays["n16/tokens"])
    close(out, arrays["n16/image"], 1e-5)
    model.save_pretrained(tmp_path / "official", layout="official")
    networks.assert_same_file(tmp_path / "official", path)


def test_known_heads_are_those_of_the_presets():
    for sizes in decoder.PRESETS.values():
        key = (sizes["hidden_size"], sizes["depth"])
        assert rae_names.DECODER_HEADS[key] == sizes["num_heads"]
    for preset in encoders.PRESETS.values():
        sizes = preset["sizes"]
        assert rae_names.ENCODER_HEADS[sizes["hidden_size"]] == sizes["num_heads"]


def test_wrong_tensors_are_listed_together(tmp_path):
    official = dict(golden_decoder()[0])
    del official["decoder_norm.bias"]
    official["surplus"] = np.zeros(3, np.float32)
    name = "decoder_layers.1.output.dense.weight"
    official[name] = official[name][:, :-1]
    path = networks.write_pt(tmp_path / "model.pt", official)
    with pytest.raises(ValueError) as error:
        decoder.RAEDecoder.from_pretrained(path, num_heads=4)
    message = str(error.value)
    assert (
        f"missing: decoder_norm.bias\n  unexpected: surplus\n  shape: {name}" in message
    )
    assert str(path) in message


def test_values_that_are_not_finite_are_refused(tmp_path):
    official = dict(golden_decoder()[0])
    bias = official["decoder_layers.2.intermediate.dense.bias"].copy()
    bias[3] = np.nan
    official["decoder_layers.2.intermediate.dense.bias"] = bias
    path = networks.write_pt(tmp_path / "model.pt", official)
    with pytest.raises(
        ValueError, match="blocks.block.mlp.fc1.bias are not all finite"
    ):
        decoder.RAEDecoder.from_pretrained(path, num_heads=4)


def test_rotary_tables_of_another_kind_are_refused(tmp_path):
    official = dict(golden_dit("dit_dh", "base")[0])
    table = official["enc_feat_rope.freqs_sin"]
    official["enc_feat_rope.freqs_sin"] = np.roll(table, 8, axis=1)
    path = networks.write_pt(tmp_path / "model.pt", official)
    with pytest.raises(ValueError, match="enc_feat_rope.freqs_sin is not the table"):
        dit_dh.DiTDH.from_pretrained(path)


def test_a_folder_of_another_class_is_refused(tmp_path):
    networks.drawn(decoder.RAEDecoder, **networks.DECODER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RAEDecoder.from_pretrained, not DiTDH's"):
        dit_dh.DiTDH.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="none of the published"):
        decoder.RAEDecoder.from_pretrained(
            networks.write_pt(tmp_path / "x.pt", golden_decoder()[0])
        )


def test_records_do_not_disturb_transformations():
    """Networks of the same making are one to `jit`, and those of equal files are."""
    sizes = dict(input_size=4, in_channels=6, hidden_size=8, depth=1, num_heads=2)
    model = networks.drawn(dit.DiT, **sizes)
    abstract = nnx.eval_shape(lambda: dit.DiT(**sizes, rngs=nnx.Rngs(0)))
    assert hash(nnx.graphdef(model)) == hash(nnx.graphdef(abstract))
    assert nnx.graphdef(model) == nnx.graphdef(abstract)
    a = pretrained.Carried({"x": np.arange(3)})
    assert a == pretrained.Carried({"x": np.arange(3)})
    assert a != pretrained.Carried({"x": np.arange(3, dtype=np.int32)})
    compiled = jax.jit(lambda m, x: m.carried.arrays["x"][0] + x)
    for _ in range(2):
        model.carried = pretrained.Carried({"x": np.arange(3)})
        compiled(model, 1.0)
    assert compiled._cache_size() == 1


def test_networks_of_the_caller_cannot_be_saved(tmp_path):
    class Encoder(nnx.Module):
        input_size, patch_size, hidden_size = 16, 4, 64

    net = networks.drawn(decoder.RAEDecoder, **networks.DECODER)
    model = rae.RAE(Encoder(), net, (4, 4, 64))
    with pytest.raises(ValueError, match="Derive that object from Pretrained"):
        model.save_pretrained(tmp_path / "x")


def test_classes_are_importable_without_jax_being_imported_before():
    code = (
        "import sys, rae_jax; assert 'jax' not in sys.modules; "
        "from rae_jax import RAE, DiTDH; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in rae_jax.__all__:
        assert getattr(rae_jax, name).__name__ == name
        assert name in dir(rae_jax)
    with pytest.raises(AttributeError, match="no attribute 'Rae'"):
        _ = rae_jax.Rae
