r"""MAE pre-training (arXiv:2111.06377), the baseline of Table 4 of l-DAE's paper.

    rae-jax train --config configs/mae.py:VARIANT --workdir runs/mae

Variants: t4_mae_b and t4_mae_l, ViT-B and ViT-L as published: 224 pixels, 1600 epochs
(--config.data.image_size=256 for the tokens of l-DAE). Smaller, of the same sizes as
these tiers of configs/ldae.py, with a suffix: _tier_small, 256 pixels, half as wide,
100 classes; _photos and _digits, minutes on a CPU; _smoke, seconds, of which smoke is
that of t4_mae_b.

An encoder of the family "mae" takes the workdir as its weights.
"""

from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config

IMAGES = 1_281_167  # Of ImageNet, of which an epoch drops the last part of a batch.

WIDE = dict(hidden_size=1024, depth=24, num_heads=16, intermediate_size=4096)
ROWS = {"t4_mae_b": {}, "t4_mae_l": dict(model=WIDE)}


def _model(width: int, depth: int, decoder: int, decoder_depth: int) -> dict[str, Any]:
    """Returns sizes with heads of 32 features in the encoder, 16 in the decoder."""
    return dict(
        hidden_size=width,
        depth=depth,
        num_heads=width // 32,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder // 16,
        decoder_intermediate_size=4 * decoder,
    )


_CPU = dict(
    optimizer=dict(peak_lr=1e-3, clip_norm=1.0),
    ema_decay=0.99,
    every=dict(log=20, checkpoint=200, evaluate=1_000),
)
_CPU_MODEL = dict(patch_size=8, remat="none", dtype="float32")


def _on_cpu(tier: str, data: dict[str, Any], steps: int, warmup: int) -> dict[str, Any]:
    """Returns the changes of both sizes at a tier of a CPU, by name of the size."""
    optimizer = _CPU["optimizer"] | dict(warmup_steps=warmup)
    common = dict(_CPU, tier=tier, data=data, num_steps=steps, optimizer=optimizer)
    models = {"b": _model(96, 3, 64, 2), "l": _model(128, 6, 64, 2)}
    return {k: common | dict(model=m | _CPU_MODEL) for k, m in models.items()}


def _small(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the changes of the tier of one GPU."""
    epoch = 126_689 // 1024  # Images of the 100 classes of arXiv:1906.05849.
    return dict(
        tier="small",
        num_steps=1600 * epoch,
        data=blocks.data(
            path="data/imagenet100_256",
            transform="mae",
            batch_size=1024,
            validation_size=5_000,
        ),
        model=model,
        optimizer=dict(peak_lr=6e-4, warmup_steps=40 * epoch),
    )


TIERS = {
    "tier_small": {
        "b": _small(dict(hidden_size=384, num_heads=6, intermediate_size=1536)),
        "l": _small(WIDE | dict(hidden_size=512, num_heads=8, intermediate_size=2048)),
    },
    # 80 epochs each, a twentieth of the paper's, as l-DAE there.
    "photos": _on_cpu("photos", blocks.photos(batch_size=32), 3_200, 80),
    "digits": _on_cpu("digits", blocks.digits(batch_size=64), 4_960, 124),
    "smoke": {
        size: changes
        | dict(
            num_steps=3,
            data=blocks.synthetic(),
            model=_model(32, depth, 16, 1) | _CPU_MODEL,
            optimizer=dict(warmup_steps=1),
            every=dict(log=1, checkpoint=2, evaluate=3),
        )
        for depth, (size, changes) in enumerate(
            _on_cpu("smoke", blocks.synthetic(), 3, 1).items(), 1
        )
    },
}
VARIANTS = {row: dict(row=row) | changes for row, changes in ROWS.items()}
for _tier, _sizes in TIERS.items():
    for _size, _changes in _sizes.items():
        _row, _data = f"t4_mae_{_size}", _changes["data"] | dict(transform="mae")
        VARIANTS[f"{_row}_{_tier}"] = _changes | dict(inherits=_row, data=_data)
VARIANTS["smoke"] = dict(inherits="t4_mae_b_smoke")


def get_config(variant: str = "t4_mae_b") -> ConfigDict:
    """Returns the config of a variant."""
    batch_size = 4096
    steps_per_epoch = IMAGES // batch_size
    c = blocks.run("mae", num_steps=1600 * steps_per_epoch)
    c.row, c.tier = "t4_mae_b", "paper"
    c.data = blocks.data(image_size=224, transform="mae", batch_size=batch_size)
    c.norm_pixels = True  # Patches are predicted normalised by their own mean and std.
    c.model = dict(
        patch_size=16,
        hidden_size=768,
        depth=12,
        num_heads=12,
        intermediate_size=3072,
        decoder_hidden_size=512,
        decoder_depth=8,
        decoder_num_heads=16,
        decoder_intermediate_size=2048,
        mask_ratio=0.75,
        dtype="bfloat16",
        remat="full",
    )
    c.optimizer = blocks.optimizer(
        peak_lr=1.5e-4 * batch_size / 256,
        final_lr=0.0,
        schedule="cosine",
        warmup_steps=40 * steps_per_epoch,
        weight_decay=0.05,
    )
    c.ema_decay = 0.9999
    return config.apply_variant(c, VARIANTS, variant)
