r"""MoCo v3 pre-training (arXiv:2104.02057), the baseline of Table 4 of l-DAE's paper.

    rae-jax train --config configs/mocov3.py:VARIANT --workdir runs/mocov3

Variants: t4_mocov3_b and t4_mocov3_l, ViT-B and ViT-L as published: 224 pixels, 300
epochs (--config.data.image_size=256 for the tokens of l-DAE). Smaller, of the same
sizes as these tiers of configs/ldae.py, with a suffix: _tier_small, 256 pixels, half as
wide, 100 classes; _photos and _digits, minutes on a CPU; _smoke, seconds, of which
smoke is that of t4_mocov3_b.

An encoder of the family "mocov3" takes the workdir as its weights. Crops are resized
bicubically, as everywhere here; the official code has bilinear ones.
"""

from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config

IMAGES = 1_281_167  # Of ImageNet, of which an epoch drops the last part of a batch.

WIDE = dict(hidden_size=1024, depth=24, num_heads=16, intermediate_size=4096)
ROWS = {"t4_mocov3_b": {}, "t4_mocov3_l": dict(model=WIDE)}


def _model(width: int, depth: int, head: int, out: int) -> dict[str, Any]:
    """Returns sizes with attention heads of 32 features."""
    return dict(
        hidden_size=width,
        depth=depth,
        num_heads=width // 32,
        intermediate_size=4 * width,
        head_hidden_size=head,
        out_features=out,
    )


_CPU_MODEL = dict(patch_size=8, remat="none", dtype="float32")


def _on_cpu(tier: str, data: dict[str, Any], steps: int) -> dict[str, Any]:
    """Returns the changes of both sizes at a tier of a CPU, by name of the size."""
    common = dict(
        tier=tier,
        num_steps=steps,
        data=data,
        optimizer=dict(peak_lr=1e-3, warmup_steps=steps * 40 // 300, clip_norm=1.0),
        every=dict(log=20, checkpoint=200, evaluate=400),
    )
    models = {"b": _model(96, 3, 512, 64), "l": _model(128, 6, 512, 64)}
    return {k: common | dict(model=m | _CPU_MODEL) for k, m in models.items()}


def _small(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the changes of the tier of one GPU."""
    epoch = 126_689 // 1024  # Images of the 100 classes of arXiv:1906.05849.
    return dict(
        tier="small",
        num_steps=300 * epoch,
        data=blocks.data(
            path="data/imagenet100_256", batch_size=1024, validation_size=5_000
        ),
        model=model,
        optimizer=dict(peak_lr=6e-4, warmup_steps=40 * epoch),
    )


TIERS = {
    "tier_small": {
        "b": _small(dict(hidden_size=384, num_heads=6, intermediate_size=1536)),
        "l": _small(WIDE | dict(hidden_size=512, num_heads=8, intermediate_size=2048)),
    },
    # 60 epochs: more of the paper's 300 than the twentieth of the other rows, which
    # would be over before the momentum encoder has moved.
    "photos": _on_cpu("photos", blocks.photos(batch_size=64) | dict(flip=True), 1_200),
    "digits": _on_cpu("digits", blocks.digits(batch_size=128), 1_860),
    "smoke": {
        size: changes
        | dict(
            model=_model(32, depth, 32, 16) | _CPU_MODEL,
            optimizer=dict(warmup_steps=1),
            every=dict(log=1, checkpoint=2, evaluate=3),
        )
        for depth, (size, changes) in enumerate(
            _on_cpu("smoke", blocks.synthetic(), 3).items(), 1
        )
    },
}
VARIANTS = {row: dict(row=row) | changes for row, changes in ROWS.items()}
for _tier, _sizes in TIERS.items():
    for _size, _changes in _sizes.items():
        _row, _data = f"t4_mocov3_{_size}", _changes["data"] | dict(transform="moco")
        VARIANTS[f"{_row}_{_tier}"] = _changes | dict(inherits=_row, data=_data)
VARIANTS["smoke"] = dict(inherits="t4_mocov3_b_smoke")


def get_config(variant: str = "t4_mocov3_b") -> ConfigDict:
    """Returns the config of a variant."""
    batch_size = 4096
    steps_per_epoch = IMAGES // batch_size
    c = blocks.run("mocov3", num_steps=300 * steps_per_epoch)
    c.row, c.tier = "t4_mocov3_b", "paper"
    c.data = blocks.data(image_size=224, transform="moco", batch_size=batch_size)
    c.temperature = 0.2
    c.momentum = 0.99  # Of the momentum encoder at the start; it rises to 1.
    c.model = dict(
        patch_size=16,
        hidden_size=768,
        depth=12,
        num_heads=12,
        intermediate_size=3072,
        head_hidden_size=4096,
        out_features=256,
        dtype="bfloat16",
        remat="full",
    )
    c.optimizer = blocks.optimizer(
        peak_lr=1.5e-4 * batch_size / 256,
        final_lr=0.0,
        schedule="cosine",
        warmup_steps=40 * steps_per_epoch,
        b2=0.999,
        weight_decay=0.1,
    )
    return config.apply_variant(c, VARIANTS, variant)
