"""FD-DINOv2 (arXiv:2306.04675) against transformers, Pillow, numpy and scipy."""

import jax
import numpy as np
import pytest
import scipy.linalg
from PIL import Image
from test_parity_encoders import (  # noqa: F401
    EVERY_CASE,
    GRIDS,
    make_reference,
    ours_from,
    randn,
    reference_tokens,
    torch,
    transformers,
)

from rae_jax.evaluation import features, quality

pytestmark = pytest.mark.parity

class_token = jax.jit(lambda encoder, images: encoder.class_token(images))


def assert_close(actual, desired, rtol=1e-5):
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max() <= rtol * np.abs(desired).max()


@EVERY_CASE
def test_class_token_equals_transformers(torch, transformers, case):  # noqa: F811
    """After the affine final norm, on another grid than the table's."""
    reference = make_reference(torch, transformers, case)
    encoder = ours_from(reference, layers=(0, 2))  # Not of the class token.
    rows, columns = GRIDS[1]
    size = encoder.patch_size
    images = randn(2, rows * size, columns * size, 3)
    if encoder.cls_token is None:
        with pytest.raises(ValueError, match="'siglip' have no class token"):
            encoder.class_token(images)
        return
    expected = reference_tokens(torch, reference, images).last_hidden_state
    assert_close(class_token(encoder, images), expected[:, 0])


def photos(count, seed, side=96):
    """Smooth pictures with values at both ends, where a cubic filter overshoots."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-60, 316, (count, 6, 6, 3)).clip(0, 255).astype(np.uint8)
    large = [Image.fromarray(x).resize((side, side)) for x in coarse]
    return np.stack([np.asarray(x) for x in large])


def resized(images, size):
    bicubic = Image.Resampling.BICUBIC
    parts = [
        np.asarray(Image.fromarray(x).resize((size, size), bicubic)) for x in images
    ]
    return np.stack(parts)


@pytest.mark.parametrize("size", [224, 56])
def test_images_are_resized_as_pillow_does(size):
    images = photos(3, 0)
    found = jax.jit(features.resize_pillow, static_argnums=1)(images, size)
    difference = np.abs(np.asarray(found) - resized(images, size))
    assert difference.max() <= 1 and (difference > 0).mean() < 3e-3


def test_distance_equals_the_published_protocol(
    torch,  # noqa: F811
    transformers,  # noqa: F811
    tmp_path,
):
    """Pillow's resizing, transformers' class token, numpy's moments, scipy's root."""
    reference = make_reference(torch, transformers, "dinov2")
    reference.save_pretrained(tmp_path)
    net = features.make_encoder(tmp_path, token="cls", batch_size=32)
    sets, found = {"a": photos(80, 1), "b": photos(90, 2)}, {}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for name, images in sets.items():
        pixels = (resized(images, 126) / 255.0 - mean) / std
        tokens = reference_tokens(torch, reference, pixels.astype(np.float32))
        expected = tokens.last_hidden_state[:, 0].double().numpy()
        measured = quality.measure(net, [images[:50], images[50:]], name, keep=True)
        assert_close(measured.pool, expected, rtol=1e-3)  # Single levels differ.
        exact = quality.measure(net, [resized(images, 126)], name, keep=True)
        assert_close(exact.pool, expected)
        found[name] = measured, expected
    (a, x), (b, y) = found.values()
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    distance = np.sum((x.mean(0) - y.mean(0)) ** 2)
    distance += np.trace(covariances[0] + covariances[1] - 2 * root)
    scores = quality.compare(a, b).scores
    assert scores["fd_dinov2_cls"] == pytest.approx(distance, rel=1e-3)
