r"""Linear probes of a frozen encoder (arXiv:2401.14404 section 3).

    rae-jax train --config configs/probe.py:VARIANT --workdir runs/probe \
        --config.encoder.weights=runs/ldae

Variants: vit_b and vit_l, the paper's protocol (batch 16384, LARS, 90 epochs);
photos; smoke.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config

STEPS_PER_EPOCH = 78  # ImageNet at batch 16384.

VARIANTS = {
    "vit_b": {},
    "vit_l": dict(
        encoder=dict(sizes=dict(hidden_size=1024, depth=24, num_heads=16)),
    ),
    "photos": dict(
        num_steps=80,
        num_classes=10,
        features=("encoder", "random", "pca", "pixels"),
        data=blocks.photos(batch_size=64),
        encoder=dict(weights="../ldae", sizes=blocks.PHOTOS_SIZES),
        optimizer=dict(name="adamw", peak_lr=3e-3, warmup_steps=0),
        every=dict(log=20, checkpoint=40, evaluate=80),
    ),
    "smoke": dict(
        num_steps=3,
        num_classes=10,
        data=blocks.synthetic(),
        encoder=dict(weights="random", sizes=blocks.SMOKE_SIZES),
        optimizer=dict(warmup_steps=1),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
}


def get_config(variant: str = "vit_b") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("probe", num_steps=90 * STEPS_PER_EPOCH)
    c.data = blocks.data(transform="random_resized_crop", batch_size=16384)
    c.num_classes = 1000
    c.features = ("encoder",)
    c.encoder = blocks.encoder("runs/ldae") | dict(ema=False)
    c.optimizer = blocks.optimizer(
        name="lars",
        peak_lr=6.4,
        final_lr=0.0,
        schedule="cosine",
        warmup_steps=10 * STEPS_PER_EPOCH,
    )
    return config.apply_variant(c, VARIANTS, variant)
