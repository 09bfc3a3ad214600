"""The encoder of l-DAE: any tokenizer, block and level; as a plain ViT; in files."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from rae_jax import config as configs
from rae_jax.convert import sources
from rae_jax.diffusion import schedules
from rae_jax.layers import patches
from rae_jax.models import (
    conversion,
    ldae_encoder,
    learned_tokenizers,
    patch_autoencoder,
    vit_encoder,
)

SIZES = dict(
    image_size=16,
    patch_size=4,
    latent_dim=12,
    hidden_size=32,
    depth=3,
    num_heads=2,
    time_index=40,
)
VAE = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
raw = jax.jit(lambda encoder, x, **options: encoder.raw_features(x, **options))
after_blocks = jax.jit(lambda net, *args: net.features(*args), static_argnums=3)
last_of = jax.jit(lambda encoder, x: (encoder.block_features(x, [2])[0], encoder(x)))


def make(**changes):
    return networks.drawn(ldae_encoder.LDAEEncoder, **SIZES | changes)


def images(count=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(-1, 1, (count, 16, 16, 3)), jnp.float32)


def assert_close(found, expected, tolerance):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


CASES = {
    "image": {},
    "raw": dict(clean="raw"),
    "latent": dict(tokenizer="patch_vae", input_space="latent"),
    "classes": dict(num_classes=5, input_space="latent", schedule="linear_gamma2"),
    "single": dict(schedule="single_sigma", condition_divisor=2),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_merged_encoder_is_the_conditioned_one(changes, tmp_path):
    """Before and after the norm, here and from its files; float32, 1e-5."""
    encoder, x = make(**changes), images()
    tokens, expected = nnx.jit(lambda e, x: (e.raw_features(x), e(x)))(encoder, x)
    encoder.save_pretrained(tmp_path, layout="huggingface")
    read = vit_encoder.ViTEncoder.from_pretrained(tmp_path)
    assert read.name == "ijepa" and read.image_mean == (0.5, 0.5, 0.5)
    for merged in (encoder.merged(), read):
        found_tokens, found = last_of(merged, x)
        assert_close(found_tokens, tokens, 1e-5)
        assert_close(found, expected, 2e-5)
    other = encoder.merged(time_index=900)
    is_single = "single" in changes.get("schedule", "")
    change = np.abs(last_of(other, x)[0] - tokens).max() / np.abs(tokens).max()
    assert (change < 1e-5) == is_single


def test_conversion_writes_the_merged_encoder(tmp_path):
    """As the verb does: from our own files; another layout is refused by name."""
    encoder = make()
    encoder.save_pretrained(tmp_path / "own")
    opened = conversion.open_weights(tmp_path / "own")
    opened.write(tmp_path / "hf", "huggingface")
    encoder.save_pretrained(tmp_path / "directly", layout="huggingface")
    networks.assert_same_file(tmp_path / "hf", tmp_path / "directly")
    ((_, rows),) = opened.rows("huggingface")
    assert ("embeddings.position_embeddings", "pos_embed", "reshape") in rows
    names = sources.open_tensors(tmp_path / "hf").shapes
    assert not [name for name in names if "cls_token" in name]
    with pytest.raises(ValueError, match="layout of LDAEEncoder 'official'"):
        opened.write(tmp_path / "no", "official")
    again = ldae_encoder.LDAEEncoder.from_pretrained(tmp_path / "own")
    assert_close(raw(again, images()), raw(encoder, images()), 1e-6)


def test_noise_is_that_of_the_level():
    """At t: gamma z + sigma eps; one key per image draws the same in any batch."""
    encoder, x = make(tokenizer="patch_ae", input_space="latent"), images(3)
    t, key = 300, jax.random.key(3)
    gamma, sigma = (table[t] for table in schedules.noise_schedule("linear_sigma"))
    z = encoder.latents(x)
    z_t = gamma * z + sigma * jax.random.normal(key, z.shape)
    expected = after_blocks(encoder.net, z_t, jnp.full(3, t), 3)
    found = raw(encoder, x, time_index=t, key=key)
    assert_close(found, expected, 1e-5)
    keys = jax.random.split(key, 3)
    whole = raw(encoder, x, time_index=t, key=keys)
    assert_close(raw(encoder, x[1:], time_index=t, key=keys[1:]), whole[1:], 1e-5)
    assert np.abs(whole - found).max() > 1e-2


@pytest.mark.parametrize("clean", ldae_encoder.CLEAN)
def test_noise_of_images_lies_in_the_leading_components(clean):
    """Level 0 of a linear sigma has none; what was left out stays only if raw."""
    encoder, x = make(clean=clean, time_index=0), images()
    still, _ = encoder.inputs(x)
    assert_close(encoder.inputs(x, 0, jax.random.key(0))[0], still, 1e-5)
    moved, t = encoder.inputs(x, 500, jax.random.key(0))
    assert (t == 500).all()
    added = np.asarray(moved - still).reshape(-1, 48)
    rank = np.linalg.matrix_rank(added, tol=1e-4 * np.abs(added).max())
    assert rank == SIZES["latent_dim"]
    is_whole = np.abs(still - patches.patchify(x, 4)).max() < 1e-6
    assert is_whole == (clean == "raw")


def trained(encoder, tokenizer, depth):
    """Parameters of a run whose network had two blocks more than `depth`."""
    whole = make(depth=depth + 2, input_space="latent")
    params = nnx.to_pure_dict(nnx.state(whole.net, nnx.Param))
    cut = ldae_encoder.encoder_params(params, tokenizer, depth, False)
    return whole, nnx.merge(nnx.graphdef(encoder), cut)


def test_patch_tokenizers_become_one_affine_map():
    network = networks.drawn(
        patch_autoencoder.PatchAutoencoder,
        patch_size=4,
        latent_dim=12,
        variational=True,
    )
    scale = jnp.linspace(0.5, 2, 12)
    tokenizer = learned_tokenizers.PatchCode.of(network, scale)
    encoder = make(tokenizer="patch_vae", input_space="latent", depth=1)
    whole, found = trained(encoder, tokenizer, 1)
    x = images()
    z = tokenizer.encode(x)
    assert_close(found.latents(x), z, 1e-5)
    expected = after_blocks(whole.net, z, jnp.full(2, 40), 1)
    assert_close(raw(found, x), expected, 1e-5)


def test_convolutional_tokenizers_stay_networks():
    code = learned_tokenizers.ConvCode
    network = networks.drawn(code.network, image_size=16, latent_channels=3, **VAE)
    tokenizer = code.of(network, jnp.linspace(0.5, 2, 12))
    encoder = make(tokenizer="conv_vae", input_space="latent", depth=1, vae=VAE)
    whole, found = trained(encoder, tokenizer, 1)
    x = images()
    z = jax.jit(lambda tokenizer, x: tokenizer.encode(x))(tokenizer, x)
    expected = after_blocks(whole.net, z, jnp.full(2, 40), 1)
    assert_close(raw(found, x), expected, 1e-4)
    with pytest.raises(configs.ConfigError, match="'conv_vae' is a convolutional"):
        found.merged()


def test_wrong_encoders_are_named():
    def fails(match, **changes):
        with pytest.raises(ValueError, match=match):
            ldae_encoder.LDAEEncoder(**SIZES | changes, rngs=nnx.Rngs(0))

    fails("tokenizer 'pcaa'. Did you mean 'pca'", tokenizer="pcaa")
    fails("'image' needs a tokenizer of .*not 'patch_ae'", tokenizer="patch_ae")
    fails("time_index must be within 0 and 999, not 1000", time_index=1000)
    fails("clean input 'rwa'. Did you mean 'raw'", clean="rwa")
    fails("schedule 'linear_sgima'", schedule="linear_sgima")
    fails("image_size 18 is not a multiple of patch_size 4", image_size=18)
