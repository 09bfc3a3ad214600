"""The representation autoencoder around any encoder and decoder."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.layers import resize
from rae_jax.models import decoder, encoders, rae
from rae_jax.training import state

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


class ToyEncoder:
    """Average colours of 4 x 4 blocks; remembers what it was given."""

    input_size, patch_size, hidden_size = 16, 4, 3
    image_mean, image_std = MEAN, STD

    def __call__(self, images):
        self.seen = images
        b = images.shape[0]
        blocks = images.reshape(b, 4, 4, 4, 4, 3)
        return jnp.mean(blocks, axis=(2, 4)).reshape(b, 16, 3)


def toy_decoder(tokens):
    """The inverse: constant blocks (b, 16, 16, 3)."""
    grid = tokens.reshape(tokens.shape[0], 4, 4, 3)
    return jnp.repeat(jnp.repeat(grid, 4, axis=1), 4, axis=2)


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).random((*shape, 3), np.float32)


def block_images(count):
    return np.asarray(toy_decoder(random_images(count, 16)))


def stats_of(shape, seed=0):
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=shape), rng.uniform(0.1, 3, shape)
    return {"mean": jnp.asarray(mean, "float32"), "var": jnp.asarray(var, "float32")}


def test_encoder_sees_normalised_pixels_of_its_size():
    images, encoder = random_images(2, 16, 16), ToyEncoder()
    z = rae.encode(encoder, images)
    np.testing.assert_allclose(encoder.seen, (images - MEAN) / STD, atol=1e-5)
    assert z.shape == (2, 4, 4, 3) and z.dtype == jnp.float32
    rows = (images.reshape(2, 4, 4, 4, 4, 3).mean(axis=(2, 4)) - MEAN) / STD
    np.testing.assert_allclose(z, rows, atol=1e-5)  # Row-major: [row, column].


@pytest.mark.parametrize("size", [(12, 12), (32, 32), (20, 28)])
def test_other_sizes_are_resized_as_the_official_code_does(size):
    images, encoder = random_images(2, *size), ToyEncoder()
    rae.encode(encoder, images)
    resized = np.asarray(resize.resize_bicubic(images, 16, 16))
    np.testing.assert_allclose(encoder.seen, (resized - MEAN) / STD, atol=1e-5)
    smooth = resize.resize_bicubic_antialias(images, 16, 16)
    assert size[0] < 16 or np.abs(resized - smooth).max() > 0.01


def test_decoding_inverts_the_normalisation():
    """The toy decoder inverts the toy encoder, so images come back; 1e-6."""
    images = block_images(3)
    z = rae.encode(ToyEncoder(), images)
    restored = rae.decode(toy_decoder, z, ToyEncoder())
    np.testing.assert_allclose(restored, images, atol=1e-6)
    bright = rae.decode(toy_decoder, z + 100, ToyEncoder())
    assert bright.max() > 1  # Not clipped.


def test_no_gradient_reaches_the_encoder():
    images = random_images(1, 16, 16)
    encoder = ToyEncoder()

    def loss(images):
        return jnp.sum(rae.encode(encoder, images) ** 2)

    def direct(images):
        return jnp.sum(encoder(images) ** 2)

    np.testing.assert_array_equal(jax.grad(loss)(images), 0)
    assert np.abs(jax.grad(direct)(images)).max() > 0.01


def test_no_noise_for_tau_zero():
    z = random_images(2, 4, 4)
    assert rae.add_noise(z, jax.random.key(0), 0.0) is z


@pytest.mark.parametrize(
    ("distribution", "mean", "second_moment"),
    [("uniform", 1 / 2, 1 / 3), ("half_normal", np.sqrt(2 / np.pi), 1.0)],
)
def test_noise_strength_is_drawn_per_sample(distribution, mean, second_moment):
    """Moments of sigma / tau over 4000 samples: three standard errors, about 3%."""
    tau, z = 0.8, jnp.full((4000, 4, 4, 32), 5.0)
    noisy = rae.add_noise(z, jax.random.key(1), tau, distribution)
    noise = np.asarray(noisy - z) / tau
    sigma = noise.std(axis=(1, 2, 3))
    np.testing.assert_allclose(sigma.mean(), mean, rtol=0.04)
    np.testing.assert_allclose(np.mean(sigma**2), second_moment, rtol=0.07)
    if distribution == "uniform":
        assert sigma.max() < 1.15 and sigma.min() < 0.05
    else:
        assert sigma.max() > 2
    # Within a sample one sigma: its two halves agree (512 values, 9% each).
    halves = noise[:, :2].std(axis=(1, 2, 3)) / noise[:, 2:].std(axis=(1, 2, 3))
    np.testing.assert_allclose(halves, 1, atol=0.4)
    white = noise / sigma[:, None, None, None]
    assert abs(white.mean()) < 0.005
    assert abs(np.corrcoef(white[:, 0, 0, 0], white[:, 0, 0, 1])[0, 1]) < 0.06


def test_unknown_noise_is_named():
    with pytest.raises(ValueError, match="Unknown noise 'normal'"):
        rae.add_noise(jnp.zeros((1, 2, 2, 1)), jax.random.key(0), 0.5, "normal")


def test_statistics_normalise_and_invert():
    stats = stats_of((4, 4, 3))
    z = random_images(5, 4, 4) * 3
    normalised = rae.normalize(z, stats)
    mean, var = np.asarray(stats["mean"]), np.asarray(stats["var"])
    expected = (z - mean[None]) / np.sqrt(var[None] + 1e-5)
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rae.denormalize(normalised, stats), z, atol=1e-5)
    unit = {"mean": jnp.zeros((4, 4, 3)), "var": jnp.ones((4, 4, 3))}
    np.testing.assert_allclose(rae.normalize(z, unit), z, rtol=1e-5)


def test_the_autoencoder_is_the_sum_of_its_functions():
    sizes = chain.encoder().sizes.to_dict()
    encoder = nnx.jit(
        lambda: encoders.make_encoder("ldae", rngs=nnx.Rngs(0), **sizes)
    )()
    net = nnx.jit(
        lambda: decoder.RAEDecoder(32, 16, 8, 32, 1, 2, 64, rngs=nnx.Rngs(1))
    )()
    model = rae.RAE(encoder, net, (4, 4, 32))
    images = random_images(2, 40, 40)
    z = jax.jit(lambda images: rae.encode(encoder, images))(images)
    encode = nnx.jit(lambda model, images: model.encode(images))
    unit = {"mean": jnp.zeros((4, 4, 32)), "var": jnp.ones((4, 4, 32))}
    np.testing.assert_allclose(
        encode(model, images), rae.normalize(z, unit), rtol=1e-5, atol=1e-6
    )

    stats = stats_of((4, 4, 32))
    model.latent_mean[...], model.latent_var[...] = stats["mean"], stats["var"]
    expected = rae.normalize(z, stats)
    np.testing.assert_allclose(encode(model, images), expected, rtol=1e-5, atol=1e-6)
    decoded = jax.jit(model.decode)(expected)
    assert decoded.shape == (2, 32, 32, 3)
    plain = jax.jit(lambda z: rae.decode(net, z, encoder))(z)
    np.testing.assert_allclose(decoded, plain, atol=1e-5)
    names = set(state.param_dict(model))
    assert names == {"encoder", "decoder", "latent_mean", "latent_var"}
