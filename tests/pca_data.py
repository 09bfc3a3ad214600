"""Images whose patches have a clear principal basis."""

import numpy as np

from rae_jax.data import sources
from rae_jax.layers import patches
from rae_jax.models import tokenizers

PATCH, DIM, LATENT = 4, 48, 10


def smooth_images(count, size=32, start=0):
    """Images (count, size, size, 3) in [0, 1] whose patches are far from white."""
    source = sources.Synthetic(image_size=size)
    pixels = [source[i]["image"] for i in range(start, start + count)]
    noise = np.random.default_rng(start).normal(0, 4, (count, size, size, 3))
    return np.clip(np.stack(pixels) + noise, 0, 255).astype(np.float32) / 255


def tokens_of(images, size=PATCH):
    """Patches (n, p) in [-1, 1]."""
    return np.asarray(patches.patchify(2 * images - 1, size)).reshape(-1, 3 * size**2)


def fit(data, splits=1):
    moments = tokenizers.PatchMoments(data.shape[1])
    for part in np.array_split(data, splits):
        moments.add(part)
    return moments.components()


def fit_images(images, size):
    """Components of all patches of uint8 images (b, h, w, 3)."""
    moments = tokenizers.PatchMoments(3 * size**2)
    moments.add(patches.patchify(images, size).reshape(-1, 3 * size**2))
    return moments.components()
