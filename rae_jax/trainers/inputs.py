"""Data blocks of a config -> sources and batches."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rae_jax.data import loader, sources, transforms

Shapes = dict[str, jax.ShapeDtypeStruct]


def abstract_batch(data: ConfigDict) -> Shapes:
    """Returns the shapes of a global training batch."""
    b, size = data.batch_size, data.image_size
    return {
        "image": jax.ShapeDtypeStruct((b, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
        "index": jax.ShapeDtypeStruct((b,), jnp.int32),
    }


def open_source(data: ConfigDict, split: str) -> sources.Source:
    """Opens one split of the images that a data block names.

    Raises:
        ValueError: If the folder is missing or empty, or holds no such split.
    """
    options = {"image_size": data.image_size} if data.source == "synthetic" else {}
    if data.source == "photos" and split == "validation":
        options = {"crops_per_photo": data.validation_size // 10 or 1}
    return sources.make_source(data.source, path=data.path, split=split, **options)


def train_batches(data: ConfigDict, seed: int) -> loader.Batches:
    """Returns the endless shuffled batches of a training run."""
    transform = transforms.make_transform(data.transform, data.image_size, data.flip)
    return loader.train_batches(
        open_source(data, data.split),
        transform,
        batch_size=data.batch_size,
        seed=seed,
        num_workers=data.num_workers,
    )


def eval_batches(
    data: ConfigDict, split: str, *, limit: int | None = None, flip: bool = False
) -> loader.Batches:
    """Returns one pass over centre-cropped images, with a mask for the padding."""
    name = "none" if data.transform == "none" else "center_crop"
    transform = transforms.make_transform(name, data.image_size, flip)
    return loader.eval_batches(
        open_source(data, split),
        transform,
        batch_size=data.batch_size,
        limit=limit,
        num_workers=data.num_workers,
    )


def validation_batches(data: ConfigDict) -> loader.Batches:
    """Returns one pass over the validation images that a data block asks for."""
    return eval_batches(data, "validation", limit=data.validation_size)


def examples(data: ConfigDict, split: str, count: int) -> np.ndarray:
    """Returns `count` evenly spaced images of a split, uint8 (count, h, w, 3)."""
    source = open_source(data, split)
    name = "none" if data.transform == "none" else "center_crop"
    transform = transforms.make_transform(name, data.image_size)
    rng = np.random.default_rng(0)  # A centre crop draws nothing from it.
    chosen = (np.arange(count) + 0.5) * len(source) / count
    records = [transform.random_map(source[int(i)], rng) for i in chosen]
    return np.stack([record["image"] for record in records])


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 pixels to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0
