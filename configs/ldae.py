r"""l-DAE pre-training (arXiv:2401.14404), final form: patch-PCA noise.

    rae-jax train --config configs/ldae.py:VARIANT --workdir runs/ldae

Variants: vit_b and vit_l, the paper's encoders at 256 pixels; vit_half_l, 12 of 24
blocks of that width; photos, the embedded photographs (a minute or two on two cores);
folder, your own class folders at 64 pixels; smoke, seconds.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config

STEPS_PER_EPOCH = 625  # ImageNet at batch 2048.

PHOTOS = dict(
    num_steps=320,
    data=blocks.photos(batch_size=32),
    tokenizer=dict(patch_size=8, latent_dim=48, num_images=1024),
    encoder_depth=3,
    model=dict(hidden_size=128, depth=4, num_heads=4, remat="none", dtype="float32"),
    optimizer=dict(peak_lr=1e-3, warmup_steps=30, clip_norm=1.0),
    ema_decay=0.98,
    every=dict(log=10, checkpoint=60, evaluate=160),
)

VARIANTS = {
    "vit_b": {},
    "vit_l": dict(
        encoder_depth=24,
        model=dict(hidden_size=1024, depth=48, num_heads=16),
    ),
    "vit_half_l": dict(model=dict(hidden_size=1024, depth=24, num_heads=16)),
    "photos": PHOTOS,
    "folder": dict(
        inherits="photos",
        num_steps=20_000,
        data=dict(source="class_folder", path="data/my_images", flip=True),
        optimizer=dict(peak_lr=5e-4, warmup_steps=500),
        ema_decay=0.999,
        every=dict(log=50, checkpoint=1_000, evaluate=1_000),
    ),
    "smoke": dict(
        num_steps=3,
        data=blocks.synthetic(),
        tokenizer=dict(patch_size=8, latent_dim=8, num_images=64),
        encoder_depth=2,
        model=dict(hidden_size=32, depth=3, num_heads=2, dtype="float32"),
        optimizer=dict(warmup_steps=1),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
}


def get_config(variant: str = "vit_b") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("ldae", num_steps=400 * STEPS_PER_EPOCH)
    c.data = blocks.data(batch_size=2048)
    c.tokenizer = dict(patch_size=16, latent_dim=32, norm="global", num_images=51_200)
    c.noise = dict(
        schedule="linear_sigma",
        input_space="image",
        target="image",
        residual_weight=0.1,
        num_levels=1000,
    )
    c.encoder_depth = 12
    c.model = dict(
        hidden_size=768,
        depth=24,
        num_heads=12,
        mlp_ratio=4.0,
        condition_divisor=4,
        dtype="bfloat16",
        remat="full",
    )
    c.optimizer = blocks.optimizer(
        peak_lr=8e-4,
        final_lr=0.0,
        schedule="cosine",
        warmup_steps=100 * STEPS_PER_EPOCH,
        b2=0.999,
    )
    c.ema_decay = 0.9999
    return config.apply_variant(c, VARIANTS, variant)
