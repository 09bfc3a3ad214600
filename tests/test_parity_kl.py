"""The KL autoencoder against diffusers: values, files in both directions, size."""

import json

import jax
import networks
import numpy as np
import pytest

from rae_jax.convert import kl_names, safetensor_files, sources, tables
from rae_jax.models import autoencoder_kl, conversion, encoders, rae
from rae_jax.trainers import weights

pytestmark = pytest.mark.parity

# Arguments of diffusers: up to four levels, groups of odd numbers and widths.
CASES = {
    "one": dict(
        block_out_channels=(10,), norm_num_groups=5, mid_block_add_attention=False
    ),
    "two": dict(
        block_out_channels=(6, 9),
        layers_per_block=2,
        norm_num_groups=3,
        latent_channels=3,
        sample_size=16,
    ),
    "four": dict(
        block_out_channels=(7, 14, 14, 21),
        norm_num_groups=7,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.36,
        shift_factor=0.11,
    ),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@jax.jit
def through(model, images, eps):
    """Moments of images, latents with the given noise, and images of these."""
    z = model.encode(images, eps)
    return model.encoder.moments(images * 2 - 1), z, model.decode(z)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture(scope="module")
def kl_class(torch):
    return pytest.importorskip("diffusers").AutoencoderKL


def make(torch, kl_class, case):
    levels = len(CASES[case]["block_out_channels"])
    model = kl_class(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **CASES[case],
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CASES)
def reference(request, torch, kl_class, tmp_path_factory):
    """A diffusers autoencoder with random weights, and its folder."""
    model = make(torch, kl_class, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def first(torch, array):
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def last(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


def assert_close(actual, desired):
    atol = 1e-5 * np.abs(desired).max()
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def test_values_are_those_of_diffusers(reference, torch):
    """Moments, latents of the same noise with their scale, and images of these."""
    theirs, folder = reference
    ours = autoencoder_kl.AutoencoderKL.from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = rng.random((2, 48, 24, 3), np.float32)
    with torch.no_grad():
        posterior = theirs.encode(first(torch, images * 2 - 1)).latent_dist
        eps = rng.standard_normal(posterior.mean.permute(0, 2, 3, 1).shape, np.float32)
        sample = posterior.mean + posterior.std * first(torch, eps)
        decoded = last(theirs.decode(sample).sample) / 2 + 0.5
    shift = theirs.config.shift_factor or 0.0
    latents = last((sample - shift) * theirs.config.scaling_factor)
    desired = (last(posterior.parameters), latents, decoded)
    for actual, expected in zip(through(ours, images, eps), desired, strict=True):
        assert_close(actual, expected)


def test_files_go_both_ways(reference, kl_class, tmp_path):
    """Through our own layout and back: equal tensors, and diffusers loads them."""
    theirs, folder = reference
    ours = autoencoder_kl.AutoencoderKL.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    again = autoencoder_kl.AutoencoderKL.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "theirs", layout="diffusers")
    networks.assert_same_file(tmp_path / "theirs", folder)
    loaded = kl_class.from_pretrained(tmp_path / "theirs")
    for name, tensor in theirs.state_dict().items():
        assert (loaded.state_dict()[name] == tensor).all(), name
    ignored = {"_name_or_path", "_diffusers_version"}
    for key in loaded.config.keys() - ignored:
        given, expected = loaded.config[key], theirs.config[key]
        assert given == expected or list(given) == list(expected), key


def test_convert_tells_the_kind(reference, tmp_path):
    theirs, folder = reference
    opened = weights.open_source(str(folder))
    assert (opened.kind, opened.layout) == ("autoencoder_kl", "diffusers")
    assert opened.count == sum(p.numel() for p in theirs.parameters())
    file = tmp_path / "vae.safetensors"
    opened.write(file, "diffusers")
    networks.assert_same_file(file, folder)


def test_older_spellings_are_read(torch, kl_class, tmp_path):
    """Names before diffusers 0.18; settings without a scale; weights of 1 x 1."""
    theirs = make(torch, kl_class, "two")
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    old = {}
    for name, array in arrays.items():
        for new, spelling in OLD_NAMES.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(f".{new}.", f".{spelling}.")
                array = array[..., None, None] if array.ndim == 2 else array
        old[name] = array
    specs = {name: (array.shape, array.dtype) for name, array in old.items()}
    path = tmp_path / kl_names.WEIGHTS_NAME
    safetensor_files.write_safetensors(path, old.items(), specs)
    settings = {k: v for k, v in theirs.config.items() if "factor" not in k}
    settings |= {"_class_name": "AutoencoderKL"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours = autoencoder_kl.AutoencoderKL.from_pretrained(tmp_path)
    assert ours.encoder.scaling_factor == theirs.config.scaling_factor
    ours.save_pretrained(tmp_path / "new", layout="diffusers")
    written = sources.open_tensors(tmp_path / "new")
    for name, array in arrays.items():
        np.testing.assert_array_equal(written.read(name), array, name)


def test_full_size(torch, kl_class):
    """The sizes of sd-vae-ft-ema: as many parameters, of the same names and shapes."""
    sizes = encoders.SPACES["sd_vae"]["sizes"]
    arguments = encoders.kl_arguments(sizes)
    settings = kl_names.settings_of(arguments)
    with torch.device("meta"):
        theirs = kl_class.from_config(settings)
    shapes = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    expected = sum(int(np.prod(shape)) for shape in shapes.values())
    assert expected == 83_653_863
    cls = autoencoder_kl.AutoencoderKL
    arguments, ours = conversion.structure(cls, arguments)
    table = kl_names.table(arguments)
    assert {e.name: tables.foreign_shape(e, ours) for e in table.entries} == shapes
    assert sum(int(np.prod(shape)) for shape in ours.values()) == expected


def test_as_an_autoencoder(torch, kl_class, tmp_path):
    """What commands load by `--autoencoder`: reconstructions of the means."""
    theirs = make(torch, kl_class, "two")
    theirs.save_pretrained(tmp_path)
    model = weights.load_autoencoder(str(tmp_path), remat="none")
    assert isinstance(model, rae.RAE)
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        means = theirs.encode(first(torch, images * 2 - 1)).latent_dist.mean
        expected = last(theirs.decode(means).sample) / 2 + 0.5
    z = networks.encode(model, images)
    assert_close(z, last(means * theirs.config.scaling_factor))
    assert_close(networks.decode(model, z), expected)
