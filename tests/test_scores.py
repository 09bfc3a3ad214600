"""Frechet distance, PSNR, SSIM and the reconstruction loss.

The arrays in golden/ were computed with the official PyTorch code of RAE on a CPU,
and the tolerances are those of float32 there, unless a test says otherwise.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from rae_jax.evaluation import frechet, reconstruction
from rae_jax.losses import reconstruction as reconstruction_losses

GOLDEN = pathlib.Path(__file__).parent / "golden"


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def load_golden(name, prefix=""):
    with np.load(GOLDEN / name) as file:
        keys = [key for key in file.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): file[key] for key in keys}


def moments_of(features):
    return frechet.add(frechet.Moments.empty(features.shape[1]), features)


@pytest.mark.parametrize(
    ("case", "rtol"), [("full_rank", 1e-6), ("rank_deficient", 1e-5)]
)
def test_frechet_distance_equals_the_official_evaluation(case, rtol):
    golden = load_golden("eval_metrics.npz", f"fid/{case}/")
    sets = {name: moments_of(golden[f"features_{name}"]) for name in "ab"}
    for name, moments in sets.items():
        np.testing.assert_allclose(moments.mean, golden[f"mu_{name}"], rtol=1e-12)
        np.testing.assert_allclose(
            moments.covariance, golden[f"sigma_{name}"], rtol=1e-10, atol=1e-12
        )
    distance = frechet.frechet_distance(sets["a"], sets["b"])
    np.testing.assert_allclose(distance, golden["scipy_sqrtm"], rtol=rtol)
    np.testing.assert_allclose(distance, golden["torch_fidelity"], rtol=rtol)
    swapped = frechet.frechet_distance(sets["b"], sets["a"])
    np.testing.assert_allclose(swapped, distance, rtol=rtol)
    own = frechet.frechet_distance(sets["a"], sets["a"])
    np.testing.assert_allclose(own, golden["self"], atol=1e-9 * distance)


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_moments_do_not_depend_on_batches_or_order(batch):
    """Features far from zero, where moments about zero would cancel."""
    rng = np.random.default_rng(0)
    features = 1e4 + rng.standard_normal((500, 12)) * np.logspace(-2, 2, 12)
    expected = np.cov(features, rowvar=False)
    features = features[rng.permutation(500)]
    whole = frechet.Moments.empty(12)
    for start in range(0, 500, batch):
        whole = frechet.add(whole, features[start : start + batch])
    assert whole.count == 500
    np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-13)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.max(np.abs(whole.covariance - expected) / scale) < 1e-10


def test_moments_merge_as_if_counted_together():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((90, 5)) + np.arange(5)
    merged = frechet.merge(moments_of(features[:20]), moments_of(features[20:]))
    whole = moments_of(features)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-10)
    empty = frechet.Moments.empty(5)
    for both in (frechet.merge(empty, whole), frechet.merge(whole, empty)):
        np.testing.assert_array_equal(both.scatter, whole.scatter)


def test_frechet_distance_of_commuting_gaussians_is_closed_form():
    """Equal eigenvectors: |m|^2 + sum of (sqrt(a_i) - sqrt(b_i))^2."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    a, b, mean = rng.random(16) * 9, rng.random(16), rng.standard_normal(16)
    a[:5] = 0.0  # Singular, as with fewer features than dimensions.
    expected = np.sum(mean**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    distance = frechet.gaussian_distance(
        np.zeros(16), (basis * a) @ basis.T, mean, (basis * b) @ basis.T
    )
    np.testing.assert_allclose(distance, expected, rtol=1e-10)


def test_frechet_distance_equals_the_general_matrix_root():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 30)) @ rng.standard_normal((30, 30))
    b = rng.standard_normal((150, 30)) @ rng.standard_normal((30, 30)) + 0.5
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    expected = shift + np.trace(cov_a + cov_b - 2 * root)
    distance = frechet.frechet_distance(moments_of(a), moments_of(b))
    np.testing.assert_allclose(distance, expected, rtol=1e-8)


def test_frechet_names_what_is_wrong():
    features = np.ones((3, 4))
    with pytest.raises(ValueError, match="2 features or more, not 1"):
        frechet.frechet_distance(moments_of(features[:1]), moments_of(features))
    with pytest.raises(ValueError, match=r"\(n, 4\), not \(3, 5\)"):
        frechet.add(moments_of(features), np.ones((3, 5)))
    with pytest.raises(ValueError, match="Widths differ: 4 and 5"):
        frechet.frechet_distance(moments_of(features), moments_of(np.ones((3, 5))))
    with pytest.raises(ValueError, match="Widths differ: 4 and 5"):
        frechet.merge(moments_of(features), moments_of(np.ones((3, 5))))
    features[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"not finite in rows \[1\]"):
        moments_of(features)


def test_psnr_and_ssim_equal_the_official_evaluation():
    """PSNR within 1e-4 dB, SSIM within 2e-5."""
    golden = load_golden("eval_metrics.npz", "iqa/")
    scores = jax.jit(reconstruction.image_scores)(golden["ref"], golden["rec"])
    np.testing.assert_allclose(scores["psnr"], golden["psnr_per_image"], atol=1e-4)
    np.testing.assert_allclose(scores["ssim"], golden["ssim_per_image"], atol=2e-5)
    means = reconstruction.ReconstructionScores().add(scores).means()
    np.testing.assert_allclose(means["psnr"], golden["psnr"], atol=1e-4)
    np.testing.assert_allclose(means["ssim"], golden["ssim"], atol=2e-5)


def test_uint8_conversion_truncates_as_the_official_code():
    golden = load_golden("eval_metrics.npz", "uint8/")
    images = golden["x"].transpose(0, 2, 3, 1)
    out = jax.jit(reconstruction.to_uint8)(images)
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, golden["out_nhwc"])
    assert np.any(np.round(images.clip(0, 1) * 255) != golden["out_nhwc"])


def test_image_scores_compare_what_would_be_saved():
    """Float and uint8 inputs agree, and excursions outside [0, 1] do not count."""
    images = (random_images(2, 16, 16, 3) * 255).astype(np.uint8)
    # Alike, since rounding is a large part of an SSIM near zero.
    recon = images / np.float32(255) + random_images(2, 16, 16, 3, seed=1) - 0.5
    assert recon.min() < -0.1 and recon.max() > 1.1
    expected = reconstruction.image_scores(images, np.asarray(recon.clip(0, 1)))
    saved = np.trunc(recon.clip(0, 1) * 255).astype(np.uint8)
    for other in (recon, saved):
        scores = reconstruction.image_scores(images, other)
        for name in ("psnr", "ssim"):
            np.testing.assert_allclose(scores[name], expected[name], rtol=1e-6)


def test_psnr_is_known_for_a_constant_error():
    a = np.full((2, 8, 8, 3), 0.5, np.float32)
    b = a + np.array([0.1, 0.01], np.float32)[:, None, None, None]
    np.testing.assert_allclose(reconstruction.psnr(a, b), [20.0, 40.0], atol=1e-3)
    np.testing.assert_allclose(reconstruction.psnr(a, a), 100.0, atol=1e-4)


def test_ssim_equals_its_definition_window_by_window():
    a, b = random_images(1, 14, 13, 2), random_images(1, 14, 13, 2, seed=1)
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    pads = ((5, 5), (5, 5), (0, 0))
    padded = [np.pad(z[0].astype(np.float64), pads, mode="reflect") for z in (a, b)]
    values = []
    for i, j, c in np.ndindex(14, 13, 2):
        x, y = (z[i : i + 11, j : j + 11, c] for z in padded)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        value = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
        values.append(value / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    np.testing.assert_allclose(reconstruction.ssim(a, b), np.mean(values), atol=1e-5)


def test_psnr_and_ssim_name_what_is_wrong():
    images = random_images(1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\) and \(1, 16, 12, 3\)"):
        reconstruction.psnr(images, images[:, :, :12])
    with pytest.raises(ValueError, match="over 5 pixels"):
        reconstruction.ssim(images[:, :5], images[:, :5])


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_scores_do_not_depend_on_the_batch_size(batch):
    """Padded rows hold garbage and do not count."""
    values = random_images(10).astype(np.float32)
    scores = reconstruction.ReconstructionScores()
    for start in range(0, 10, batch):
        part = values[start : start + batch]
        padding = np.full(batch - len(part), np.nan, np.float32)
        mask = np.arange(batch) < len(part)
        scores = scores.add({"psnr": np.concatenate([part, padding])}, mask)
    assert scores.count == 10
    np.testing.assert_allclose(
        scores.means()["psnr"], values.astype(np.float64).mean(), rtol=1e-14
    )


def test_scores_name_what_is_wrong():
    scores = reconstruction.ReconstructionScores()
    with pytest.raises(ValueError, match="No image"):
        scores.means()
    scores = scores.add({"psnr": np.ones(2)})
    with pytest.raises(ValueError, match=r"\['ssim'\] are not \['psnr'\]"):
        scores.add({"ssim": np.ones(2)})
    with pytest.raises(ValueError, match="'psnr' is not finite"):
        scores.add({"psnr": np.array([1.0, np.inf])})
    with pytest.raises(ValueError, match=r"shape \(2,\), the mask \(3,\)"):
        scores.add({"psnr": np.ones(2)}, np.ones(3))


def test_reconstruction_loss_adds_its_parts():
    images = random_images(2, 8, 8, 3)
    recon = random_images(2, 8, 8, 3, seed=1) * 1.5  # Not clipped.
    distances = jnp.array([0.25, 0.75])
    loss, metrics = reconstruction_losses.reconstruction_loss(
        images, recon, lambda a, b: distances * (a is not b), 0.5
    )
    expected = np.abs(images - recon).mean()
    np.testing.assert_allclose(metrics["loss_rec"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_lpips"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(loss, expected + 0.25, rtol=1e-6)
    np.testing.assert_array_equal(metrics["loss"], loss)
    loss, metrics = reconstruction_losses.reconstruction_loss(images, recon, None, 0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["loss_lpips"] == 0.0
    with pytest.raises(ValueError, match="Shapes differ"):
        reconstruction_losses.reconstruction_loss(images, recon[:1], None, 0.5)
