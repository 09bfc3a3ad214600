"""Moments, Inception Score, precision and recall: against formulas and closed forms."""

import pathlib

import image_sets
import numpy as np
import pytest

from rae_jax.evaluation import frechet, inception_score, precision_recall
from rae_jax.training import sharding

GOLDEN = pathlib.Path(__file__).parent / "golden"


# Moments, Inception Score, precision and recall alone.


def test_moments_stream_equals_all_at_once():
    rng = np.random.default_rng(0)
    x = (3.0 + rng.standard_normal((2500, 4))).astype(np.float32)  # Over two blocks.
    results = []
    for size in (1, 700, 2500):
        stream = frechet.MomentsStream(4)
        for part in image_sets.parts(x, size):
            stream.add(part)
        results.append(stream.result())
    np.testing.assert_allclose(results[0].mean, x.mean(axis=0, dtype=float), rtol=1e-12)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(results[0].covariance, expected, rtol=1e-10, atol=1e-12)
    for other in results[1:]:  # To the bit.
        np.testing.assert_array_equal(other.scatter, results[0].scatter)
        np.testing.assert_array_equal(other.mean, results[0].mean)
    with pytest.raises(ValueError, match=r"\(n, 4\), not \(2, 3\)"):
        frechet.MomentsStream(4).add(np.zeros((2, 3)))


def score_of(logits, split_size, size=50):
    score = inception_score.InceptionScore(split_size)
    for part in image_sets.parts(logits, size):
        score.add(part)
    return score.result()


def test_inception_score_equals_torch_fidelity():
    with np.load(GOLDEN / "inception_score.npz") as golden:
        logits = golden["logits"]
        expected = {210: golden["splits1"], 21: golden["splits10"]}
    for split_size, values in expected.items():
        for size in (1, 50, 210):
            found = score_of(logits, split_size, size)
            np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-12)


def test_inception_score_in_closed_form():
    """Certain about equally many classes: their number. Always the same: 1."""
    certain = 1e4 * np.eye(7)[np.arange(21) % 7]
    np.testing.assert_allclose(score_of(certain, 5000), (7.0, 0.0), rtol=1e-12)
    np.testing.assert_allclose(score_of(certain[:1].repeat(9, 0), 5), (1.0, 0.0))
    # A last, shorter split counts as the others: 7 classes in one, 3 in the other.
    np.testing.assert_allclose(score_of(certain[:10], 7), (5.0, 2.0), rtol=1e-12)
    with pytest.raises(ValueError, match="No image"):
        inception_score.InceptionScore().result()
    with pytest.raises(ValueError, match="finite"):
        score_of(np.full((2, 3), np.nan), 5)
    with pytest.raises(ValueError, match="split_size"):
        inception_score.InceptionScore(0)


@pytest.mark.parametrize("devices", [1, 8])
def test_precision_and_recall_equal_brute_force(monkeypatch, devices):
    """In blocks that do not divide the sets, far from zero."""
    monkeypatch.setattr(precision_recall, "_ROWS", 16)
    monkeypatch.setattr(precision_recall, "_COLUMNS", 24)
    rng = np.random.default_rng(0)
    reference = 50 + rng.standard_normal((70, 4))
    samples = 50 + 0.8 * rng.standard_normal((53, 4)) + 0.7
    mesh = sharding.make_mesh(devices)
    found = precision_recall.precision_recall(reference, samples, mesh=mesh)
    expected = image_sets.shares_by_brute_force(reference, samples)
    assert 0.2 < min(expected) < max(expected) < 0.98
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (
        precision_recall.precision_recall(samples, reference, mesh=mesh) == found[::-1]
    )


def test_precision_and_recall_of_extremes():
    x = np.random.default_rng(0).standard_normal((20, 3))
    assert precision_recall.precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall.precision_recall(x, x + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 images per set, not 3"):
        precision_recall.precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=r"\(20, 3\) and \(20, 2\)"):
        precision_recall.precision_recall(x, x[:, :2])
