"""Patch PCA and pixels: exact moments, the basis, the scale of latents, mistakes."""

import jax
import numpy as np
import pytest
from pca_data import DIM, LATENT, PATCH, fit, smooth_images, tokens_of

from rae_jax.models import tokenizers


@pytest.fixture(scope="module")
def components():
    return fit(tokens_of(smooth_images(64)))


@pytest.fixture(scope="module")
def pca(components):
    return tokenizers.make_pca(components, LATENT)


@pytest.fixture(scope="module")
def images():
    """Held-out images in [-1, 1]."""
    return 2 * smooth_images(3, start=900) - 1


def pixels_of_patches(count, dim=DIM):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, dim), dtype=np.uint8)


def test_streamed_components_are_those_of_the_covariance(components):
    """Against NumPy's covariance in float64, to 1e-10 of the largest variance."""
    data = tokens_of(smooth_images(64)).astype(np.float64)
    covariance = np.cov(data, rowvar=False, bias=True)
    variances, basis = components["variances"], components["basis"]
    np.testing.assert_allclose(components["mean"], data.mean(axis=0), atol=1e-12)
    rebuilt = (basis.T * variances[None, :]) @ basis
    np.testing.assert_allclose(rebuilt, covariance, atol=1e-10 * variances[0])
    assert (np.diff(variances) <= 0).all()
    largest = basis[np.arange(DIM), np.abs(basis).argmax(axis=1)]
    assert (largest > 0).all()


def test_pixels_of_files_are_summed_up_exactly():
    """Also at the extremes, where float32 sums of products come to 2^24."""
    for data in (pixels_of_patches(2500), np.zeros((2500, DIM), np.uint8)):
        moments = tokenizers.PatchMoments(DIM)
        moments.add(data)
        centred = data.astype(np.int64) - 128
        upper = np.triu(centred.T @ centred)
        np.testing.assert_array_equal(np.triu(moments._products), upper)
        np.testing.assert_array_equal(moments._sum, centred.sum(axis=0))


def test_pixels_and_floats_give_the_same_components():
    data = pixels_of_patches(500)
    exact, floats = fit(data), fit(data / 127.5 - 1.0)
    for name in exact:
        np.testing.assert_allclose(exact[name], floats[name], atol=1e-10)


def test_components_of_pixels_do_not_depend_on_order_or_batches():
    """To the bit."""
    data = pixels_of_patches(2000)
    whole = fit(data)
    found = fit(data[np.random.default_rng(1).permutation(len(data))], splits=7)
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("splits", [2, 100])
def test_components_of_floats_do_not_depend_on_the_batches(components, splits):
    """Eigenvectors move by rounding over the gap to the next variance."""
    data = tokens_of(smooth_images(64))
    found = fit(data[np.random.default_rng(0).permutation(len(data))], splits)
    for name in ("mean", "variances"):
        np.testing.assert_allclose(found[name], components[name], atol=1e-10)
    np.testing.assert_allclose(found["basis"], components["basis"], atol=1e-6)


def test_one_fit_serves_every_dimension(components, images):
    """Latents of fewer dimensions are the first of those of more."""
    z = {d: tokenizers.make_pca(components, d, "none").encode(images) for d in (4, 20)}
    np.testing.assert_allclose(z[4], z[20][..., :4], atol=1e-6)


def test_too_few_patches_are_refused():
    with pytest.raises(ValueError, match="48 patches cannot determine 48"):
        fit(np.zeros((DIM, DIM)))


@pytest.mark.parametrize("norm", tokenizers.NORMS)
def test_basis_is_orthonormal_and_complete(components, images, norm):
    """V V^T = I; at full dimension decoding inverts encoding; both to 1e-5."""
    full = tokenizers.make_pca(components, DIM, norm)
    np.testing.assert_allclose(full.basis @ full.basis.T, np.eye(DIM), atol=1e-5)
    np.testing.assert_allclose(full.decode(full.encode(images)), images, atol=1e-5)


def test_decoding_fewer_components_projects(components, pca, images):
    once = pca.decode(pca.encode(images))
    np.testing.assert_allclose(pca.decode(pca.encode(once)), once, atol=1e-5)
    lost = tokens_of((images - once + 1) / 2)[None]
    np.testing.assert_allclose(pca.components(lost)[..., :LATENT], 0, atol=1e-5)
    unexplained = components["variances"][LATENT:].sum() / DIM
    fitted = 2 * smooth_images(64) - 1
    error = np.mean((pca.decode(pca.encode(fitted)) - fitted) ** 2)
    np.testing.assert_allclose(error, unexplained, rtol=1e-3)


def test_pixels_are_patches_and_their_order_that_of_the_network(images):
    """Row, column, channel; scaled latents decode to the same images."""
    plain = tokenizers.make_pixels(PATCH)
    z = np.asarray(plain.encode(images)).reshape(3, 8, 8, PATCH, PATCH, 3)
    np.testing.assert_array_equal(z[1, 2, 5], images[1, 8:12, 20:24])
    scaled = tokenizers.make_pixels(PATCH, np.full(DIM, 0.4))
    np.testing.assert_allclose(scaled.encode(images), plain.encode(images) / 0.4)
    np.testing.assert_allclose(scaled.decode(scaled.encode(images)), images, rtol=1e-6)


def test_affine_maps_are_those_of_encoding_and_decoding(pca, images):
    x = tokens_of((images + 1) / 2)
    kernel, bias = pca.affine()
    z = np.asarray(x @ kernel + bias[None])
    np.testing.assert_allclose(z, pca.encode_patches(x[None])[0], atol=1e-5)
    kernel, bias = pca.inverse_affine()
    found = np.asarray(z @ kernel + bias[None])
    np.testing.assert_allclose(found, pca.decode_patches(z[None])[0], atol=1e-5)


def test_nothing_is_drawn(pca, images):
    drawn = pca.encode(images, jax.random.key(0))
    np.testing.assert_array_equal(drawn, pca.encode(images))
    mean, variance = pca.moments(images)
    np.testing.assert_allclose(mean / pca.scale[None, None], drawn, rtol=1e-6)
    np.testing.assert_array_equal(variance, 0)


def test_latents_have_the_promised_scale(components):
    """Held-out patches, 1e-2 for all entries together, 0.1 for each channel."""
    held_out = 2 * smooth_images(512, start=512) - 1
    many = fit(tokens_of(smooth_images(512)))
    z = {
        norm: np.asarray(tokenizers.make_pca(many, LATENT, norm).encode(held_out))
        for norm in tokenizers.NORMS
    }
    assert abs(z["global"].std() - 1) < 1e-2
    assert np.ptp(z["global"].std(axis=(0, 1))) > 0.5  # One scale, not whitening.
    np.testing.assert_allclose(z["per_channel"].std(axis=(0, 1)), 1, atol=0.1)
    patches = tokens_of((held_out + 1) / 2).reshape(512, -1, DIM)
    plain = (patches - many["mean"][None, None]) @ many["basis"][:LATENT].T
    np.testing.assert_allclose(z["none"], plain, atol=1e-5)


def test_scale_counts_differences_between_the_means_of_channels():
    mean, variance = np.array([1.0, 3.0]), np.array([2.0, 4.0])
    one = tokenizers.latent_scale("global", mean, variance)
    np.testing.assert_allclose(one, np.sqrt(3 + 1))
    each = tokenizers.latent_scale("per_channel", mean, variance)
    np.testing.assert_allclose(each, np.sqrt(variance))
    np.testing.assert_array_equal(tokenizers.latent_scale("none", mean, variance), 1)
    with pytest.raises(ValueError, match="no scale"):
        tokenizers.latent_scale("global", np.zeros(2), np.zeros(2))


def test_components_survive_a_file(components, tmp_path):
    path = tmp_path / "tokenizer.npz"
    tokenizers.save_components(path, components)
    loaded = tokenizers.load_components(path)
    assert loaded.keys() == components.keys()
    for name, values in components.items():
        np.testing.assert_array_equal(loaded[name], values)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.npz"]


def test_wrong_settings_are_named(components, pca):
    with pytest.raises(ValueError, match="latent norm 'globl'. Did you mean 'global'"):
        tokenizers.make_pca(components, LATENT, "globl")
    with pytest.raises(ValueError, match="latent_dim = 49 is not within 1 and the 48"):
        tokenizers.make_pca(components, DIM + 1)
    with pytest.raises(ValueError, match="30x30 is not a multiple of patch_size 4"):
        pca.encode(np.zeros((1, 30, 30, 3), np.float32))
