"""Latents beside those of an encoder: a KL autoencoder's, and pixels as they are."""

import json

import chain
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.convert import kl_names, sources
from rae_jax.layers import convolution, patches
from rae_jax.models import autoencoder_kl, encoders, rae
from rae_jax.trainers import (
    autoencoder,
    frozen,
    generation,
    latent_stats,
    registry,
    weights,
)
from rae_jax.training import logs

SMOKE = ("sd_vae_smoke", "pixels_smoke")
KL_SIZES = encoders.kl_arguments(encoders.SPACES["sd_vae_smoke"]["sizes"])

encode = jax.jit(rae.encode)


def block(name, weights=None, **sizes):
    """Returns an encoder block with other weights and sizes."""
    config = ConfigDict(encoders.block(name))
    config.sizes.update(sizes)
    config.weights = weights or config.weights
    return config


@pytest.fixture(scope="module")
def kl():
    """A small KL autoencoder with random weights, its biases among them."""
    return networks.drawn(autoencoder_kl.AutoencoderKL, **KL_SIZES)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((4, 32, 32, 3), np.float32)


# Latents


@pytest.mark.parametrize("name", encoders.SPACES)
def test_sizes_tell_the_shape_of_latents(name):
    config = block(name)
    graphdef, params = frozen.encoder(config)
    size = config.sizes.image_size
    shape = jax.eval_shape(
        lambda p, x: rae.encode(nnx.merge(graphdef, p), x, jax.random.key(0)),
        params,
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
    )
    assert shape.shape == (2, *frozen.latent_shape(config.sizes))
    assert shape.dtype == jnp.float32


def test_pixels_come_back_to_the_bit():
    """uint8 -> latents in [-1, 1] -> uint8; a latent is a patch, row by row."""
    encoder, decoder = encoders.make_pair(
        "pixels", rngs=nnx.Rngs(0), **block("pixels").sizes
    )
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.random.default_rng(0).choice(levels, (2, 256, 256, 3))
    pixels[0, :, 0, 0] = levels
    x = pixels.astype(np.float32) / 255
    z = encode(encoder, x)
    assert z.shape == (2, 16, 16, 768) and float(jnp.abs(z).max()) == 1
    np.testing.assert_array_equal(
        z.reshape(2, 256, 768), patches.patchify((x - 0.5) / 0.5, 16)
    )
    back = np.asarray(rae.decode(decoder, z, encoder)) * 255
    np.testing.assert_array_equal(np.round(back), pixels)
    np.testing.assert_array_equal(encode(encoder, x, jax.random.key(0)), z)


def test_kl_latents_are_drawn_with_a_key(kl, images):
    """Mean + std eps, times the scale; the mean without a key; nothing else random."""
    raw = jax.jit(rae.encode_raw)(kl.encoder, images)
    assert raw.shape == (4, 4, 4, 8)
    mean, log_variance = np.split(np.asarray(raw, np.float64), 2, axis=-1)
    scale = KL_SIZES["scaling_factor"]
    means = encode(kl.encoder, images)
    np.testing.assert_allclose(means, mean * scale, rtol=1e-6)
    key = jax.random.key(1)
    eps = np.asarray(jax.random.normal(key, mean.shape))
    drawn = (mean + np.exp(log_variance / 2) * eps) * scale
    found = encode(kl.encoder, images, key)
    np.testing.assert_allclose(found, drawn, rtol=0, atol=1e-6)
    # As a cache stores them.
    again = rae.to_latents(kl.encoder, raw.astype(jnp.bfloat16), key)
    np.testing.assert_allclose(again, drawn, rtol=0, atol=0.02)


def test_log_variances_are_clipped(kl):
    raw = jnp.concatenate([jnp.zeros((1, 2, 2, 4)), jnp.full((1, 2, 2, 4), 99.0)], -1)
    scale = KL_SIZES["scaling_factor"]
    expected = np.full((1, 2, 2, 4), np.exp(20.0) * scale**2)
    np.testing.assert_allclose(kl.encoder.variances(raw), expected, rtol=1e-6)
    expected = np.full((1, 2, 2, 4), np.exp(-30.0) * scale**2)
    np.testing.assert_allclose(kl.encoder.variances(-raw), expected, rtol=1e-6)


def test_halving_pads_right_and_below():
    """An impulse at an even pixel reaches one pixel, one at an odd pixel two."""
    level = convolution.Level(1, 1, 1, 1, "half", dtype="float32", rngs=nnx.Rngs(0))
    level.resample.kernel[...] = jnp.ones((3, 3, 1, 1))
    for at, reached in ((2, [0, 1]), (3, [1]), (0, [0]), (7, [3])):
        x = jnp.zeros((1, 8, 8, 1)).at[0, at, at, 0].set(1.0)
        out = np.asarray(level.resample(x))[0, :, :, 0]
        assert np.flatnonzero(out.any(axis=0)).tolist() == reached
        assert np.flatnonzero(out.any(axis=1)).tolist() == reached


@pytest.mark.parametrize(
    ("half", "shape", "gmacs"),
    [(0, (1, 256, 256, 3), 135), (1, (1, 1024, 4), 310)],
    ids=["encoder", "decoder"],
)
def test_cost_is_the_published_one(half, shape, gmacs):
    """Of an image of 256 pixels, in multiply-adds, as the paper of RAE counts."""
    sizes = encoders.SPACES["sd_vae"]["sizes"]
    graphdef, params = frozen.abstract(
        lambda rngs: encoders.make_pair("sd_vae", rngs=rngs, **sizes)[half]
    )
    run = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))
    lowered = run.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32))
    flops = lowered.cost_analysis()["flops"]
    np.testing.assert_allclose(flops, 2e9 * gmacs, rtol=0.02)


def test_no_network_is_carried_that_the_step_does_not_need():
    """The decoder half is for pictures; pixels need no parameters at all."""
    counts = {}
    for name in ("sd_vae", "pixels"):
        leaves = jax.tree.leaves(frozen.encoder(block(name))[1])
        counts[name] = sum(leaf.size for leaf in leaves)
    assert counts == {"sd_vae": 34_163_664, "pixels": 0}
    assert frozen.load_encoder(block("pixels"), ".") == {}


@pytest.mark.parametrize("mode", ["exact", "momentum"])
def test_statistics_have_the_variance_of_drawn_latents(mode):
    """The variance about the means is added; with a thousand draws it is found."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 1, 1, 2)).astype(np.float32)
    spread = rng.uniform(0.5, 2, z.shape).astype(np.float32)
    state = latent_stats.create_state((1, 1, 2), mode)
    mask = jnp.asarray([1.0, 1, 1, 1, 1, 0])
    if mode == "exact":
        for part in (slice(0, 2), slice(2, 6)):
            state = latent_stats.add_exact(state, z[part], mask[part], spread[part])
    else:
        state = latent_stats.add_momentum(state, z, mask, 1.0, spread)
    found = latent_stats.statistics(state, mode)
    np.testing.assert_allclose(found["mean"], z[:5].mean(axis=0), rtol=1e-5)
    expected = z[:5].var(axis=0) + spread[:5].mean(axis=0)
    np.testing.assert_allclose(found["var"], expected, rtol=1e-5)


# Files


def test_files_of_both_layouts_are_found(kl, images, tmp_path):
    """As an encoder, as a config's decoder, and as an autoencoder of commands."""
    z = encode(kl.encoder, images)
    expected = networks.decode(kl, z)
    for layout in kl.layouts:
        folder = tmp_path / layout
        kl.save_pretrained(folder, layout=layout)
        config = block("sd_vae_smoke", f"../{layout}")
        params = frozen.load_encoder(config, tmp_path / "run")
        encoder = nnx.merge(frozen.encoder(config)[0], params)
        np.testing.assert_array_equal(encode(encoder, images), z)
        run = ConfigDict({"encoder": config, "data": {"image_size": 32}})
        for found in (
            autoencoder.find("own", tmp_path / "run", run),
            autoencoder.find(f"../{layout}", tmp_path / "run"),
        ):
            assert found.config.encoder.sizes.image_size == 32
            recon = jax.jit(found.decode)(found.params, z)
            np.testing.assert_allclose(recon, expected, rtol=0, atol=1e-5)


def test_sizes_of_a_bare_file_are_those_of_its_shapes(kl, tmp_path):
    kl.save_pretrained(tmp_path, layout="diffusers")
    file = tmp_path / kl_names.WEIGHTS_NAME
    moved = file.rename(tmp_path.with_suffix(".safetensors"))
    opened = weights.open_source(str(moved), overrides={"norm_num_groups": 4})
    told = kl_names.arguments_of_shapes(sources.open_tensors(moved).shapes)
    expected = {k: v for k, v in KL_SIZES.items() if k in told}
    assert told == expected and len(told) == 6
    assert opened.kind == "autoencoder_kl" and opened.arguments["norm_num_groups"] == 4


def test_what_does_not_fit_is_told(kl, tmp_path):
    kl.save_pretrained(tmp_path / "kl", layout="diffusers")
    for sizes, message in (
        (dict(layers_per_block=2), "layers_per_block = 2, the files have 1"),
        (dict(scaling_factor=1.0), "scaling_factor = 1.0, the files have 0.18215"),
        (dict(hidden_size=8), "latent_channels = 8, the files have 4"),
    ):
        with pytest.raises(configs.ConfigError, match=message):
            frozen.load_encoder(block("sd_vae_smoke", "../kl", **sizes), tmp_path / "x")
    with pytest.raises(ValueError, match="make it an RAE with RAE.from_kl"):
        rae.RAE.from_pretrained(tmp_path / "kl")
    path = tmp_path / "kl" / "config.json"
    settings = json.loads(path.read_text())
    for changes, message in (
        (dict(in_channels=1), "in_channels=1"),
        (dict(down_block_types=["AttnDownEncoderBlock2D"]), "AttnDownEncoderBlock2D"),
        (dict(_class_name="AsymmetricAutoencoderKL"), "of AsymmetricAutoencoderKL"),
        (dict(sample_size=[32, 64]), r"\[32, 64\] is not square"),
    ):
        path.write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=message):
            autoencoder_kl.AutoencoderKL.from_pretrained(tmp_path / "kl")


def test_sizes_that_contradict_each_other_are_told():
    for name, sizes, message in (
        ("sd_vae", dict(patch_size=16), "patch_size = 16.* implies 8"),
        ("pixels", dict(patch_size=8), "hidden_size = 768.* implies 192"),
        ("sd_vae", dict(image_size=100), "image_size 100 is not a multiple of 8"),
        ("sd_vae", dict(norm_num_groups=48), "128 channels.* 48 equal groups"),
    ):
        with pytest.raises(ValueError, match=message):
            frozen.encoder(block(name, **sizes))
    with pytest.raises(configs.ConfigError, match="Did you mean 'sd_vae'"):
        encoders.block("sdvae")
    with pytest.raises(configs.ConfigError, match="weights is empty"):
        config = block("sd_vae")
        config.weights = ""
        frozen.load_encoder(config, ".")


def test_what_a_space_cannot_do_is_told():
    config = chain.load("rae_decoder")
    with config.unlocked():
        config.encoder = block("sd_vae_smoke")
        config.gan.weight, config.gan.backbone.name = 0.75, "encoder"
    with pytest.raises(configs.ConfigError, match="backbone cannot be 'sd_vae'"):
        registry.design(config)
    run = ConfigDict({"encoder": chain.encoder(), "data": {}})
    with pytest.raises(configs.ConfigError, match="'ldae' has no decoder of its own"):
        autoencoder.find("own", ".", run)


# Runs


@pytest.mark.parametrize("name", SMOKE)
def test_a_run_trains_and_samples_with_its_own_decoder(name, tmp_path):
    """Two steps and pictures; then the chain from noise to images, from the folder."""
    config = chain.load(
        "latent_diffusion",
        "num_steps=2",
        "every.evaluate=2",
        "mesh.data=1",
        "decoder=own",
        "sampling.num_points=3",
        f"model.patch_size={2 if name == 'sd_vae_smoke' else 1}",
    )
    with config.unlocked():
        config.encoder = block(name)
    registry.train(config, tmp_path)
    records = logs.read_metrics(tmp_path)
    assert all(np.isfinite(list(record.values())).all() for record in records)
    assert records[-1]["sample_std"] > 0
    generator = generation.load(tmp_path)
    assert generator.latent_shape == frozen.latent_shape(config.encoder.sizes)
    options = dict(scale=1.0, seed=0, batch_size=8)
    made = np.concatenate(list(generator.images(np.arange(8) % 3, **options)))
    assert made.shape == (8, 32, 32, 3) and made.dtype == np.uint8
