"""The loss of l-DAE, for every step from a diffusion model to its final form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from pca_data import DIM, LATENT, PATCH, fit, smooth_images, tokens_of

from rae_jax import config as configs
from rae_jax.diffusion import schedules
from rae_jax.layers import patches
from rae_jax.losses import denoising
from rae_jax.models import tokenizers
from rae_jax.trainers import tokenizer_networks as networks

FINAL = dict(schedule="linear_sigma", input_space="image", target="image")
COMBINATIONS = [(i, t) for i in denoising.INPUTS for t in denoising.TARGETS]


@pytest.fixture(scope="module")
def pca():
    return tokenizers.make_pca(fit(tokens_of(smooth_images(64))), LATENT)


def numpy_loss(net, images, pca, t, eps, options):
    """Eq. 2 to 4, written on its own in float64, patch by patch."""
    gamma2 = {
        "ddpm_linear": np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)),
        "linear_gamma2": 1 - np.arange(1, 1001) / 1000,
    }.get(options["schedule"])
    if gamma2 is None:
        gamma, sigma = np.ones(1000), np.linspace(0, np.sqrt(2), 1000)
    else:
        gamma, sigma = np.sqrt(gamma2), np.sqrt(1 - gamma2)
    v, mean, scale = (
        np.asarray(a, np.float64) for a in (pca.basis, pca.mean, pca.scale)
    )
    d, size = pca.latent_dim, images.shape[1] // PATCH
    total = 0.0
    for i, image in enumerate(2.0 * images - 1):
        for n in range(size**2):
            row, column = divmod(n, size)
            block = image[row * PATCH :, column * PATCH :][:PATCH, :PATCH]
            x = block.reshape(-1)
            z = (v[:d] @ (x - mean)) / scale
            z_t = gamma[t[i]] * z + sigma[t[i]] * eps[i, n]
            pixels = v[:d].T @ (scale * z_t) + mean
            out = net(pixels if options["input_space"] == "image" else z_t, t[i])
            if options["target"] == "image":
                r = v @ (x - out)
                error = np.r_[r[:d] ** 2, options["residual_weight"] * r[d:] ** 2]
            elif options["target"] == "image_pca":
                error = (v[:d].T @ (scale * z) + mean - out) ** 2
            else:
                error = ((z if options["target"] == "latent" else eps[i, n]) - out) ** 2
            weight = 1.0
            if options["target"] != "eps":
                weight = gamma[t[i]] ** 2 / (gamma[t[i]] ** 2 + sigma[t[i]] ** 2)
            total += weight * error.mean()
    return total / len(images) / size**2


def draws(key, batch, tokens, latent=LATENT):
    """The levels and the noise that the loss draws."""
    t_key, eps_key = jax.random.split(key)
    t = jax.random.randint(t_key, (batch,), 0, 1000)
    return np.asarray(t), np.asarray(
        jax.random.normal(eps_key, (batch, tokens, latent))
    )


@pytest.mark.parametrize("schedule", ["linear_sigma", "linear_gamma2", "ddpm_linear"])
@pytest.mark.parametrize(("input_space", "target"), COMBINATIONS)
def test_loss_equals_an_independent_one(pca, schedule, input_space, target):
    """Every step of the paper's path; float32 against float64, 2e-5."""
    images = smooth_images(3, size=16)
    key = jax.random.key(5)
    options = dict(
        schedule=schedule, input_space=input_space, target=target, residual_weight=0.3
    )
    width = DIM if input_space == "image" else LATENT
    out = LATENT if target in ("eps", "latent") else DIM
    weight = np.random.default_rng(1).normal(0, 0.2, (width, out))

    def net(x, t):
        return jnp.tanh(x @ weight.astype(np.float32)) + t[:, None, None] / 1000

    found, metrics = denoising.denoising_loss(net, images, pca, key, **options)
    t, eps = draws(key, 3, 16)
    expected = numpy_loss(
        lambda x, t: np.tanh(x @ weight) + t / 1000, images, pca, t, eps, options
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_array_equal(metrics["loss"], found)


def test_noise_loss_is_a_reweighted_clean_loss(pca):
    """(a): |eps - e|^2 = gamma^2 / sigma^2 |z_0 - z|^2 for the z that e implies."""
    images, key = smooth_images(1, size=16), jax.random.key(2)
    options = dict(schedule="linear_gamma2", input_space="latent")
    gamma, sigma = schedules.noise_schedule("linear_gamma2")
    (t,), _ = draws(key, 1, 16)
    ratio = gamma[t] / sigma[t]

    def clean(z_t, _):
        return 0.3 * z_t + 0.1

    def noise(z_t, t):
        return (z_t - gamma[int(t[0])] * clean(z_t, t)) / sigma[int(t[0])]

    eps_loss, _ = denoising.denoising_loss(
        noise, images, pca, key, target="eps", **options
    )
    clean_loss, metrics = denoising.denoising_loss(
        clean, images, pca, key, target="latent", **options
    )
    np.testing.assert_allclose(eps_loss, ratio**2 * metrics["mse"], rtol=1e-4)
    np.testing.assert_allclose(clean_loss, gamma[t] ** 2 * metrics["mse"], rtol=1e-5)


def test_weights_are_the_squared_signal_share():
    """(b): 1 / (1 + sigma^2) is gamma^2 of the variance-preserving process."""
    for name in ("ddpm_linear", "linear_gamma2"):
        gamma, _ = schedules.noise_schedule(name)
        weights = denoising.weights(name, "latent")
        np.testing.assert_allclose(weights, gamma**2, rtol=1e-5, atol=1e-7)
    for name in ("linear_sigma", "single_sigma"):
        _, sigma = schedules.noise_schedule(name)
        weights = denoising.weights(name, "image")
        np.testing.assert_allclose(weights, 1 / (1 + sigma**2), rtol=1e-6)
    weights = np.asarray(denoising.weights("linear_sigma", "image"))
    printed = {0: 1, 10: 0.999800, 500: 0.666222, 999: 0.333333}
    for t, value in printed.items():
        np.testing.assert_allclose(weights[t], value, atol=1e-6)
    np.testing.assert_array_equal(denoising.weights("ddpm_linear", "eps"), 1)


def test_weightings_by_name():
    """Explicit names, where they differ from the paper's choice."""
    gamma, sigma = schedules.noise_schedule("linear_gamma2")
    for name, expected in {
        "one": np.ones(1000),
        "gamma2": gamma**2,
        "inverse": 1 / (1 + sigma**2),
    }.items():
        for target in ("eps", "latent"):
            found = denoising.weights("linear_gamma2", target, weighting=name)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    weights = denoising.weights("linear_sigma", "image", weighting="gamma2")
    np.testing.assert_array_equal(weights, 1)


def test_pixels_are_the_identity_as_a_basis():
    """Noise on patches themselves; every target but noise is the same then."""
    pixels, images = tokenizers.make_pixels(PATCH), smooth_images(2, size=16)

    def net(x, t):
        return jnp.sin(3 * x)

    def loss(**options):
        space = dict(schedule="linear_gamma2", input_space="latent")
        key = jax.random.key(4)
        return denoising.denoising_loss(net, images, pixels, key, **space | options)[0]

    expected = loss(target="latent")
    for options in (
        dict(target="image", residual_weight=0.5),
        dict(target="image_pca"),
        dict(target="latent", input_space="image"),
    ):
        np.testing.assert_allclose(loss(**options), expected, rtol=1e-5)
    assert abs(loss(target="eps") - expected) > 1e-3


def test_latents_are_drawn_where_they_have_a_posterior():
    """With a key of its own: the noise of the process stays the same."""
    block = ConfigDict(dict(name="patch_vae", patch_size=PATCH, latent_dim=LATENT))
    network = networks.make_network(block, 16, rngs=nnx.Rngs(0))
    code = networks.wrap(block, network, jnp.ones(LATENT))
    images = 2 * smooth_images(2, size=16) - 1
    t, eps = jnp.asarray([3, 900]), jnp.ones((2, 16, LATENT))
    options = dict(schedule="linear_gamma2")
    mean, of_mean = denoising.noised(code, images, t, eps, **options)
    key = jax.random.key(0)
    drawn, of_drawn = denoising.noised(code, images, t, eps, key=key, **options)
    assert np.abs(drawn - mean).max() > 0.1
    gamma = schedules.noise_schedule("linear_gamma2")[0][np.asarray(t)]
    difference = gamma[:, None, None] * (drawn - mean)
    np.testing.assert_allclose(of_drawn - of_mean, difference, atol=1e-6)


def test_a_learned_variance_adds_its_bound(pca):
    images, key = smooth_images(2, size=16), jax.random.key(5)
    options = dict(schedule="ddpm_linear", input_space="latent", target="eps")

    def plain(z_t, t):
        return 0.9 * z_t

    def both(z_t, t):
        return jnp.concatenate([plain(z_t, t), jnp.tanh(z_t)], axis=-1)

    loss, metrics = denoising.denoising_loss(
        both, images, pca, key, learn_sigma=True, **options
    )
    alone, _ = denoising.denoising_loss(plain, images, pca, key, **options)
    assert metrics["vlb"] > 0
    np.testing.assert_allclose(loss - metrics["vlb"], alone, rtol=1e-5)


def test_equal_component_weights_are_the_pixel_error(pca):
    """(c): the basis is orthonormal, so Eq. 4 with weight 1 is the pixel MSE."""
    images, key = smooth_images(1, size=16), jax.random.key(3)
    x = np.asarray(patches.patchify(2 * images - 1, PATCH))

    def net(noisy, _):
        return jnp.sin(3 * noisy)

    def run(weight):
        return denoising.denoising_loss(net, images, pca, key, residual_weight=weight)[
            1
        ]["mse"]

    (t,), eps = draws(key, 1, 16)
    sigma = schedules.noise_schedule("linear_sigma")[1][t]
    noisy = pca.decode_patches(pca.encode_patches(x) + sigma * eps)
    np.testing.assert_allclose(run(1.0), np.mean((x - net(noisy, t)) ** 2), rtol=1e-5)
    assert run(0.1) < 0.95 * run(1.0)


def test_wrong_loss_settings_are_named():
    for name, value in (
        ("input_space", "pixels"),
        ("target", "noise"),
        ("schedule", "cosine"),
        ("weighting", "snr"),
    ):
        with pytest.raises(ValueError, match=f"{name} '{value}'"):
            denoising.check(**FINAL | {name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tokenizer="conv_vae"), "'pca' or 'pixels', not 'conv_vae'"),
        (dict(tokenizer="patch_ae", input_space="latent"), "not 'patch_ae'"),
        (dict(learn_sigma=True), "not with 'image' and 'linear_sigma'"),
        (
            dict(learn_sigma=True, target="eps", input_space="latent"),
            "not with 'eps' and 'linear_sigma'",
        ),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(configs.ConfigError, match=message):
        denoising.check(**FINAL | settings)
    denoising.check(**FINAL)
