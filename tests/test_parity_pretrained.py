"""Autoencoders against diffusers and files against torch, with random weights.

diffusers resizes in float32, where torch's own source coordinates cost about 2e-5 of
the latents; images of the encoder's size show that nothing else does.
"""

import re

import golden_map
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from rae_jax.convert import diffusers_names, safetensor_files, sources
from rae_jax.models import decoder, dit_dh, rae

pytestmark = pytest.mark.parity

KINDS = ["dinov2", "mae", "siglip2"]
# From transformers 5, which writes the files here, to 4.
OLD_NAMES = {
    "mae": [
        (
            r"^encoder\.layers\.(\d+)\.mlp\.fc1",
            r"encoder.encoder.layer.\1.intermediate.dense",
        ),
        (
            r"^encoder\.layers\.(\d+)\.mlp\.fc2",
            r"encoder.encoder.layer.\1.output.dense",
        ),
        (r"^encoder\.layers\.", "encoder.encoder.layer."),
    ],
    "dinov2": [],
    "siglip2": [],
}
OLD_ATTENTION = [
    (r"(layer\.\d+)\.attention\.q_proj", r"\1.attention.attention.query"),
    (r"(layer\.\d+)\.attention\.k_proj", r"\1.attention.attention.key"),
    (r"(layer\.\d+)\.attention\.v_proj", r"\1.attention.attention.value"),
    (r"(layer\.\d+)\.attention\.o_proj", r"\1.attention.output.dense"),
    (r"^encoder\.", "encoder.model."),  # One more level, as some files have.
]


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture(scope="module")
def autoencoder_class(torch):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    # diffusers 0.42 asks for an attribute that transformers 5 no longer has.
    if not hasattr(transformers.SiglipVisionModel, "vision_model"):
        transformers.SiglipVisionModel.vision_model = property(lambda self: self)
    return diffusers.AutoencoderRAE


@pytest.fixture(scope="module", params=KINDS)
def reference(request, torch, autoencoder_class, tmp_path_factory):
    """A diffusers autoencoder with random weights and statistics, and its folder."""
    kind, grid = request.param, 4
    patch_size = 14 if kind == "dinov2" else 16
    latents = torch.rand(2, 64, grid, grid) + 0.5
    model = autoencoder_class(
        encoder_type=kind,
        encoder_hidden_size=64,
        encoder_patch_size=patch_size,
        encoder_num_hidden_layers=2,
        encoder_input_size=grid * patch_size,
        encoder_norm_mean=[0.4, 0.5, 0.6],
        encoder_norm_std=[0.2, 0.3, 0.25],
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=96,
        patch_size=4,
        latents_mean=latents[0],
        latents_std=latents[1],
        scaling_factor=0.7,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    return kind, model, folder


def outputs(torch, model, images):
    """Latents and reconstructions of images (b, h, w, 3), channels last."""
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        z = model.encode(x).latent
        out = model.decode(z).sample
    return tuple(np.moveaxis(value.numpy(), 1, -1) for value in (z, out))


def draw_images(size):
    return np.random.default_rng(0).random((2, *size, 3), np.float32)


def assert_close(actual, desired, rtol):
    np.testing.assert_allclose(
        actual, desired, rtol=0, atol=rtol * np.abs(desired).max()
    )


def test_diffusers_to_ours(reference, torch):
    _, theirs, folder = reference
    model = rae.RAE.from_pretrained(folder)
    size = theirs.config.encoder_input_size
    for image_size, rtol in [((size, size), 1e-5), ((size + 9, size + 20), 1e-4)]:
        images = draw_images(image_size)
        z, out = outputs(torch, theirs, images)
        assert_close(networks.encode(model, images), z, rtol)
        assert_close(networks.decode(model, z), out, 1e-5)


def test_resized_images_in_float64(reference, torch):
    """Where torch's rounding of coordinates is out of the way, 1e-5 holds, too."""
    _, theirs, folder = reference
    model = rae.RAE.from_pretrained(folder)
    images = draw_images((80, 73))
    theirs = theirs.double()
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).double()
        z = np.moveaxis(theirs.encode(x).latent.numpy(), 1, -1)
    theirs.float()
    assert_close(networks.encode(model, images), z, 1e-5)


def test_ours_to_diffusers(reference, torch, autoencoder_class, tmp_path):
    """The same file to the bit, and in diffusers the same outputs to the bit."""
    _, theirs, folder = reference
    model = rae.RAE.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    again = rae.RAE.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "theirs", layout="diffusers")
    networks.assert_same_file(tmp_path / "theirs", folder)
    loaded, info = autoencoder_class.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values()), info
    images = draw_images((70, 70))
    for a, b in zip(
        outputs(torch, loaded.eval(), images),
        outputs(torch, theirs, images),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_names_of_transformers_4(reference, tmp_path):
    """With one prefix level more, as in files that older versions wrote."""
    kind, _, folder = reference
    source = sources.open_tensors(folder)
    arrays = {}
    for name in source.shapes:
        new = name
        for pattern, replacement in OLD_NAMES[kind] + OLD_ATTENTION:
            new = re.sub(pattern, replacement, new)
        arrays[new] = source.read(name)
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    settings = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(settings)
    file = tmp_path / diffusers_names.WEIGHTS_NAME
    safetensor_files.write_safetensors(file, arrays.items(), specs)
    rae.RAE.from_pretrained(tmp_path).save_pretrained(tmp_path / "a")
    rae.RAE.from_pretrained(folder).save_pretrained(tmp_path / "b")
    networks.assert_same_file(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("hidden_size, grid", [(48, 4), (48, 16), (96, 32), (1152, 9)])
def test_fixed_position_table(hidden_size, grid, torch):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(
        hidden_size, grid, cls_token=True, extra_tokens=1, output_type="pt"
    )
    ours = diffusers_names.fixed_table(hidden_size, grid)
    np.testing.assert_allclose(ours[0], theirs.float().numpy(), rtol=0, atol=1e-7)


def test_torch_loads_official_files(torch, tmp_path):
    """With `weights_only`, and every name and shape that strict loading needs."""
    arrays = golden_map.under(golden_map.read("dit_dh_base"), "base/params/")
    path = networks.write_pt(tmp_path / "model.pt", arrays)
    model = dit_dh.DiTDH.from_pretrained(path, num_heads=(3, 4))
    model.save_pretrained(tmp_path / "dit", layout="official")
    loaded = torch.load(tmp_path / "dit" / "model.pt", weights_only=True)
    buffers = {
        f"{part}_feat_rope.freqs_{kind}": (16, 16)
        for part in ("enc", "dec")
        for kind in ("cos", "sin")
    }
    shapes = {name: array.shape for name, array in arrays.items()} | buffers
    assert {name: tuple(x.shape) for name, x in loaded.items()} == shapes
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)


def test_torch_training_checkpoints(torch, tmp_path):
    """Of DistributedDataParallel and torch.compile, the average first."""
    arrays = golden_map.under(golden_map.read("decoder"), "params/")
    ema = {f"module.{k}": torch.from_numpy(v.copy()) for k, v in arrays.items()}
    online = {f"_orig_mod.{k[7:]}": v + 1 for k, v in ema.items()}
    checkpoint = {"step": 7, "ema": ema, "model": online, "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "ep-0000001.pt")
    load = decoder.RAEDecoder.from_pretrained
    path = tmp_path / "ep-0000001.pt"
    bias = jnp.asarray(arrays["decoder_pred.bias"])
    np.testing.assert_array_equal(load(path, num_heads=4).pred.bias[...], bias)
    model = load(path, part="model", num_heads=4)
    np.testing.assert_array_equal(model.pred.bias[...], bias + 1)
    with pytest.raises(ValueError, match="disc"):
        load(path, part="disc", num_heads=4)
