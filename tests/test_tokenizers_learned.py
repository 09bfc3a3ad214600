"""Trained tokenizers against closed forms: linear maps, the layout of convolutions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rae_jax.layers import patches
from rae_jax.losses import autoencoding
from rae_jax.models import (
    autoencoder_kl,
    learned_tokenizers,
    patch_autoencoder,
    patchgan,
    tokenizers,
)
from rae_jax.training import state

PATCH, DIM, LATENT = 2, 12, 4
# Of Gaussian patches; the first four make the latent.
VARIANCES = np.array([4, 3, 2, 1, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01])


def gaussian_patches(count=2048):
    """Patches (n, p) whose covariance has the eigenvalues VARIANCES exactly."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, DIM))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / count)).T
    rotation = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    x = x * np.sqrt(VARIANCES)[None] @ rotation + rng.standard_normal(DIM)[None]
    return x.astype(np.float32)


def trained(variational, kl_weight, steps=1500):
    """A patch autoencoder trained on Gaussian patches by its own loss, and these."""
    x = gaussian_patches()
    images = patches.unpatchify(jnp.asarray(x)[:, None], PATCH)
    make = lambda: patch_autoencoder.PatchAutoencoder(  # noqa: E731
        PATCH, LATENT, variational, rngs=nnx.Rngs(0)
    )
    model = make()
    graphdef = nnx.graphdef(model)
    tx = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def loss_of(params, key):
        model = nnx.merge(graphdef, params)
        mean, log_variance = learned_tokenizers.posterior(model, images)
        recon = learned_tokenizers.images_of(
            model, autoencoding.draw(mean, log_variance, key)
        )
        error = autoencoding.pixel_error(images, recon, "l2")
        kl = jnp.mean(autoencoding.kl_divergence(mean, log_variance))
        return autoencoding.num_values(images) * error + kl_weight * kl

    @jax.jit
    def train(params):
        def step(carry, i):
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(0), i)
            loss, grads = jax.value_and_grad(loss_of)(params, key)
            updates, moments = tx.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), loss

        carry, losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return carry[0], losses

    params, losses = train(state.param_dict(model))
    return nnx.merge(graphdef, params), np.asarray(losses), x


def test_autoencoder_spans_the_subspace_of_pca():
    """Its loss is the sum of the variances left out, its images are those of PCA.

    Along directions of little variance its encoder learns slowly, so the subspace is
    that of the decoder.
    """
    model, losses, x = trained(variational=False, kl_weight=0.0, steps=3000)
    np.testing.assert_allclose(losses[-1], VARIANCES[LATENT:].sum(), rtol=5e-3)
    moments = tokenizers.PatchMoments(DIM)
    moments.add(x)
    pca = tokenizers.make_pca(moments.components(), LATENT, "none")
    code = learned_tokenizers.PatchCode.of(model, jnp.ones(LATENT))
    directions, _ = code.inverse_affine()
    span = np.linalg.qr(np.asarray(directions, np.float64).T)[0]
    basis = np.asarray(pca.basis[:LATENT])
    np.testing.assert_allclose(span @ span.T, basis.T @ basis, atol=1e-2)
    images = patches.unpatchify(jnp.asarray(x)[:, None], PATCH)
    found = code.decode(code.encode(images))
    difference = found - pca.decode(pca.encode(images))
    assert np.mean(difference**2) < 1e-2 * VARIANCES[LATENT:].sum() / DIM


def test_variational_autoencoder_reaches_the_bound_of_probabilistic_pca():
    """With |x - g(z)|^2 + w KL the best loss is closed form (arXiv:1911.02469).

    The sum of the variances left out, and w / 2 times 1 + log(2 v / w) for each kept.
    """
    weight = 0.1
    _, losses, _ = trained(variational=True, kl_weight=weight)
    kept, left = VARIANCES[:LATENT], VARIANCES[LATENT:]
    best = left.sum() + weight / 2 * np.sum(1 + np.log(2 * kept / weight))
    assert 0.995 < losses[-100:].mean() / best < 1.02


def test_divergence_is_that_of_the_integral():
    """Of N(m, v) from N(0, 1), by quadrature over 20 deviations, to 1e-5."""
    mean, log_variance = np.array([[0.3, -1.2]]), np.array([[-1.0, 0.7]])
    expected = 0.0
    for m, lv in zip(mean[0], log_variance[0], strict=True):
        z = np.linspace(m - 20, m + 20, 400_001)
        log_p = -0.5 * ((z - m) ** 2 / np.exp(lv) + lv)
        density = np.exp(log_p) / np.sqrt(2 * np.pi)
        expected += np.trapezoid(density * (log_p + 0.5 * z**2), z)
    found = autoencoding.kl_divergence(jnp.asarray(mean), jnp.asarray(log_variance))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    np.testing.assert_array_equal(autoencoding.kl_divergence(jnp.ones((3, 2)), None), 0)


def test_draws_have_the_moments_of_the_posterior():
    """Of 20,000 draws: mean and deviation to 3 of their standard errors."""
    model = patch_autoencoder.PatchAutoencoder(PATCH, LATENT, True, rngs=nnx.Rngs(0))
    code = learned_tokenizers.PatchCode.of(model, jnp.full(LATENT, 2.0))
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 2, 2, 3)))
    image = image.astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    z = np.asarray(jax.vmap(lambda key: code.encode(image, key)[0, 0])(keys))
    mean, variance = (np.asarray(x)[0, 0] for x in code.moments(image))
    error = np.sqrt(variance) / 2 / np.sqrt(len(z))
    assert (np.abs(z.mean(axis=0) - mean / 2) < 3 * error).all()
    np.testing.assert_allclose(z.std(axis=0), np.sqrt(variance) / 2, rtol=0.02)
    np.testing.assert_allclose(code.encode(image)[0, 0], mean / 2, rtol=1e-5)


def test_unknown_error_and_shapes_are_named():
    with pytest.raises(ValueError, match="error 'l3'; choose from"):
        autoencoding.pixel_error(jnp.ones((1, 2)), jnp.ones((1, 2)), "l3")
    with pytest.raises(ValueError, match=r"\(1, 2\), recon \(2, 1\)"):
        autoencoding.pixel_error(jnp.ones((1, 2)), jnp.ones((2, 1)), "l1")
    with pytest.raises(ValueError, match="latent_dim 13 is not within 1 and the 12"):
        patch_autoencoder.PatchAutoencoder(PATCH, 13, False, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def conv():
    """A convolutional tokenizer of two levels, its network and images."""
    sizes = dict(image_size=16, latent_channels=3, block_out_channels=(4, 8))
    sizes |= dict(layers_per_block=1, norm_num_groups=2, scaling_factor=0.5)
    model = nnx.jit(lambda: autoencoder_kl.AutoencoderKL(**sizes, rngs=nnx.Rngs(0)))()
    scale = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 12), jnp.float32)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3))
    code = learned_tokenizers.ConvCode.of(model, scale)
    return code, model, jnp.asarray(images, jnp.float32)


encode = jax.jit(lambda code, *args: code.encode(*args))
latents = nnx.jit(lambda model, images: model.encode((images + 1) / 2))


def test_tokens_of_convolutions_are_in_the_order_of_dit(conv):
    """Two by two latents make a token: DiT's unpatchify brings them back."""
    code, model, images = conv
    assert (code.patch_size, code.latent_dim) == (4, 12)
    z = np.asarray(encode(code, images) * code.scale[None, None])
    assert z.shape == (2, 16, 12)
    x = np.einsum("nhwpqc->nhpwqc", z.reshape(2, 4, 4, 2, 2, 3)).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(x, latents(model, images), atol=1e-5)
    np.testing.assert_array_equal(z[1, 6, 3:6], x[1, 2, 5])  # Row 0, column 1.


def test_convolutions_decode_their_tokens(conv):
    code, model, images = conv
    expected = nnx.jit(lambda m, z: 2 * m.decode(z) - 1)(model, latents(model, images))
    found = jax.jit(lambda code, z: code.decode(z))(code, encode(code, images))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_moments_of_convolutions_are_scaled_as_their_latents(conv):
    code, model, images = conv
    key = jax.random.key(3)
    mean, variance = jax.jit(lambda code, images: code.moments(images))(code, images)
    eps = jax.random.normal(key, mean.shape)
    expected = (mean + jnp.sqrt(variance) * eps) / code.scale[None, None]
    np.testing.assert_allclose(encode(code, images, key), expected, atol=1e-5)
    spread = nnx.jit(lambda e, x: e.variances(e.moments(x)))(model.encoder, images)
    np.testing.assert_allclose(variance, patches.patchify(spread, 2), rtol=1e-6)


def test_critic_sees_patches_of_70_pixels():
    """By the gradient of one logit, its norms left out: they see all images."""
    critic = nnx.jit(lambda: patchgan.PatchGAN(2, 3, rngs=nnx.Rngs(0)))()
    critic.norms = nnx.List([partial(jnp.add, 0.0)] * 3)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 96, 96, 3))

    @jax.jit
    def gradient(images):
        return jax.grad(lambda x: critic(x)[0, 5, 5])(images), critic(images).shape

    grads, shape = gradient(jnp.asarray(images, jnp.float32))
    assert shape == (1, 10, 10)
    seen = np.flatnonzero(np.abs(grads).sum(axis=(0, 2, 3)))
    assert seen[-1] - seen[0] + 1 == 70


def test_critic_has_the_sizes_of_latent_diffusion():
    """Widths 64, 128, 256, 512; kernels of 4; norms in place of biases."""
    critic = nnx.eval_shape(lambda: patchgan.PatchGAN(rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(state.param_dict(critic))
    widths = [3, 64, 128, 256, 512, 1]
    expected = sum(16 * a * b for a, b in zip(widths, widths[1:], strict=False))
    expected += 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(p.size for p in params) == expected == 2_765_633


def test_critic_of_small_images_is_refused():
    critic = nnx.jit(lambda: patchgan.PatchGAN(2, 3, rngs=nnx.Rngs(0)))()
    with pytest.raises(ValueError, match="16x16 pixels are too small.*3 layers"):
        critic(jnp.ones((1, 16, 16, 3)))
