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
    # Devices of each axis; -1 for all that are left. `data` holds replicas, `fsdp`
    # splits states and batches, `tensor` attention heads and the width of MLPs.
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.every = dict(log=100, checkpoint=5_000, evaluate=25_000)
    config.guard = dict(
        spike_factor=0.0,  # Counts gradients and losses beyond this many means; 0: off.
        skip=False,  # Leave out steps of such gradients, and of those not finite.
        max_skips=10,  # In a row; more stop the run.
    )
    config.watchdog = 0.0  # Seconds without a step that end the run; 0: never.
    return config


def data(**changes: Any) -> dict[str, Any]:
    """Returns a data block for ImageNet at 256 pixels, with changes."""
    block = dict(
        source="array_record",  # class_folder, flat_folder, photos, digits ...
        path="data/imagenet256",
        split="train",
        image_size=256,
        transform="center_crop",
        flip=True,
        resampling="pillow",  # simd: twice as fast, not to the bit; training alone.
        min_scale=0.0,  # Smallest share of the area of a random crop; 0: the usual.
        magnitude=9.0,  # Of RandAugment, in the transform "finetune" ...
        erasing=0.25,  # ... and the probability of random erasing there.
        batch_size=1024,
        limit=0,  # Training images used, a fixed random choice; 0: all.
        num_workers=16,
        validation_size=50_000,
        latents="",  # Folder of cached latents, in the place of images (stage 2).
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


def digits(batch_size: int) -> dict[str, Any]:
    """Returns the embedded digits at 32 pixels."""
    return data(
        source="digits",
        path="",
        image_size=32,
        flip=False,
        batch_size=batch_size,
        num_workers=0,
        validation_size=1_000,
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


def tokenizer(**changes: Any) -> dict[str, Any]:
    """Returns the tokenizer of l-DAE, patch PCA, with changes."""
    block = dict(
        name="pca",  # pixels, patch_ae, patch_vae, conv_vae or sd_vae.
        patch_size=16,  # Pixels per token side; a convolutional one's stride twice.
        latent_dim=32,  # Values per token; four times the channels of a convolution.
        norm="global",  # per_channel or none: what latents are divided by.
        num_images=51_200,  # To fit components and scale.
        weights="",  # Workdir of a tokenizer run; sd_vae: a hub id or folder.
        sizes=dict(  # Of conv_vae and sd_vae.
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            norm_num_groups=32,
            mid_block_add_attention=True,
            dtype="float32",
        ),
    )
    return block | changes


# Sizes of a convolutional tokenizer with 8 pixels per token side, and those for smoke.
PHOTOS_CONVOLUTIONS = dict(
    block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8
)
SMOKE_CONVOLUTIONS = dict(
    block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4
)


_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
    mid_block_add_attention=True,
    scaling_factor=1.0,  # Of sd_vae 0.18215.
)


def encoder(weights: str, **sizes: Any) -> dict[str, Any]:
    """Returns an l-DAE encoder: base size at 256 pixels unless sizes are given."""
    base = dict(
        image_size=256,
        patch_size=16,
        latent_dim=32,
        hidden_size=768,
        depth=12,
        num_heads=12,
        time_index=10,  # Noise level that the network is told.
        tokenizer="pca",
        input_space="image",
        clean="projected",  # raw: images as they are, without the projection.
        schedule="linear_sigma",
        num_levels=1000,
        num_classes=0,
        mlp_ratio=4.0,
        condition_divisor=4,
        vae=dict(_VAE),  # Of a convolutional tokenizer.
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


def latent_diffusion(
    *,
    network: str,
    model: Mapping[str, Any],
    num_steps: int,
    encoder: Mapping[str, Any],
    align_encoder: Mapping[str, Any],
) -> ConfigDict:
    """Returns a run of stage 2, AdamW at a constant rate but for `optimizer`.

    Args:
        network: Key of `trainers.latent_network.NETWORKS`.
        model: Its sizes.
        num_steps: Length.
        encoder: Block of the encoder whose latents are generated.
        align_encoder: Block of the encoder whose features REPA aligns with.
    """
    c = run("latent_diffusion", num_steps=num_steps)
    c.data = data()
    c.encoder = dict(encoder)
    c.latent_stats = "runs/stats"  # Workdir or .npz; "none": mean 0, variance 1.
    c.decoder = "runs/decoder"  # For pictures; "none" for none.
    c.network = network
    c.model = dict(model) | dict(
        patch_size=1,
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        qk_norm=False,
        prediction="v",  # x: predicts clean latents, trained as velocities (RAEv2).
        early_depth=0,  # Blocks before an early head, for internal guidance (RAEv2).
        trainable_tables=False,
        dtype="bfloat16",
        remat="unrolled",
    )
    c.flow = dict(time="logit_normal", shift_base=4096, early_weight=1.0)
    c.repa = dict(
        weight=0.0,  # Of the alignment with an encoder's features; REPA has 0.5.
        depth=8,  # Blocks before the projection.
        target="encoder",  # latent: the clean latents themselves.
        encoder=dict(align_encoder),
    )
    c.optimizer = optimizer(clip_norm=1.0)
    c.ema_decay = 0.9999
    c.sampling = _sampling()
    c.evaluation = _evaluation()
    return c


def _sampling() -> dict[str, Any]:
    """Returns how samples are drawn: the official way, without guidance."""
    return dict(
        name="euler",  # Another of diffusion.samplers.SAMPLERS.
        num_points=50,  # Of the official grid, which ends before t = 0 ...
        final_zero=False,  # ... unless a last step is added.
        times=(),  # A grid of its own instead, as the network sees times.
        options="",  # Of the sampler, such as "period=2" or "rtol=1e-4, atol=1e-6".
        guidance="cfg",  # autoguidance: by a weaker model of the same latents;
        # internal: by the network's own early head.
        guide="",  # The weaker model: workdir of its run, or converted weights.
        guidance_scale=1.0,
        guidance_interval=(0.0, 1.0),
    )


def _evaluation() -> dict[str, Any]:
    """Returns how samples are measured while training: not at all."""
    return dict(
        inception="",  # Weights of the FID Inception: gFID, sFID, IS.
        efflite0=False,
        encoder="",  # A pretrained encoder, hub id or folder, and its token:
        encoder_token="mean",  # or cls.
        reference="",  # Statistics or images to compare with.
        batch_size=64,
        num_samples=10_000,
        guidance=(),  # Scales; none given: 1 and that of `sampling`.
        online_weights=False,  # Whether to measure them beside their average.
        best="",  # A score such as gfid_10k: its lowest state is kept in best/.
    )


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


def photos_diffusion(model: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns what a run of stage 2 on the photographs changes; `model` is its sizes.

    Its workdir lies beside those of `ldae`, `latent_stats` and `rae_decoder`.
    """
    return dict(
        num_steps=620,
        data=photos(batch_size=16),
        encoder=dict(weights="../ldae", sizes=PHOTOS_SIZES),
        latent_stats="../latent_stats",
        decoder="../rae_decoder",
        model=dict(model, num_classes=10, remat="none", dtype="float32"),
        # Ten photographs vary far less than their dimension says: what is in a latent
        # can still be told at high noise, so times shift further towards it.
        flow=dict(shift_base=328),
        optimizer=dict(
            name="muon",
            peak_lr=8e-3,
            final_lr=1e-4,
            schedule="cosine",
            warmup_steps=30,
            warmup_from_zero=True,
            decay_end_step=0,
        ),
        ema_decay=0.98,
        every=dict(log=10, checkpoint=50, evaluate=620),
    ) | dict(changes)


def smoke_diffusion(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns variants of stage 2 that take seconds, one for each space of latents."""
    run = dict(
        num_steps=3,
        data=synthetic(),
        latent_stats="none",
        model=dict(model, num_classes=10, dtype="float32"),
        optimizer=dict(warmup_steps=1, decay_end_step=0),
        every=dict(log=1, checkpoint=2, evaluate=3),
    )
    encoder = dict(weights="random", sizes=SMOKE_SIZES)
    return {
        "smoke": run | dict(encoder=encoder, decoder="none"),
        "smoke_sd_vae": run
        | dict(decoder="own", model=dict(run["model"], patch_size=2)),
        "smoke_pixels": run | dict(decoder="own"),
    }
