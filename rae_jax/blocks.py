"""Blocks that most experiment files begin with."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def run(trainer: str, *, num_steps: int, seed: int = 42) -> ConfigDict:
    """Returns what every run has: trainer, length, mesh, intervals, checkpoints."""
    config = ConfigDict()
    config.trainer = trainer
    config.seed = seed
    config.num_steps = num_steps
    config.keep = 2  # Newest checkpoints on disk.
    config.fsdp = False  # Shard large arrays of the state over the mesh.
    config.mesh = dict(data=-1)  # Devices; -1 for all.
    config.every = dict(log=100, checkpoint=5_000, evaluate=25_000)
    config.guard = dict(
        spike_factor=0.0,  # Counts gradients and losses beyond this many means; 0: off.
        skip=False,  # Leave out steps of such gradients, and of those not finite.
        max_skips=10,  # In a row; more stop the run.
    )
    return config


def data(**changes: Any) -> dict[str, Any]:
    """Returns a data block for ImageNet at 256 pixels, with changes."""
    block = dict(
        source="array_record",  # class_folder, flat_folder, photos or synthetic.
        path="data/imagenet256",
        split="train",
        image_size=256,
        transform="center_crop",
        flip=True,
        batch_size=1024,
        num_workers=16,
        validation_size=50_000,
    )
    return block | changes


def photos(batch_size: int) -> dict[str, Any]:
    """Returns the embedded photographs at 64 pixels."""
    return data(
        source="photos",
        path="",
        image_size=64,
        flip=False,
        batch_size=batch_size,
        num_workers=0,
        validation_size=160,
    )


def synthetic(batch_size: int = 8, image_size: int = 32) -> dict[str, Any]:
    """Returns images made on the fly, for smoke runs."""
    return data(
        source="synthetic",
        path="",
        image_size=image_size,
        batch_size=batch_size,
        num_workers=0,
        validation_size=12,
    )


def optimizer(**changes: Any) -> dict[str, Any]:
    """Returns AdamW at a constant rate, with changes."""
    block = dict(
        name="adamw",
        peak_lr=2e-4,
        final_lr=2e-5,
        schedule="constant",  # cosine or linear; falls to final_lr.
        warmup_steps=0,
        warmup_from_zero=True,
        decay_end_step=0,  # 0: the last step.
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=0.0,  # 0: no clipping.
        accumulate=1,  # Parts of the batch, one after the other.
    )
    return block | changes


def encoder(weights: str, **sizes: Any) -> dict[str, Any]:
    """Returns an l-DAE encoder: base size at 256 pixels unless sizes are given."""
    base = dict(
        image_size=256,
        patch_size=16,
        latent_dim=32,
        hidden_size=768,
        depth=12,
        num_heads=12,
        time_index=10,
        dtype="bfloat16",
    )
    return dict(name="ldae", weights=weights, ema=True, sizes=base | sizes)


def pretrained_encoder(preset: Mapping[str, Any], **sizes: Any) -> dict[str, Any]:
    """Returns a published encoder from `models.encoders.PRESETS`, with other sizes.

    `normalize` drops the affine part of its last norm, as RAE does; `layers` combines
    several blocks' outputs, as RAEv2 does. Products are in float32, because the
    official code encodes so whatever the precision of the training.
    """
    base = dict(normalize=True, layers=(), layer_mode="mean_global", dtype="float32")
    return dict(preset) | dict(sizes=base | preset["sizes"] | sizes)


PHOTOS_SIZES = dict(
    image_size=64,
    patch_size=8,
    latent_dim=48,
    hidden_size=128,
    depth=3,
    num_heads=4,
    dtype="float32",
)
SMOKE_SIZES = dict(
    image_size=32,
    patch_size=8,
    latent_dim=8,
    hidden_size=32,
    depth=2,
    num_heads=2,
    dtype="float32",
)
