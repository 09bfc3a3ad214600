"""l-DAE: the network and the encoder it leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pca_data import DIM, LATENT, PATCH, fit, smooth_images, tokens_of

from rae_jax.layers import patches
from rae_jax.losses import denoising
from rae_jax.models import encoders, ldae, ldae_encoder, tokenizers
from rae_jax.training import state

SIZES = dict(hidden_size=32, depth=3, num_heads=2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def components():
    return fit(tokens_of(smooth_images(64)))


@pytest.fixture(scope="module")
def pca(components):
    return tokenizers.make_pca(components, LATENT)


def make_net(**changes):
    """Returns a new network; compiled as a whole, which is quicker than its parts."""
    sizes = SIZES | dict(grid=8, in_features=DIM, out_features=DIM) | changes
    return nnx.jit(lambda: ldae.LDAE(**sizes | {"rngs": nnx.Rngs(0)}))()


def perturbed(module, scale=0.05):
    """The module with noise on all parameters, so that none is zero."""
    graphdef, params = nnx.graphdef(module), state.param_dict(module)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [p + scale * rng.standard_normal(p.shape, np.float32) for p in leaves]
    params = treedef.unflatten(leaves)
    return nnx.merge(graphdef, params), params


def test_a_new_network_predicts_zero():
    x = np.random.default_rng(0).standard_normal((2, 64, DIM), np.float32)
    t = jnp.asarray([0, 900])
    apply = nnx.jit(lambda net, *args: net(*args))
    out = apply(make_net(), x, t)
    assert out.shape == (2, 64, DIM) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)
    changed, _ = perturbed(make_net())
    assert np.abs(apply(changed, x, t)).max() > 0.01
    assert np.abs(apply(changed, x, t) - apply(changed, x, t + 50)).max() > 1e-4


def test_patch_embedding_learns_within_the_latent_space_alone(components):
    """The gradient outside span(V_d) is zero if the mean patch is."""
    centred = components | {"mean": np.zeros(DIM)}
    pca = tokenizers.make_pca(centred, LATENT)
    net, params = perturbed(make_net())
    graphdef = nnx.graphdef(net)

    def loss(params, pca):
        return denoising.denoising_loss(
            nnx.merge(graphdef, params),
            smooth_images(2),
            pca,
            jax.random.key(0),
        )[0]

    def gradient(pca):
        grads = jax.jit(jax.grad(loss))(params, pca)["embed"]["kernel"]
        return np.asarray(pca.basis @ grads)  # Row i: along component i.

    found = gradient(pca)
    inside = np.abs(found[:LATENT]).max()
    assert inside > 1e-3
    assert np.abs(found[LATENT:]).max() < 1e-5 * inside
    off_centre = gradient(tokenizers.make_pca(components, LATENT))
    assert np.abs(off_centre[LATENT:]).max() > 1e-5 * inside


def count(params):
    return sum(np.prod(p.shape) for p in jax.tree.leaves(params))


def test_parameter_counts_are_those_of_the_paper():
    """24 blocks of width 1024: 303.0M and 38.6M for the condition at a quarter."""
    sizes = dict(grid=16, in_features=768, out_features=768, num_heads=16)
    net = nnx.eval_shape(lambda: make_net(**sizes, hidden_size=1024, depth=24))
    params = state.param_dict(net)
    blocks = params["blocks"]["block"]
    condition = count([params["t_embedder"], blocks["modulation"]])
    condition += count(params["final_layer"]["modulation"])
    backbone = count([params["embed"], blocks]) - count(blocks["modulation"])
    assert round(backbone / 1e6, 1) == 303.0
    assert round(condition / 1e6, 1) == 38.6


@pytest.mark.parametrize(
    ("hidden_size", "depth", "millions"),
    [(1024, 12, 151.9), (768, 12, 85.6), (1024, 24, 303.1)],
)
def test_encoder_sizes(hidden_size, depth, millions):
    """As a plain ViT: the modulation, at a fixed time, merges into the weights."""
    sizes = dict(image_size=256, patch_size=16, latent_dim=32, num_heads=16)
    sizes |= dict(hidden_size=hidden_size, depth=depth)
    make = lambda: encoders.make_encoder("ldae", rngs=nnx.Rngs(0), **sizes)  # noqa: E731
    params = state.param_dict(nnx.eval_shape(make))["net"]
    assert set(params) == {"embed", "t_embedder", "blocks"}
    plain = count(params) - count(params["t_embedder"])
    plain -= count(params["blocks"]["block"]["modulation"])
    assert abs(plain / 1e6 - millions) < 0.11


def test_encoder_is_the_first_half_of_the_network(pca):
    """On PCA-projected images at the fixed level, float32, 1e-6 of the largest."""
    _, params = perturbed(make_net(), scale=0.02)
    net = nnx.merge(nnx.graphdef(make_net()), params)
    sizes = dict(image_size=32, patch_size=PATCH, latent_dim=LATENT, time_index=10)
    sizes |= dict(hidden_size=32, depth=2, num_heads=2)
    encoder = encoders.make_encoder("ldae", rngs=nnx.Rngs(1), **sizes)
    cut = ldae_encoder.encoder_params(params, pca, 2, True)
    encoder = nnx.merge(nnx.graphdef(encoder), cut)

    images = smooth_images(3)
    x = patches.patchify(2 * images - 1, PATCH)
    projected = pca.decode_patches(pca.encode_patches(x))
    expected = np.asarray(net.features(projected, jnp.full(3, 10), 2))
    std = np.asarray(encoder.image_std, np.float32)[None, None, None]
    normalised = (images - np.asarray(encoder.image_mean, np.float32)) / std
    found = np.asarray(encoder.raw_features(normalised))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())

    tokens = np.asarray(encoder(normalised))
    centred = expected - expected.mean(axis=-1, keepdims=True)
    var = np.mean(centred**2, axis=-1, keepdims=True)
    np.testing.assert_allclose(tokens, centred / np.sqrt(var + 1e-6), atol=2e-5)
    other = np.asarray(net.features(projected, jnp.full(3, 500), 2))
    assert np.abs(other - expected).max() > 1e-4  # The level matters.


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="'ldea'.*Did you mean 'ldae'"):
        encoders.make_encoder("ldea", rngs=nnx.Rngs(0))
