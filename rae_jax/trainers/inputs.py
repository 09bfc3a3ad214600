"""Data blocks of a config -> sources and batches."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.data import latents, loader, sources, transforms

Shapes = dict[str, jax.ShapeDtypeStruct]
TRANSFORM_OPTIONS = ("resampling", "min_scale", "magnitude", "erasing")


def cache(data: ConfigDict) -> str:
    """Returns the folder of cached latents that a data block names, or ""."""
    return data.get("latents", "")  # The configs of older runs do not say.


def train_limit(data: ConfigDict) -> int:
    """Returns how many training images are used, or 0 for all.

    Raises:
        ConfigError: It is negative.
    """
    found = data.get("limit", 0)  # The configs of older runs do not say.
    if found < 0:
        raise configs.ConfigError(f"data.limit must not be negative, got {found}.")
    return found


def abstract_batch(
    data: ConfigDict, latent_shape: tuple[int, ...] | None = None
) -> Shapes:
    """Returns the shapes of a global training batch.

    Args:
        data: Data block.
        latent_shape: Of one cached latent, (h, w, m); None for images.

    Raises:
        ConfigError: The data block names cached latents, but images are needed.
    """
    b, size = data.batch_size, data.image_size
    if latent_shape is not None:
        first = {"latent": jax.ShapeDtypeStruct((b, *latent_shape), jnp.bfloat16)}
    elif cache(data):
        raise configs.ConfigError(
            f"data.latents = {data.latents!r}, but this trainer needs the images: set "
            "data.latents to ''."
        )
    else:
        first = {"image": jax.ShapeDtypeStruct((b, size, size, 3), jnp.uint8)}
        if data.transform == transforms.MOCO:
            first[transforms.SECOND] = first["image"]
    return first | {
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
        "index": jax.ShapeDtypeStruct((b,), jnp.int32),
    }


def open_source(data: ConfigDict, split: str) -> sources.Source:
    """Opens one split of the images that a data block names.

    Of the split for training it is a fixed random choice of `data.limit` images.

    Raises:
        ValueError: If the folder is missing or empty, or holds no such split.
    """
    options = {"image_size": data.image_size} if data.source == "synthetic" else {}
    if data.source == "photos" and split == "validation":
        options = {"crops_per_photo": data.validation_size // 10 or 1}
    found = sources.make_source(data.source, path=data.path, split=split, **options)
    count = train_limit(data) if split == data.split else 0
    return choose(found, count) if count else found


def train_source(data: ConfigDict) -> sources.Source | latents.Latents:
    """Opens what a training run reads: the images, or their cached latents.

    Raises:
        ConfigError: `data.limit` asks for fewer images than were cached.
    """
    if not cache(data):
        return open_source(data, data.split)
    found = latents.Latents(cache(data))
    if 0 < train_limit(data) < len(found):
        raise configs.ConfigError(
            f"data.limit = {data.limit}, but {data.latents} holds latents of "
            f"{len(found)} images: prepare others with this limit, or set it to 0."
        )
    return found


def train_transform(data: ConfigDict, flip: bool) -> transforms.Transform:
    """Returns how images become examples in training."""
    # The configs of older runs do not have all of these.
    options = {key: data[key] for key in TRANSFORM_OPTIONS if key in data}
    return transforms.make_transform(data.transform, data.image_size, flip, **options)


def train_batches(data: ConfigDict, seed: int) -> loader.Batches:
    """Returns the endless shuffled batches of a training run.

    With cached latents batch k shows the images, mirrored or not, that it shows
    without.
    """
    source = train_source(data)
    if cache(data):
        transform = latents.Choose(source, "random" if data.flip else "never")
    else:
        transform = train_transform(data, data.flip)
    return loader.train_batches(
        source,
        transform,
        batch_size=data.batch_size,
        seed=seed,
        num_workers=data.num_workers,
    )


def eval_batches(
    data: ConfigDict,
    split: str,
    *,
    limit: int | None = None,
    flip: bool = False,
    shared: bool = True,
) -> loader.Batches:
    """Returns one pass over centre-cropped images, with a mask for the padding.

    Args:
        data: Data block.
        split: "train" or "validation".
        limit: If the split has more images, a fixed random choice of this many.
        flip: Whether to mirror half of them.
        shared: Whether processes share the rows, or each has all of them.
    """
    source = open_source(data, split)
    if limit is not None and limit < len(source):
        source = choose(source, limit)
    return loader.eval_batches(
        source,
        _center_crop(data, flip),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        process_index=None if shared else 0,
        process_count=None if shared else 1,
    )


def one_pass(data: ConfigDict, *, both: bool = False) -> loader.Batches:
    """Returns one pass over what a training run reads, never mirrored.

    Args:
        data: Data block.
        both: Whether cached latents come with those of mirror images.
    """
    if not cache(data):
        return eval_batches(data, data.split)
    source = latents.Latents(cache(data))
    return loader.eval_batches(
        source,
        latents.Choose(source, "both" if both else "never"),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
    )


def validation_batches(data: ConfigDict) -> loader.Batches:
    """Returns one pass over the validation images that a data block asks for."""
    return eval_batches(data, "validation", limit=data.validation_size)


def class_names(data: ConfigDict, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers where the data is not here."""
    try:
        names = tuple(train_source(data).class_names)
    except (ValueError, OSError):
        names = ()
    numbers = tuple(str(i) for i in range(len(names), num_classes))
    return (names + numbers)[:num_classes]


def check_classes(data: ConfigDict, num_classes: int) -> None:
    """Raises a ConfigError unless images have labels, all below `num_classes`."""
    found = train_source(data).num_classes
    if found == 1:
        raise configs.ConfigError(
            f"A classifier needs labels, but all images of {data.path!r} have one. "
            "Sort them into one folder per class, for the source 'class_folder'."
        )
    if found > num_classes:
        raise configs.ConfigError(
            f"num_classes = {num_classes}, but the data has {found} classes."
        )


def examples(data: ConfigDict, split: str, count: int) -> np.ndarray:
    """Returns `count` images of a split, uint8 (count, h, w, 3), of many classes."""
    source = choose(open_source(data, split), 8 * count)
    records = sorted((source[i] for i in range(len(source))), key=_label)
    chosen = [records[i * len(records) // count] for i in range(count)]
    transform = _center_crop(data)
    rng = np.random.default_rng(0)  # A centre crop draws nothing from it.
    return np.stack([transform.random_map(record, rng)["image"] for record in chosen])


def choose(source: sources.Source, count: int) -> "Subset":
    """Returns a fixed random choice of a source's images, in the source's order."""
    order = np.random.default_rng(0).permutation(len(source))
    return Subset(source, np.sort(order[:count]))


class Subset:
    """The images of a source that have these indices."""

    def __init__(self, source: sources.Source, indices: np.ndarray):
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self._source, self._chosen = source, indices
        self.waits = getattr(source, "waits", False)

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
