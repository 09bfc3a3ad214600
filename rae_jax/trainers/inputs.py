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
    """Returns one pass over centre-cropped images, with a mask for the padding.

    Args:
        data: Data block.
        split: "train" or "validation".
        limit: If the split has more images, a fixed random choice of this many.
        flip: Whether to mirror half of them.
    """
    source = open_source(data, split)
    if limit is not None and limit < len(source):
        source = Subset(source, limit)
    return loader.eval_batches(
        source,
        _center_crop(data, flip),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
    )


def validation_batches(data: ConfigDict) -> loader.Batches:
    """Returns one pass over the validation images that a data block asks for."""
    return eval_batches(data, "validation", limit=data.validation_size)


def class_names(data: ConfigDict, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers where the data is not here."""
    try:
        names = tuple(open_source(data, data.split).class_names)
    except (ValueError, OSError):
        names = ()
    numbers = tuple(str(i) for i in range(len(names), num_classes))
    return (names + numbers)[:num_classes]


def examples(data: ConfigDict, split: str, count: int) -> np.ndarray:
    """Returns `count` images of a split, uint8 (count, h, w, 3), of many classes."""
    source = Subset(open_source(data, split), 8 * count)
    records = sorted((source[i] for i in range(len(source))), key=_label)
    chosen = [records[i * len(records) // count] for i in range(count)]
    transform = _center_crop(data)
    rng = np.random.default_rng(0)  # A centre crop draws nothing from it.
    return np.stack([transform.random_map(record, rng)["image"] for record in chosen])


class Subset:
    """A fixed random choice of a source's images, in the source's order."""

    def __init__(self, source: sources.Source, count: int):
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self._source = source
        order = np.random.default_rng(0).permutation(len(source))
        self._chosen = np.sort(order[:count])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> sources.Record:
        return self._source[int(self._chosen[index])]


def _label(record: sources.Record) -> int:
    return record["label"]


def _center_crop(data: ConfigDict, flip: bool = False) -> transforms.Transform:
    name = "none" if data.transform == "none" else "center_crop"
    return transforms.make_transform(name, data.image_size, flip)


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 pixels to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0
