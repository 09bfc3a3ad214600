r"""Stage 1 of RAE (arXiv:2510.11690): a ViT decoder for frozen latents.

    rae-jax train --config configs/rae_decoder.py:VARIANT --workdir runs/decoder \
        --config.encoder.weights=runs/ldae

Variants: b, l and xl, the paper's decoders at 256 pixels behind an l-DAE ViT-B; the
xl decoder behind published encoders, whose weights come from the hub: dinov2_s,
dinov2_b, dinov2_l, siglip2_b, mae_b, dinov3_l_k7 and dinov3_l_k23 (RAEv2's sums of
layers); ldae_vit_b, an l-DAE converted to a plain ViT in runs/ldae_vit; dinov2_b_512
at 512 pixels with 1024 tokens; behind DINOv2-B also upsample_512, 512 pixels from 256
tokens, xl_tpu, the other published optimiser, and one_gpu_80gb and one_gpu_24gb, the
recipe in parts; photos; folder, for an encoder that you trained on your own images;
smoke, and smoke_gan with a critic.
"""

from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.convert import published
from rae_jax.models import decoder, encoders

STEPS_PER_EPOCH = 2502  # ImageNet at batch 512.
DINOV2_B = ("upsample_512", "xl_tpu", "one_gpu_80gb", "one_gpu_24gb")
TPU_OPTIMIZER = dict(b1=0.5, b2=0.9, warmup_from_zero=False)

VARIANTS = {
    "b": dict(model=decoder.PRESETS["b"]),
    "l": dict(model=decoder.PRESETS["l"]),
    "xl": {},
    **{name: {} for name in encoders.EXPERIMENTS},
    "ldae_vit_b": {},
    "dinov2_b_512": dict(data=dict(image_size=512)),
    "upsample_512": dict(data=dict(image_size=512)),
    "xl_tpu": dict(optimizer=TPU_OPTIMIZER, gan=dict(optimizer=TPU_OPTIMIZER)),
    "one_gpu_80gb": dict(optimizer=dict(accumulate=8)),
    "one_gpu_24gb": dict(optimizer=dict(accumulate=32)),
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
        # The encoder is the critic's backbone as well: nothing has to be downloaded.
        # Ten photographs are too few for the published critic: with its weight and
        # augmentation it ranks patches no better than chance and disturbs the decoder.
        gan=dict(
            weight=0.2,
            critic_start=180,
            start=230,
            backbone=dict(name="encoder", weights=""),
            blocks=(1, 2),
            kernel_size=3,
            norm_groups=1,
            dtype="float32",
            augment=dict(probability=0.0),
            optimizer=dict(peak_lr=1e-3, warmup_steps=10),
        ),
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
        gan=dict(critic_start=12_000, start=13_500, optimizer=dict(warmup_steps=500)),
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
        gan=dict(weight=0.0),
        optimizer=dict(warmup_steps=1),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
    "smoke_gan": dict(
        inherits="smoke",
        gan=dict(
            weight=0.75,
            critic_start=1,
            start=2,
            backbone=dict(name="encoder", weights=""),
            blocks=(0, 1),
            kernel_size=3,
            dtype="float32",
            optimizer=dict(warmup_steps=1),
        ),
    ),
}


def _critic() -> dict[str, Any]:
    """Returns the block of the published critic, on DINO ViT-S/8."""
    backbone = blocks.pretrained_encoder(
        encoders.PRESETS["dino_s8"],
        activation="gelu_tanh",  # Not what DINO was trained with, but published so.
        dtype="bfloat16",
        remat="full",
    )
    source = f"{published.COLLECTION}:discs/dino_vit_small_patch8_224.pth"
    return dict(
        weight=0.75,  # 0: no critic.
        max_adaptive_weight=1e4,
        critic_start=6 * STEPS_PER_EPOCH,
        start=8 * STEPS_PER_EPOCH,  # From here on the decoder hears the critic.
        critic_updates=1,
        loss="hinge",  # or vanilla.
        backbone=backbone | dict(weights=source, ema=True),  # name="encoder": our own.
        blocks=(2, 5, 8, 11),
        kernel_size=9,
        spectral_norm=True,
        norm_groups=0,  # 0: one per channel.
        dtype="bfloat16",
        augment=dict(probability=1.0, cutout=0.0),
        # Its schedule counts the critic's updates, so it ends before the decline does.
        optimizer=blocks.optimizer(schedule="cosine", warmup_steps=STEPS_PER_EPOCH),
    )


def get_config(variant: str = "xl") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("rae_decoder", num_steps=16 * STEPS_PER_EPOCH)
    c.data = blocks.data(transform="resize_random_crop", flip=False, batch_size=512)
    c.encoder = blocks.encoder("runs/ldae")
    preset = "dinov2_b" if variant in DINOV2_B else variant
    if preset in encoders.PRESETS:
        c.encoder = blocks.pretrained_encoder(encoders.PRESETS[preset])
    c.model = decoder.PRESETS["xl"] | dict(
        trainable_pos_embed=True, dtype="bfloat16", remat="full"
    )
    c.loss = dict(perceptual="vgg", perceptual_weight=1.0, perceptual_start=0)
    c.noise = dict(tau=0.8, distribution="uniform")
    c.optimizer = blocks.optimizer(schedule="cosine", warmup_steps=STEPS_PER_EPOCH)
    c.ema_decay = 0.9978
    c.gan = _critic()
    c.evaluation = dict(  # Beside PSNR, SSIM and LPIPS, every.evaluate steps.
        inception="",  # Weights of the FID Inception: measures rFID.
        efflite0=False,
        encoder="",  # Hub id or folder: distance in its tokens.
        encoder_token="mean",  # "cls" with facebook/dinov2-large is FD-DINOv2.
        reference="",  # .npz or folder; the validation images themselves if empty.
        batch_size=64,
        best="",  # Score, such as rfid_50k, whose best checkpoint is kept in best/.
    )
    return config.apply_variant(c, VARIANTS, variant)
