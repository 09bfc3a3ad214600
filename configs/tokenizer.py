r"""Trained tokenizers of l-DAE (arXiv:2401.14404 section 4): runs before those of ldae.

    rae-jax train --config configs/tokenizer.py:VARIANT --workdir runs/VARIANT

Runs of configs/ldae.py find them beside their own workdir, under the variant's name.
Patch PCA and pixels need no run.

Variants: vqgan_full, the autoencoder of latent diffusion with LPIPS and a critic
(published weights: stabilityai/sd-vae-ft-ema), and vqgan_noperc, the same without
LPIPS, both of stride 8 and 4 channels; conv_vae_c{2,4,8,16,32}, without a critic as
well, of so many channels, each of which makes four values of a token; the linear maps
of patches of 16 pixels, variational patch_vae_d{8,16,32,64,128} and plain
patch_ae_d{8,16,32,64,128}, of so many values.

The same with patches of 8 pixels and half of the values, a minute or two each on two
cores: photos_ and digits_ before vqgan_full, vqgan_noperc, conv_vae_c{1,2,4,8,16},
patch_vae_d{4,8,16,32,64} and patch_ae_d{4,8,16,32,64}. And smoke (a patch-wise VAE),
smoke_ae, smoke_conv and smoke_vqgan: seconds.
"""

from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config

BASE_LR = 4.5e-6  # Of latent diffusion, per image of a batch.
BATCH = 96
# Beginnings of the names that tables make.
ROWS = ("vqgan_full", "vqgan_noperc", "conv_vae_c", "patch_vae_d", "patch_ae_d")
ROWS += ("photos_", "digits_")
CHANNELS = (2, 4, 8, 16, 32)
DIMS = (8, 16, 32, 64, 128)


def _patchwise(kind: str, latent_dim: int, num_steps: int) -> dict[str, Any]:
    """Returns the changes of a patch-wise tokenizer."""
    return dict(
        num_steps=num_steps,
        tokenizer=dict(name=kind, latent_dim=latent_dim),
        optimizer=dict(
            peak_lr=1e-3,
            final_lr=1e-6,
            schedule="cosine",
            warmup_steps=num_steps // 20,
            b1=0.9,
            b2=0.99,
        ),
        ema_decay=0.99,
    )


def _conv(channels: int, **changes: Any) -> dict[str, Any]:
    """Returns the changes of a convolutional tokenizer."""
    tokenizer = dict(name="conv_vae", latent_dim=4 * channels)
    return dict(changes, tokenizer=tokenizer | changes.get("tokenizer", {}))


def _vqgan(channels: int, start: int, perceptual: bool, **changes: Any):
    """Returns the changes of a convolutional tokenizer with a critic."""
    loss = dict(error="l1", perceptual_weight=float(perceptual))
    critic = dict(weight=0.5, start=start) | changes.pop("critic", {})
    return _conv(channels, loss=loss, critic=critic, **changes)


def _small(prefix: str, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns all variants at a size for two cores."""
    sizes = blocks.PHOTOS_CONVOLUTIONS
    patchwise = dict(data=data, every=dict(log=40, checkpoint=400, evaluate=800))
    conv = dict(
        num_steps=400,
        data=data | dict(batch_size=8),
        tokenizer=dict(patch_size=8, sizes=sizes),
        optimizer=dict(
            peak_lr=5e-3, schedule="cosine", warmup_steps=20, b1=0.9, b2=0.99
        ),
        ema_decay=0.95,
        every=dict(log=20, checkpoint=200, evaluate=400),
    )
    critic = dict(width=16, num_layers=2, optimizer=dict(peak_lr=5e-4))
    # A conditional, where the critic is, is slow on CPUs: fewer steps.
    judged = conv | dict(num_steps=300, critic=critic)
    found = {
        "vqgan_full": _vqgan(2, 200, True, **judged),
        "vqgan_noperc": _vqgan(2, 200, False, **judged),
    }
    # VGG would take most of the minute.
    found["vqgan_full"]["loss"] |= dict(perceptual="alex")
    for channels in CHANNELS:
        found[f"conv_vae_c{channels // 2}"] = _conv(channels // 2, **conv)
    for kind in ("patch_vae", "patch_ae"):
        for dim in DIMS:
            changes = patchwise | _patchwise(kind, dim // 2, 800)
            changes["tokenizer"] |= dict(patch_size=8)
            found[f"{kind}_d{dim // 2}"] = changes
    return {f"{prefix}_{name}": changes for name, changes in found.items()}


SMOKE = dict(
    num_steps=3,
    data=blocks.synthetic(),
    tokenizer=dict(
        name="patch_vae",
        patch_size=8,
        latent_dim=8,
        sizes=blocks.SMOKE_CONVOLUTIONS,
    ),
    every=dict(log=1, checkpoint=2, evaluate=3),
)

VARIANTS = {
    "vqgan_full": _vqgan(4, 50_001, True),
    "vqgan_noperc": _vqgan(4, 50_001, False),
    **{f"conv_vae_c{channels}": _conv(channels) for channels in CHANNELS},
    **{
        f"{kind}_d{dim}": _patchwise(kind, dim, 20_000)
        | dict(data=blocks.data(batch_size=256))
        for kind in ("patch_vae", "patch_ae")
        for dim in DIMS
    },
    **_small("photos", blocks.photos(batch_size=32)),
    **_small("digits", blocks.digits(batch_size=32)),
    "smoke": SMOKE,
    "smoke_ae": dict(inherits="smoke", tokenizer=dict(name="patch_ae")),
    "smoke_conv": dict(inherits="smoke", tokenizer=dict(name="conv_vae")),
    "smoke_vqgan": dict(
        inherits="smoke_conv",
        loss=dict(error="l1", perceptual="alex", perceptual_weight=1.0),
        critic=dict(weight=0.5, start=1, width=8, num_layers=1),
    ),
}


def get_config(variant: str = "conv_vae_c4") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("tokenizer", num_steps=250_000)
    c.data = blocks.data(batch_size=BATCH, transform="resize_random_crop")
    block = blocks.tokenizer(name="conv_vae", latent_dim=16)
    c.tokenizer = {k: block[k] for k in ("name", "patch_size", "latent_dim", "sizes")}
    c.loss = dict(
        error="l2",  # l1, as in latent diffusion.
        perceptual="vgg",
        perceptual_weight=0.0,
        kl_weight=1e-6,  # Of the divergence beside the error, both summed.
    )
    adam = dict(peak_lr=BASE_LR * BATCH, b1=0.5, b2=0.9)
    c.critic = dict(
        weight=0.0,  # 0: no critic.
        adaptive=True,  # By gradients of the last layer; else beside the mean error.
        max_adaptive_weight=1e4,
        start=50_001,  # From here on it is trained, and heard.
        loss="hinge",  # or vanilla.
        width=64,
        num_layers=3,
        dtype="float32",
        optimizer=blocks.optimizer(**adam),
    )
    c.optimizer = blocks.optimizer(**adam)
    c.ema_decay = 0.999
    return config.apply_variant(c, VARIANTS, variant)
