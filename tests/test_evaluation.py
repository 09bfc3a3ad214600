"""Image sets against references: streams, statistics, FID, IS, precision, recall.

A small linear map stands in for Inception: everything around the network is the same.
"""

import image_sets
import jax
import numpy as np
import pytest
import scipy.linalg

from rae_jax.evaluation import frechet, quality

SIDE = 8


def measured(images, net=None, size=5, **options):
    return quality.measure(
        net or image_sets.network(), image_sets.parts(images, size), "set", **options
    )


def fid_by_scipy(a, b):
    """The textbook formula, with the root of a general matrix."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return shift + np.trace(covariances[0] + covariances[1] - 2 * root)


def inception_score_by_definition(logits):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())


# The whole protocol.


def test_scores_equal_independent_formulas():
    samples, reference = (
        image_sets.pictures(60, seed=1, high=230),
        image_sets.pictures(90, seed=2),
    )
    result = quality.compare(
        measured(samples, keep=True), measured(reference, keep=True), prefix="g"
    )
    a, b = image_sets.on_host(samples), image_sets.on_host(reference)
    precision, recall = image_sets.shares_by_brute_force(b["pool"], a["pool"])
    expected = {
        "gfid_60": fid_by_scipy(a["pool"], b["pool"]),
        "sfid_60": fid_by_scipy(a["spatial"], b["spatial"]),
        "inception_score": inception_score_by_definition(a["logits"]),
        "inception_score_std": 0.0,
        "precision": precision,
        "recall": recall,
    }
    assert 0 < precision < 1 and 0 < recall < 1
    assert set(result.scores) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result.scores[name], value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "batch_size, devices, size", [(1, 1, 40), (16, 8, 3), (40, 8, 7)]
)
def test_scores_depend_on_neither_batches_nor_devices(batch_size, devices, size):
    images, reference = (
        image_sets.pictures(40, seed=1),
        measured(image_sets.pictures(30), keep=True),
    )

    def scores(*network_of, size):
        found = measured(images, image_sets.network(*network_of), size, keep=True)
        return quality.compare(found, reference).scores

    found, expected = scores(batch_size, devices, size=size), scores(8, 1, size=5)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_masked_rows_do_not_count():
    net, images = image_sets.network(), image_sets.pictures(16)
    found = quality.Collector(net, "set", keep=True)
    mask = np.arange(16) % 3 != 0
    found.add_features(jax.device_get(net(images[:8])), mask[:8])
    found.add_features(jax.device_get(net(images[8:])), mask[8:].astype(np.float32))
    expected = measured(images[mask], keep=True)
    found = found.finish()
    assert found.count == expected.count == mask.sum()
    np.testing.assert_allclose(found.pool, expected.pool, rtol=1e-6)
    np.testing.assert_allclose(found.inception_score, expected.inception_score)


def test_features_are_of_uint8_images():
    net = image_sets.network()
    with pytest.raises(ValueError, match="uint8.*float32"):
        net(np.zeros((2, SIDE, SIDE, 3), np.float32))
    with pytest.raises(ValueError, match="batch_size"):
        image_sets.network(batch_size=0)
    collector = quality.Collector(net, "set")
    collector.add(image_sets.pictures(2))
    with pytest.raises(ValueError, match=r"set: images of \(4, 8\) follow"):
        collector.add(image_sets.pictures(2)[:, :4])
    with pytest.raises(ValueError, match="2 images or more, not 1"):
        measured(image_sets.pictures(1))


# Notes and names.


def test_notes_name_bias_rank_and_size():
    few, reference = measured(image_sets.pictures(6)), measured(image_sets.pictures(30))
    assert few.size == (SIDE, SIDE)
    notes = " ".join(quality.compare(few, reference).notes)
    assert "The set has 6 images, fewer than 10000" in notes
    assert "The set has a covariance of rank 5 in 12 features" in notes
    assert "The reference has a covariance" not in notes
    small = quality.Collector(image_sets.network(), "set")
    small.add_features(image_sets.on_host(image_sets.pictures(30)))
    small = small.finish()
    many = [
        quality.Measured("x", "inception", 10_000, small.gaussians, size=size)
        for size in ((8, 8), (8, 8), (64, 32))
    ]
    assert not quality.compare(many[0], many[1]).notes
    (note,) = quality.compare(many[0], many[2]).notes
    assert "8 x 8 pixels, those of the reference 32 x 64" in note


def test_names_of_scores():
    found = measured(image_sets.pictures(20), image_sets.network(name="fd_other"))
    scores = quality.compare(found, found, prefix="g").scores
    assert set(scores) == {"fd_other"} and scores["fd_other"] < 1e-9
    with pytest.raises(ValueError, match="by fd_other, set by inception"):
        quality.compare(found, measured(image_sets.pictures(20)))
    labels = [quality.count_label(n) for n in (50_000, 160, 1234, 0)]
    assert labels == ["50k", "160", "1234", "0"]
    only = quality.compare(
        *[measured(image_sets.pictures(20))] * 2, prefix="r", full=False
    )
    assert set(only.scores) == {"rfid_20"}


# References.


def statistics(images, *names):
    found = image_sets.on_host(images)
    moments = {
        "mu": found["pool"].mean(axis=0),
        "sigma": np.cov(found["pool"], rowvar=False),
        "mu_s": found["spatial"].mean(axis=0),
        "sigma_s": np.cov(found["spatial"], rowvar=False),
        "arr_0": images,
    }
    return {name: moments[name] for name in names}


@pytest.mark.parametrize(
    "names, scores",
    [
        (("mu", "sigma"), {"fid_20"}),
        (("mu", "sigma", "mu_s", "sigma_s"), {"fid_20", "sfid_20"}),
        (("arr_0",), {"fid_20", "sfid_20", "precision", "recall"}),
        (("arr_0", "mu", "sigma"), {"fid_20", "sfid_20", "precision", "recall"}),
    ],
)
def test_references_of_adm(tmp_path, names, scores):
    reference, samples = (
        image_sets.pictures(30, seed=3),
        measured(image_sets.pictures(20), keep=True),
    )
    np.savez(tmp_path / "ref.npz", **statistics(reference, *names))
    read = quality.read_reference(image_sets.network(), tmp_path / "ref.npz", keep=True)
    found = quality.compare(samples, read).scores
    assert set(found) == scores | {"inception_score", "inception_score_std"}
    expected = quality.compare(samples, measured(reference, keep=True)).scores
    for name in scores:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_statistics_of_a_file_win_over_its_images(tmp_path):
    """ADM's references have the moments of all images and the pixels of a few."""
    many, few = image_sets.pictures(60, seed=3), image_sets.pictures(20, seed=4)
    arrays = statistics(many, "mu", "sigma") | {"arr_0": few}
    np.savez(tmp_path / "ref.npz", **arrays)
    read = quality.read_reference(image_sets.network(), tmp_path / "ref.npz", keep=True)
    np.testing.assert_array_equal(read.gaussians["pool"].mean, arrays["mu"])
    assert read.count is None and read.pool.shape == (20, 12)


def test_saved_statistics_are_a_reference(tmp_path):
    images = measured(image_sets.pictures(30))
    quality.save_statistics(tmp_path / "new" / "ref.npz", images)
    read = quality.read_reference(
        image_sets.network(), tmp_path / "new" / "ref.npz", keep=True
    )
    assert read.count == 30 and read.pool is None
    scores = quality.compare(images, read).scores
    np.testing.assert_allclose([scores["fid_30"], scores["sfid_30"]], 0, atol=1e-9)


def test_saved_statistics_are_those_of_one_network(tmp_path):
    path, other = tmp_path / "ref.npz", image_sets.network(name="fd_other")
    images = measured(image_sets.pictures(30), other)
    quality.save_statistics(path, images)
    scores = quality.compare(images, quality.read_reference(other, path)).scores
    assert abs(scores["fd_other"]) < 1e-9
    with pytest.raises(ValueError, match="of fd_other features, which inception"):
        quality.read_reference(image_sets.network(), path)


def test_references_that_cannot_be_used(tmp_path):
    path, images = tmp_path / "ref.npz", image_sets.pictures(30)

    def refused(net=None, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(ValueError) as error:
            quality.read_reference(net or image_sets.network(), path)
        assert str(path) in str(error.value)
        return str(error.value)

    message = refused(labels=np.zeros(3))
    assert "['labels']" in message and "prepare" in message and "VIRTUAL" in message
    good = statistics(images, "mu", "sigma")
    other = image_sets.network(name="fd_other")
    assert "Give reference images" in refused(other, **good)
    assert "not symmetric" in refused(**good | {"sigma": np.triu(good["sigma"])})
    assert "(12,) and (11, 11)" in refused(**good | {"sigma": good["sigma"][1:, 1:]})
    assert "not finite" in refused(**good | {"mu": good["mu"] * np.nan})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a whole .npz"):
        quality.read_reference(image_sets.network(), path)
    with pytest.raises(FileNotFoundError, match="gone.npz"):
        quality.read_reference(image_sets.network(), tmp_path / "gone.npz")


def test_matrices_that_are_no_covariances():
    """scipy's root would have an imaginary part, which must not be dropped."""
    good, mean = np.diag([1.0, 2.0, 3.0]), np.zeros(3)
    bad = np.diag([1.0, 2.0, -0.5])
    assert abs(scipy.linalg.sqrtm(bad @ good).imag).max() > 0.1
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="negative eigenvalue -0.5"):
            frechet.gaussian_distance(mean, pair[0], mean, pair[1])
    rounded = np.diag([1.0, 2.0, -1e-9])  # As float32 leaves it.
    comparison = frechet.compare(
        frechet.Gaussian(mean, rounded), frechet.Gaussian(mean, good)
    )
    assert comparison.ranks == (2, 3)
    np.testing.assert_allclose(comparison.distance, 3.0, rtol=1e-8)
