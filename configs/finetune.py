r"""End-to-end fine-tuning of a pre-trained encoder (arXiv:2401.14404 appendix B).

    rae-jax train --config configs/finetune.py:VARIANT --workdir runs/finetune \
        --config.encoder.weights=runs/ldae

An encoder of l-DAE is merged into a plain ViT first; its sizes are those of the run
that encoder.weights names. The accuracy of the weights and of their average is in
finetune.json.

Variants: vit_b and vit_l, encoders of l-DAE at 256 pixels; mae_b and mae_l, MAE's
published weights with its own recipe at 224; mocov3_b, MoCo v3's with DeiT's; photos on
the embedded photographs; digits on the embedded digits; smoke.
"""

from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import encoders

STEPS_PER_EPOCH = 1252  # ImageNet at batch 1024.
PUBLISHED = {name: name for name in ("mae_b", "mae_l", "mocov3_b")}
AT_224 = dict(data=dict(image_size=224), encoder=dict(sizes=dict(image_size=224)))


def _small(data: dict[str, Any], num_steps: int, **sizes: Any) -> dict[str, Any]:
    return dict(
        num_steps=num_steps,
        data=data,
        encoder=dict(weights="../ldae", sizes=sizes),
        model=dict(num_classes=10, drop_path_rate=0.0, remat="none"),
        mixing=dict(mixup=0.0, cutmix=0.0),
        optimizer=dict(peak_lr=1e-3, warmup_steps=10),
        ema_decay=0.98,
        every=dict(log=20, checkpoint=num_steps // 2, evaluate=num_steps),
    )


VARIANTS = {
    "vit_b": {},
    "vit_l": dict(
        encoder=dict(sizes=dict(hidden_size=1024, depth=24, num_heads=16)),
        layer_decay=0.65,
    ),
    "mae_b": AT_224 | dict(layer_decay=0.65, optimizer=dict(peak_lr=2e-3)),
    "mae_l": AT_224
    | dict(
        num_steps=50 * STEPS_PER_EPOCH,
        layer_decay=0.75,
        model=dict(drop_path_rate=0.2),
    ),
    "mocov3_b": AT_224
    | dict(
        num_steps=150 * STEPS_PER_EPOCH,
        layer_decay=1.0,
        model=dict(token="cls"),
        optimizer=dict(peak_lr=1e-3, final_lr=1e-5),
        ema_decay=0.99996,
    ),
    "photos": _small(blocks.photos(batch_size=32), 80, **blocks.PHOTOS_SIZES),
    "digits": _small(
        blocks.digits(batch_size=64), 300, **blocks.PHOTOS_SIZES | dict(image_size=32)
    ),
    "smoke": _small(blocks.synthetic(), 3)
    | dict(
        data=blocks.synthetic() | dict(transform="finetune"),
        encoder=dict(weights="random", sizes=blocks.SMOKE_SIZES),
        model=dict(num_classes=10, remat="none"),
        mixing=dict(mixup=0.8, cutmix=1.0),
        optimizer=dict(warmup_steps=1),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
}


def get_config(variant: str = "vit_b") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("finetune", num_steps=100 * STEPS_PER_EPOCH)
    c.row = ""  # Of the paper's tables, for the report; "": as the encoder's run.
    c.tier = ""
    # Random crops, flips, RandAugment and random erasing.
    c.data = blocks.data(transform="finetune", batch_size=1024)
    encoder = blocks.encoder("runs/ldae")
    if variant in PUBLISHED:
        preset = encoders.PRESETS[PUBLISHED[variant]]
        encoder = blocks.pretrained_encoder(preset, dtype="bfloat16")
    # match: an l-DAE encoder takes its sizes from the run that weights names.
    c.encoder = encoder | dict(ema=False, match=True)
    c.model = dict(
        num_classes=1000,
        token="mean",  # Of all patches; cls: the class token.
        drop_path_rate=0.1,  # In the last block; it rises from 0 in the first.
        remat="full",
    )
    c.mixing = dict(mixup=0.8, cutmix=1.0, switch=0.5, label_smoothing=0.1)
    c.layer_decay = 0.85  # Rate of a block over that of the next.
    c.optimizer = blocks.optimizer(
        peak_lr=4e-3,
        final_lr=1e-6,
        schedule="cosine",
        warmup_steps=5 * STEPS_PER_EPOCH,
        b2=0.999,
        weight_decay=0.05,
    )
    c.ema_decay = 0.9999
    return config.apply_variant(c, VARIANTS, variant)
