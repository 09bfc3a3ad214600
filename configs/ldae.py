r"""l-DAE pre-training (arXiv:2401.14404): every row of the paper, and the final form.

    rae-jax train --config configs/ldae.py:VARIANT --workdir runs/ldae

Variants: vit_b and vit_l, the paper's encoders at 256 pixels; vit_half_l, 12 of 24
blocks of that width, its t3_orig_image; photos, the embedded photographs (a minute or
two on two cores); folder, your own class folders at 64 pixels; smoke, seconds.

And every row of the paper's tables, each a change of another, see ROWS. Table 1:
t1_dit_baseline t1_no_cls t1_no_perc t1_no_adv t1_linear_g2. Table 2: t2_convvae_d8
t2_convvae_d16 t2_convvae_d32 t2_convvae_d64 t2_convvae_d128 t2_pvae_d8 t2_pvae_d16
t2_pvae_d32 t2_pvae_d64 t2_pvae_d128 t2_pae_d8 t2_pae_d16 t2_pae_d32 t2_pae_d64
t2_pae_d128 t2_ppca_d8 t2_ppca_d16 t2_ppca_d32 t2_ppca_d64 t2_ppca_d128. Figure 5:
f5_ppca_d256 f5_pix_32_p2 f5_pix_64_p4 f5_pix_128_p8 f5_pix_256_p16. Table 3:
t3_pca_baseline t3_predict_clean t3_no_scaling t3_image_in t3_image_out t3_orig_image
(l-DAE). Section 5: s5_random_crop s5_ep800 s5_ep1600 s5_enc_vitb s5_enc_vitl. Table 4:
t4_ldae_b t4_ldae_l. In the text or not in the paper: x_single_sigma x_eps_on_final
x_latent_norm_none x_latent_norm_per_channel x_ldae_norm_none x_ldae_norm_per_channel
x_ppca_ddpm x_ppca_cls x_wres_0 x_wres_001 x_wres_1.

A row as it stands is the paper's run; with a suffix it is smaller, see TIERS:
_tier_small (256 pixels, half as wide, 100 classes: a day on one GPU), _photos, _digits
(minutes on a CPU), _smoke (seconds). Its tokenizer, unless it is fitted here, is a run
of configs/tokenizer.py; its workdir lies beside this one's, named as that variant.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config

STEPS_PER_EPOCH = 625  # ImageNet at batch 2048.

# What a row starts from, and what each changes in the row that it names first. Sizes
# are the paper's: `image` and `patch` in pixels, `dim` values of a latent per token.
BASE = dict(
    image=256,
    patch=16,
    tokenizer="vqgan_full",
    dim=16,
    norm="global",
    schedule="ddpm_linear",
    input="latent",
    target="eps",
    residual=0.1,
    conditional=False,
    transform="center_crop",
    epochs=400,
    width=1024,
    depth=24,
    heads=16,
    encoder=12,
)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    # Table 1: a latent diffusion model becomes one for self-supervised learning.
    "t1_dit_baseline": ("", dict(conditional=True)),
    "t1_no_cls": ("t1_dit_baseline", dict(conditional=False)),
    "t1_no_perc": ("t1_no_cls", dict(tokenizer="vqgan_noperc")),
    "t1_no_adv": ("t1_no_perc", dict(tokenizer="conv_vae")),
    "t1_linear_g2": ("t1_no_adv", dict(schedule="linear_gamma2")),
    # Table 2 and Figure 5: its tokenizer.
    **{
        f"t2_{name}_d{dim}": ("t1_linear_g2", dict(tokenizer=tokenizer, dim=dim))
        for name, tokenizer in {
            "convvae": "conv_vae",
            "pvae": "patch_vae",
            "pae": "patch_ae",
            "ppca": "pca",
        }.items()
        for dim in (8, 16, 32, 64, 128)
    },
    "f5_ppca_d256": ("t1_linear_g2", dict(tokenizer="pca", dim=256)),
    **{
        f"f5_pix_{size}_p{size // 16}": (
            "t1_linear_g2",
            dict(tokenizer="pixels", image=size, patch=size // 16),
        )
        for size in (32, 64, 128, 256)
    },
    # Table 3: towards a classical denoising autoencoder.
    "t3_pca_baseline": ("t2_ppca_d32", {}),
    "t3_predict_clean": ("t3_pca_baseline", dict(target="latent")),
    "t3_no_scaling": ("t3_predict_clean", dict(schedule="linear_sigma")),
    "t3_image_in": ("t3_no_scaling", dict(input="image")),
    "t3_image_out": ("t3_image_in", dict(target="image_pca")),
    "t3_orig_image": ("t3_image_out", dict(target="image")),
    # Section 5 and Table 4: augmentation, length, size.
    "s5_random_crop": ("t3_orig_image", dict(transform="random_resized_crop")),
    "s5_ep800": ("s5_random_crop", dict(epochs=800)),
    "s5_ep1600": ("s5_random_crop", dict(epochs=1600)),
    "s5_enc_vitb": ("s5_random_crop", dict(width=768, heads=12)),
    "s5_enc_vitl": ("s5_random_crop", dict(depth=48, encoder=24)),
    "t4_ldae_b": ("s5_enc_vitb", dict(epochs=1600)),
    "t4_ldae_l": ("s5_enc_vitl", dict(epochs=1600)),
    # In the text: one level of noise, noise as the target of the final form. Not in
    # the paper: scales of the latents, steps of Table 1 without a trained tokenizer,
    # weights of what is outside of the latents.
    "x_single_sigma": ("t3_orig_image", dict(schedule="single_sigma")),
    "x_eps_on_final": ("t3_orig_image", dict(target="eps")),
    "x_latent_norm_none": ("t2_ppca_d32", dict(norm="none")),
    "x_latent_norm_per_channel": ("t2_ppca_d32", dict(norm="per_channel")),
    "x_ldae_norm_none": ("t3_orig_image", dict(norm="none")),
    "x_ldae_norm_per_channel": ("t3_orig_image", dict(norm="per_channel")),
    "x_ppca_ddpm": ("t2_ppca_d32", dict(schedule="ddpm_linear")),
    "x_ppca_cls": ("t2_ppca_d32", dict(conditional=True)),
    "x_wres_0": ("t3_orig_image", dict(residual=0.0)),
    "x_wres_001": ("t3_orig_image", dict(residual=0.01)),
    "x_wres_1": ("t3_orig_image", dict(residual=1.0)),
}


@dataclasses.dataclass(frozen=True)
class Tier:
    """A size at which all rows can be run.

    Attributes:
        name: Of the tier.
        data: Data block at the paper's 256 pixels, whatever this tier makes of them.
        patch: Pixels per token side at the paper's 16.
        classes: Number of classes of the data.
        epoch: Steps per epoch.
        epochs: Epochs for one of the paper.
        width, heads, depth: What divides those of the paper.
        tokenizers: Prefix of tokenizer runs; "random" for untrained ones.
        changes: Further changes of the config.
    """

    name: str
    data: Mapping[str, Any]
    patch: int
    classes: int
    epoch: float
    epochs: float = 1.0
    width: int = 1
    heads: int = 1
    depth: int = 1
    tokenizers: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_CPU = dict(
    optimizer=dict(peak_lr=1e-3, clip_norm=1.0),
    ema_decay=0.99,
    every=dict(log=20, checkpoint=200, evaluate=1_000),
    model=dict(remat="none", dtype="float32"),
)


def _on_cpu(num_images: int) -> dict[str, Any]:
    """Returns the further changes of a tier of minutes on a CPU."""
    tokenizer = dict(num_images=num_images, sizes=blocks.PHOTOS_CONVOLUTIONS)
    return dict(_CPU, tokenizer=tokenizer)


PHOTOS_TIER = Tier(
    name="photos",
    data=blocks.photos(batch_size=32),
    patch=8,
    classes=10,
    epoch=1280 / 32,
    epochs=1 / 20,
    width=8,
    heads=4,
    depth=4,
    tokenizers="photos_",
    changes=_on_cpu(num_images=1_280),
)
TIERS = {
    "": Tier("paper", blocks.data(batch_size=2048), 16, 1000, STEPS_PER_EPOCH),
    "tier_small": Tier(
        name="small",
        data=blocks.data(
            path="data/imagenet100_256", batch_size=1024, validation_size=5_000
        ),
        patch=16,
        classes=100,
        epoch=126_689 / 1024,  # Images of the 100 classes of arXiv:1906.05849.
        width=2,
        heads=2,
        changes=dict(optimizer=dict(peak_lr=4e-4)),
    ),
    "photos": PHOTOS_TIER,
    "digits": dataclasses.replace(
        PHOTOS_TIER,
        name="digits",
        data=blocks.digits(batch_size=64),
        epoch=4000 / 64,
        tokenizers="digits_",
        changes=_on_cpu(num_images=4_000),
    ),
    "smoke": Tier(
        name="smoke",
        data=blocks.synthetic(),
        patch=8,
        classes=10,
        epoch=1,
        epochs=1 / 200,
        width=32,
        heads=8,
        depth=12,
        tokenizers="random",
        changes=dict(
            _CPU,
            tokenizer=dict(num_images=64, sizes=blocks.SMOKE_CONVOLUTIONS),
            sampling=dict(num_steps=4),
            every=dict(log=1, checkpoint=2, evaluate=2),
        ),
    ),
}


def settings(row: str) -> dict[str, Any]:
    """Returns all settings of a row, in the paper's sizes."""
    parent, changes = ROWS[row]
    return (settings(parent) if parent else BASE) | changes


def latent_dim(row: str, tier: Tier) -> int:
    """Returns the values of a latent per token.

    Smaller patches have fewer, though not by as much as they are smaller: the paper's
    d of D = 768 becomes d (D / 768)^(1/2). Then a latent holds the same part of the
    variance: d = 16 and 32 of a patch of 16 pixels have 0.91 and 0.95 of that of
    natural images, 8 and 16 of the 192 of the photographs' patches 0.92 and 0.96 (of
    the digits' 0.80 and 0.92). The latents of "pixels" are the patch.
    """
    row_settings = settings(row)
    patch_dim = 3 * (tier.patch * row_settings["patch"] // 16) ** 2
    if row_settings["tokenizer"] == "pixels":
        return patch_dim
    return round(row_settings["dim"] * math.sqrt(patch_dim / 768))


def _tokenizer(row: str, tier: Tier) -> dict[str, Any]:
    """Returns the changes of the tokenizer block."""
    s, dim = settings(row), latent_dim(row, tier)
    kind = s["tokenizer"]
    block = dict(
        name="conv_vae" if kind.startswith("vqgan") else kind,
        patch_size=tier.patch * s["patch"] // 16,
        latent_dim=dim,
        norm=s["norm"],
    )
    if kind in ("pca", "pixels"):
        return block
    if tier.tokenizers == "random":
        return block | dict(weights="random")
    if kind == "vqgan_full" and tier.patch == 16:
        return block | dict(name="sd_vae", weights="stabilityai/sd-vae-ft-ema")
    size = {"conv_vae": f"_c{dim // 4}"}.get(kind, f"_d{dim}")
    size = "" if kind.startswith("vqgan") else size
    return block | dict(weights=f"../{tier.tokenizers}{kind}{size}")


def variant(row: str, tier: Tier) -> dict[str, Any]:
    """Returns what a row at a tier changes in the config."""
    s = settings(row)
    epoch = tier.epoch * tier.epochs
    num_steps = max(2, int(s["epochs"] * epoch))
    image_size = tier.data["image_size"] * s["image"] // 256
    changes = dict(
        row=row,
        tier=tier.name,
        num_steps=num_steps,
        data=dict(tier.data, image_size=image_size, transform=s["transform"]),
        tokenizer=_tokenizer(row, tier),
        noise=dict(
            schedule=s["schedule"],
            input_space=s["input"],
            target=s["target"],
            residual_weight=s["residual"],
        ),
        encoder_depth=s["encoder"] // tier.depth,
        model=dict(
            hidden_size=s["width"] // tier.width,
            depth=s["depth"] // tier.depth,
            num_heads=s["heads"] // tier.heads,
            num_classes=tier.classes if s["conditional"] else 0,
        ),
        optimizer=dict(warmup_steps=max(1, int(100 * epoch))),
    )
    for key, value in tier.changes.items():
        is_block = isinstance(value, Mapping)
        changes[key] = changes.get(key, {}) | value if is_block else value
    return changes


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
    "vit_half_l": dict(inherits="t3_orig_image"),
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
    **{
        f"{row}_{name}" if name else row: variant(row, tier)
        for row in ROWS
        for name, tier in TIERS.items()
    },
}


def get_config(variant: str = "vit_b") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("ldae", num_steps=400 * STEPS_PER_EPOCH)
    c.row, c.tier = "", ""  # For `rae-jax report --table ldae`.
    c.data = blocks.data(batch_size=2048)
    c.tokenizer = blocks.tokenizer()
    c.noise = dict(
        schedule="linear_sigma",  # ddpm_linear, linear_gamma2 or single_sigma.
        input_space="image",  # latent.
        target="image",  # eps, latent or image_pca.
        residual_weight=0.1,
        weighting="auto",  # one, gamma2 or inverse; see losses.denoising.weights.
        num_levels=1000,
    )
    c.encoder_depth = 12
    c.model = dict(
        hidden_size=768,
        depth=24,
        num_heads=12,
        mlp_ratio=4.0,
        condition_divisor=4,
        num_classes=0,  # 0: no classes.
        class_dropout_prob=0.1,
        learn_sigma=False,
        dtype="bfloat16",
        remat="unrolled",
    )
    c.optimizer = blocks.optimizer(
        peak_lr=8e-4,
        final_lr=0.0,
        schedule="cosine",
        warmup_steps=100 * STEPS_PER_EPOCH,
        b2=0.999,
    )
    c.ema_decay = 0.9999
    c.sampling = dict(  # Where the noise defines a generative process.
        num_steps=250,
        variance="auto",  # small, large or learned.
        guidance_scale=1.0,  # With classes.
    )
    return config.apply_variant(c, VARIANTS, variant)
