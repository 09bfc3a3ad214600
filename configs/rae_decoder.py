r"""Stage 1 of RAE (arXiv:2510.11690): a ViT decoder for frozen latents.

    rae-jax train --config configs/rae_decoder.py:VARIANT --workdir runs/decoder \
        --config.encoder.weights=runs/ldae

Variants: b, l and xl, the paper's decoders at 256 pixels behind an l-DAE ViT-B;
photos; folder, for an encoder that you trained on your own images; smoke.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import decoder

STEPS_PER_EPOCH = 2502  # ImageNet at batch 512.

VARIANTS = {
    "b": dict(model=decoder.PRESETS["b"]),
    "l": dict(model=decoder.PRESETS["l"]),
    "xl": {},
    "photos": dict(
        num_steps=350,
        data=blocks.photos(batch_size=32),
        encoder=dict(weights="../ldae", sizes=blocks.PHOTOS_SIZES),
        model=dict(
            hidden_size=192,
            depth=4,
            num_heads=4,
            intermediate_size=768,
            remat="none",
            dtype="float32",
        ),
        # AlexNet is fast, but its stride of 4 leaves a pattern at the full weight.
        loss=dict(perceptual="alex", perceptual_weight=0.3),
        noise=dict(tau=0.3),
        optimizer=dict(peak_lr=1e-3, warmup_steps=30, clip_norm=1.0),
        ema_decay=0.98,
        every=dict(log=10, checkpoint=60, evaluate=120),
    ),
    "folder": dict(
        inherits="photos",
        num_steps=20_000,
        data=dict(
            source="class_folder",
            path="data/my_images",
            transform="resize_random_crop",
        ),
        optimizer=dict(peak_lr=5e-4, warmup_steps=500),
        noise=dict(tau=0.4),
        ema_decay=0.998,
        every=dict(log=50, checkpoint=1_000, evaluate=1_000),
    ),
    "smoke": dict(
        num_steps=3,
        data=blocks.synthetic(),
        encoder=dict(weights="random", sizes=blocks.SMOKE_SIZES),
        model=dict(
            hidden_size=32,
            depth=2,
            num_heads=2,
            intermediate_size=64,
            dtype="float32",
        ),
        loss=dict(perceptual="alex"),
        optimizer=dict(warmup_steps=1),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
}


def get_config(variant: str = "xl") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("rae_decoder", num_steps=16 * STEPS_PER_EPOCH)
    c.data = blocks.data(transform="resize_random_crop", flip=False, batch_size=512)
    c.encoder = blocks.encoder("runs/ldae")
    c.model = decoder.PRESETS["xl"] | dict(
        trainable_pos_embed=True, dtype="bfloat16", remat="full"
    )
    c.loss = dict(perceptual="vgg", perceptual_weight=1.0)
    c.noise = dict(tau=0.8, distribution="uniform")
    c.optimizer = blocks.optimizer(schedule="cosine", warmup_steps=STEPS_PER_EPOCH)
    c.ema_decay = 0.9978
    return config.apply_variant(c, VARIANTS, variant)
