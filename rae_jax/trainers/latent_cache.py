"""Writing the latents of a data set once, for many runs of training."""

import collections
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.data import latents, loader, shards
from rae_jax.models import rae
from rae_jax.trainers import frozen, inputs
from rae_jax.training import sharding, state

TRANSFORMS = ("center_crop", "none")  # Those that do not crop anew in every epoch.
# What a cache must share with the data block of a run.
SAME = ("image_size", "transform", "split", "resampling")
ROWS_PER_DEVICE = 64
_AHEAD = 2  # Batches that the devices work on while one is written.


@dataclasses.dataclass(frozen=True)
class Job:
    """A data set to encode into a folder.

    Attributes:
        config: Says data and encoder; see `plan_of`.
        folder: Destination.
        plan: What the metadata will say.
        params: The encoder's weights.
        batch_size: Images per call of the encoder.
    """

    config: ConfigDict
    folder: Path
    plan: dict[str, Any]
    params: state.Params
    batch_size: int

    @property
    def total(self) -> int:
        """Number of images."""
        return self.plan["num_images"]

    @property
    def bytes_in_all(self) -> int:
        """Space that the finished files take."""
        return self._bytes(self.total)

    @property
    def bytes_to_write(self) -> int:
        """Space that this call needs besides what is there."""
        todo = latents.unfinished(self.folder, self.plan)
        return self._bytes(sum(task.size for task in todo))

    def _bytes(self, count: int) -> int:
        return latents.num_bytes(count, self.plan["shape"], self.plan["flip"])

    def describe(self) -> str:
        """Returns what will be written and whether the disk has room.

        Raises:
            ValueError: It has too little for what is still to be written.
        """
        plan, to_write = self.plan, self.bytes_to_write
        free = _free_bytes(self.folder)
        if free is not None and free < to_write:
            raise ValueError(
                f"{self.folder} needs {human(to_write)} more, but only "
                f"{human(free)} are free there. Choose another disk, or a smaller "
                "data set; data.flip=False halves the space."
            )
        what = "each image and its mirror image" if plan["flip"] else "each image"
        there = human(self.bytes_in_all - to_write)
        room = (
            "a bucket has no known limit" if free is None else f"{human(free)} are free"
        )
        return (
            f"{self.total} images, {len(plan['class_names'])} classes; latents "
            f"{tuple(plan['shape'])} of {what}, {plan['dtype']}: "
            f"{human(self.bytes_in_all)} in {self.folder} ({there} are there, {room})"
        )

    def run(self, mesh: Mesh, progress: latents.Progress) -> dict[str, Any]:
        """Writes what is missing; see `latents.write`."""
        return latents.write(
            self.folder,
            self.plan,
            lambda ranges: self._rows(ranges, mesh),
            progress,
        )

    def _rows(self, ranges: list[np.ndarray], mesh: Mesh) -> Iterator[latents.Row]:
        """Yields label and variants of images, computed a little ahead."""
        data, pending = self.config.data, collections.deque()
        encode = _make_encode(self.config, self.plan["flip"])
        params = sharding.place(self.params, mesh)
        rows = sharding.batch_sharding(mesh)
        indices, keep = _fill(ranges, self.batch_size)
        source = inputs.Subset(inputs.open_source(data, data.split), indices)
        options = dict(batch_size=self.batch_size, num_workers=data.num_workers)
        options |= dict(process_index=0, process_count=1)
        transform = inputs.train_transform(data, flip=False)
        with loader.eval_batches(source, transform, **options) as batches:
            for batch, kept in zip(batches, keep, strict=True):
                images = loader.to_global({"image": batch["image"]}, rows)["image"]
                pending.append((batch["label"][:kept], encode(params, images)))
                if len(pending) > _AHEAD:
                    yield from _unpack(*pending.popleft())
        while pending:
            yield from _unpack(*pending.popleft())


def make_job(
    config: ConfigDict,
    folder: Path,
    mesh: Mesh,
    *,
    batch_size: int | None = None,
    num_shards: int | None = None,
) -> Job:
    """Opens the images and the encoder of a config.

    Args:
        config: Of any trainer with blocks `data` and `encoder`. Relative paths of
            weights count from `folder`, failing that from the current folder.
        folder: Destination, on a disk or in a bucket.
        mesh: Devices that encode.
        batch_size: Images per call, at most so many; 64 per device if None.
        num_shards: See `shards.shard_count`.

    Raises:
        ConfigError: The config cannot be used so.
        ValueError, FileNotFoundError: Images or weights are missing.
        OSError: A bucket cannot be read.
    """
    _check(config)
    devices = mesh.devices.size
    batch_size = batch_size or ROWS_PER_DEVICE * devices
    source = inputs.open_source(config.data, config.data.split)
    params = frozen.load_encoder(config.encoder, folder)
    abstract = frozen.encoder(config.encoder)[1]
    frozen.check_shapes("The encoder", abstract, params)
    data = config.data
    plan = {
        "format": latents.FORMAT,
        "class_names": list(source.class_names),
        "num_images": len(source),
        "num_shards": shards.shard_count(len(source), num_shards),
        "shape": list(raw_shape(config)),
        "dtype": latents.DTYPE.name,
        "flip": bool(data.flip),
        "encoder": encoder_of(config.encoder),
        "weights": config.encoder.weights,
        "checksum": checksum(params),
    }
    plan |= {key: data[key] for key in SAME}
    plan |= {key: data[key] for key in ("source", "path")}
    rows = max(batch_size // devices, 1) * devices
    return Job(config, folder, plan, params, rows)


def encoder_of(block: ConfigDict) -> dict[str, Any]:
    """Returns what a cache must share with an encoder block, as JSON gives it back."""
    encoder = {"name": block.name, "sizes": block.sizes.to_dict()}
    return json.loads(json.dumps(encoder))


def checksum(params: state.Params) -> str:
    """Returns the SHA-256 of weights: names, shapes and values."""
    digest = hashlib.sha256()
    for path, values in sorted(flax.traverse_util.flatten_dict(params).items()):
        array = np.ascontiguousarray(values)
        digest.update(f"{'.'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def raw_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns the shape (h, w, m) of what `rae.encode_raw` makes of one image."""
    graphdef, shapes = frozen.encoder(config.encoder)
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def encode(params, images):
        return rae.encode_raw(nnx.merge(graphdef, params), images)

    return jax.eval_shape(encode, shapes, image).shape[1:]


def human(count: int) -> str:
    """Returns a number of bytes for people, such as "1.0 TB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _free_bytes(folder: Path) -> int | None:
    """Returns the space on the disk of a folder, made or not; None for a bucket."""
    if storage.is_bucket(folder):
        return None
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _check(config: ConfigDict) -> None:
    missing = [key for key in ("data", "encoder") if key not in config]
    if missing:
        raise configs.ConfigError(
            f"The config has no {' and no '.join(missing)}: give one of stage 2, such "
            "as configs/dit_dh.py:VARIANT."
        )
    if inputs.cache(config.data):
        raise configs.ConfigError(
            "data.latents names a cache already; leave it empty while one is written."
        )
    if config.data.transform not in TRANSFORMS:
        raise configs.ConfigError(
            f"data.transform = {config.data.transform!r} crops anew in every epoch; "
            f"latents can be cached for {' and '.join(map(repr, TRANSFORMS))}."
        )


def _fill(ranges: list[np.ndarray], size: int) -> tuple[np.ndarray, list[int]]:
    """Returns indices in whole batches for each shard, and how many of each count.

    So no batch is shared by two shards, and a shard has the same bits whichever
    others were written before an interruption.
    """
    indices, keep = [], []
    for span in ranges:
        for part in (span[k : k + size] for k in range(0, len(span), size)):
            indices.append(np.resize(part, size))
            keep.append(len(part))
    return np.concatenate(indices), keep


def _make_encode(config: ConfigDict, flip: bool):
    """Returns params, uint8 images -> bfloat16 latents of each variant."""
    graphdef, _ = frozen.encoder(config.encoder)

    @jax.jit
    def encode(params, images):
        encoder = nnx.merge(graphdef, params)
        # One after the other: as a whole they would need twice the memory.
        variants = [images, images[:, :, ::-1]] if flip else [images]
        raw = [rae.encode_raw(encoder, inputs.to_float(x)) for x in variants]
        return [x.astype(jnp.bfloat16) for x in raw]

    return encode


def _unpack(labels: np.ndarray, variants: list[jax.Array]) -> Iterator[latents.Row]:
    arrays = jax.device_get(variants)
    for row, label in enumerate(labels):
        yield int(label), [array[row] for array in arrays]
