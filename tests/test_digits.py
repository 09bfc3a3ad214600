"""The embedded digits: splits, pixels, labels and what to do without them."""

import numpy as np
import pytest

from rae_jax.data import digits, sources
from rae_jax.trainers import inputs


def test_splits_hold_other_digits_of_every_class():
    splits = {name: sources.make_source("digits", split=name) for name in digits.SPLITS}
    assert [len(s) for s in splits.values()] == [4000, 1000]
    names = {n: {s[i]["name"] for i in range(len(s))} for n, s in splits.items()}
    assert not names["train"] & names["validation"]
    assert len(names["train"] | names["validation"]) == 5000
    for source in splits.values():
        labels = [source[i]["label"] for i in range(len(source))]
        assert labels[:10] == list(range(10))
        assert set(np.bincount(labels)) == {len(source) // 10}


def test_pictures_are_white_on_black_with_a_margin():
    source = digits.Digits("validation")
    image = source[3]["image"]
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    inner = image[2:-2, 2:-2]
    assert inner.sum() == image.sum() > 0
    # The mean of a class shows its form: a one is dark where a zero is bright.
    means = [
        np.mean([source[i]["image"] for i in range(d, 1000, 10)], axis=0)
        for d in (0, 1)
    ]
    assert means[1][16, 16, 0] > 150 > 60 > means[0][16, 16, 0]
    with pytest.raises(IndexError):
        source[len(source)]


def test_batches_come_as_of_any_source():
    from ml_collections import ConfigDict

    from rae_jax import blocks

    data = ConfigDict(blocks.digits(batch_size=20))
    with inputs.train_batches(data, seed=0) as batches:
        batch = next(batches)
    assert (
        batch["image"].shape
        == (20, 32, 32, 3)
        == inputs.abstract_batch(data)["image"].shape
    )
    assert inputs.class_names(data, 10) == tuple("0123456789")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(digits, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"rae_jax\[digits\]"):
        digits.Digits()
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        digits.Digits("test")
