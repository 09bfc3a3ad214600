r"""Linear probes of a frozen encoder (arXiv:2401.14404 section 3 and appendix A).

    rae-jax train --config configs/probe.py:VARIANT --workdir runs/probe \
        --config.encoder.weights=runs/ldae

The encoder is that of the run that encoder.weights names, of ldae, mae or mocov3.
Heads of a sweep (blocks, noise levels, clean or noisy input, rates) train in one run;
the results are in probe.json.

Variants: vit_b, vit_l and vit_half_l, the paper's protocol (batch 16384, LARS, 90
epochs); adamw, the other reading of its rate; cls, the class token of a run of MAE
or MoCo v3; a_probe_t and a_probe_depth, the two tables of the appendix; mae_b, mae_l,
mocov3_b and dino_b, published weights at 224 pixels; photos, photos_sweep, photos_cls,
photos_times and photos_blocks, embedded photographs; digits, digits_cls, digits_times
and digits_blocks, embedded digits; smoke; smoke_sweep.
"""

from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import encoders

STEPS_PER_EPOCH = 78  # ImageNet at batch 16384.
TIMES = dict(times=(0, 10, 20, 40, 80), noisy=(False, True))
BLOCKS = (9, 10, 11, 12, 13, 14, 15)  # Of 24.
CLASS_TOKEN = dict(token="cls", norm=True)
VIT_L = dict(hidden_size=1024, num_heads=16)
# Published encoders, at the size that they were trained for.
PUBLISHED = {"mae_b": "mae_b", "mae_l": "mae_l", "dino_b": "dino_b16"}
PUBLISHED["mocov3_b"] = "mocov3_b"
# Until a run is there to follow, its encoder is taken for MAE's ViT-B.
CLASS_TOKENS = {"cls": 256, "photos_cls": 64, "digits_cls": 32}


def _published(batch_size: int = 16384) -> dict[str, Any]:
    """Returns a probe of the class token after the last norm, at 224 pixels."""
    return dict(
        data=dict(image_size=224, batch_size=batch_size),
        encoder=dict(sizes=dict(image_size=224)),
        pool=CLASS_TOKEN,
    )


def _sgd(peak_lr: float, batch_size: int) -> dict[str, Any]:
    """Returns changes for SGD with a rate for 256 images, without warm-up."""
    steps = -(-1_281_167 // batch_size)
    lr = peak_lr * batch_size / 256
    return dict(
        num_steps=steps * 90,
        optimizer=dict(name="sgd", peak_lr=lr, warmup_steps=0),
    )


def _small(data: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Returns a probe of seconds."""
    half = num_steps // 2
    return dict(
        num_steps=num_steps,
        num_classes=10,
        data=data,
        optimizer=dict(name="adamw", peak_lr=3e-3, warmup_steps=0),
        every=dict(log=half // 2, checkpoint=half, evaluate=num_steps),
    )


PHOTOS = _small(blocks.photos(batch_size=64), 80)
DIGITS = _small(blocks.digits(batch_size=256), 400)
DIGITS_SIZES = blocks.PHOTOS_SIZES | dict(image_size=32)
EVERYTHING = ("encoder", "random", "pca", "pixels")

VARIANTS = {
    "vit_b": {},
    "vit_l": dict(encoder=dict(sizes=dict(depth=24, **VIT_L))),
    "vit_half_l": dict(encoder=dict(sizes=VIT_L)),
    "adamw": dict(optimizer=dict(name="adamw", peak_lr=6.4e-3)),
    "cls": dict(pool=CLASS_TOKEN),
    "a_probe_t": dict(inherits="vit_half_l", sweep=TIMES),
    "a_probe_depth": dict(
        inherits="vit_half_l",
        encoder=dict(sizes=dict(depth=max(BLOCKS))),
        sweep=dict(blocks=BLOCKS),
    ),
    "mae_b": _published(),
    "mae_l": _published(),
    "mocov3_b": _published(1024) | _sgd(3.0, 1024),
    "dino_b": _published(),
    "photos": PHOTOS
    | dict(
        features=EVERYTHING,
        encoder=dict(weights="../ldae", sizes=blocks.PHOTOS_SIZES),
    ),
    "photos_cls": PHOTOS | dict(pool=CLASS_TOKEN),
    "photos_sweep": dict(
        inherits="photos_times",
        sweep=dict(lrs=(1e-3, 3e-3, 1e-2)),
        knn=dict(neighbours=(10, 20)),
    ),
    "photos_times": dict(inherits="photos", features=("encoder",), sweep=TIMES),
    "photos_blocks": dict(
        inherits="photos",
        features=("encoder",),
        encoder=dict(sizes=dict(depth=6)),
        sweep=dict(blocks=(1, 2, 3, 4, 5, 6)),
    ),
    "digits": DIGITS
    | dict(
        features=EVERYTHING,
        encoder=dict(weights="../ldae", sizes=DIGITS_SIZES),
    ),
    "digits_cls": DIGITS | dict(pool=CLASS_TOKEN),
    "digits_times": dict(inherits="digits", features=("encoder",), sweep=TIMES),
    "digits_blocks": dict(
        inherits="digits",
        features=("encoder",),
        encoder=dict(sizes=dict(depth=6)),
        sweep=dict(blocks=(1, 2, 3, 4, 5, 6)),
    ),
    "smoke": dict(
        num_steps=3,
        num_classes=10,
        data=blocks.synthetic(),
        encoder=dict(weights="random", sizes=blocks.SMOKE_SIZES),
        optimizer=dict(warmup_steps=1),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
    "smoke_sweep": dict(
        inherits="smoke",
        features=("encoder", "random"),
        sweep=dict(blocks=(1, 2), times=(0, 40), noisy=(False, True), lrs=(0.1, 6.4)),
        knn=dict(neighbours=(1, 3)),
    ),
}


def get_config(variant: str = "vit_b") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("probe", num_steps=90 * STEPS_PER_EPOCH)
    c.row = ""  # Of the paper's tables, for the report; "": as the encoder's run.
    c.tier = ""
    c.data = blocks.data(transform="probe", batch_size=16384)
    c.num_classes = 1000
    c.features = ("encoder",)  # Also random, pca and pixels, to compare with.
    encoder = blocks.encoder("runs/ldae")
    if variant in PUBLISHED:
        preset = encoders.PRESETS[PUBLISHED[variant]]
        encoder = blocks.pretrained_encoder(preset)
    if variant in CLASS_TOKENS:
        preset, size = encoders.PRESETS["mae_b"], CLASS_TOKENS[variant]
        sizes = dict(image_size=size, table_size=size)
        encoder = blocks.pretrained_encoder(preset, **sizes)
        encoder["weights"] = "runs/mae" if variant == "cls" else "../mae"
    # match: an l-DAE encoder takes its sizes from the run that weights names.
    c.encoder = encoder | dict(ema=False, match=True)
    c.noisy = False  # Whether the encoder sees noise of its level.
    c.pool = dict(
        token="mean",  # cls: the class token, of encoders that have one.
        norm=False,  # Whether the encoder's last norm comes before.
    )
    # Axes of a sweep; one that is empty has what the rest of the config says.
    c.sweep = dict(blocks=(), times=(), noisy=(), lrs=())
    c.knn = dict(neighbours=(), temperature=0.07)  # (10, 20): DINO's k-NN as well.
    c.optimizer = blocks.optimizer(
        name="lars",
        peak_lr=6.4,
        final_lr=0.0,
        schedule="cosine",
        warmup_steps=10 * STEPS_PER_EPOCH,
    )
    return config.apply_variant(c, VARIANTS, variant)
