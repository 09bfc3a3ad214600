r"""Stage 2 of RAE (arXiv:2510.11690): DiT-DH on normalised latents.

    rae-jax train --config configs/dit_dh.py:VARIANT --workdir runs/dit_dh \
        --config.encoder.weights=runs/ldae --config.latent_stats=runs/stats \
        --config.decoder=runs/decoder

Variants: s_256, b_256, l_256 and xl_256 with the paper's recipe, behind an l-DAE
ViT-B; XL behind published encoders, as in configs/rae_decoder.py: dinov2_s, dinov2_b,
dinov2_l, siglip2_b, mae_b, dinov3_l_k7, dinov3_l_k23, and dinov2_b_512, the paper's
400 epochs at 512 pixels; larger trunks xxl_256, h_256, g_256 and t_256; other heads
head_4x2048, head_6x1152 and head_2x2688; other latents sd_vae and pixels; recipes
repa, muon and rae_v2; photos; folder; smoke, smoke_sd_vae, smoke_pixels.
Plain DiT is in configs/dit.py.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import dit_dh, encoders

STEPS_PER_EPOCH = 1251  # ImageNet at batch 1024.
# Which published encoder a variant is behind.
ENCODERS = {name: name for name in encoders.EXPERIMENTS} | {
    "dinov2_b_512": "dinov2_b_512",
    "head_4x2048": "dinov2_b",
    "head_6x1152": "dinov2_b",
    "head_2x2688": "dinov2_l",
    "repa": "dinov2_b",
    "muon": "dinov2_b",
    "rae_v2": "dinov3_l_k7",
    "sd_vae": "sd_vae",
    "pixels": "pixels",
    "smoke_sd_vae": "sd_vae_smoke",
    "smoke_pixels": "pixels_smoke",
}

# Muon's rate and decay in RAEv2 (arXiv:2605.18324).
MUON = dict(
    name="muon",
    warmup_steps=25 * STEPS_PER_EPOCH,
    decay_end_step=50 * STEPS_PER_EPOCH,
)
VARIANTS = {
    "s_256": dict(model=dit_dh.PRESETS["s"]),
    "b_256": dict(model=dit_dh.PRESETS["b"]),
    "l_256": dict(model=dit_dh.PRESETS["l"]),
    "xl_256": {},
    # The scaling study goes on to these trunks; from G on no wider than the head.
    "xxl_256": dict(model=dit_dh.PRESETS["xxl"]),
    "h_256": dict(model=dit_dh.PRESETS["h"]),
    "g_256": dict(model=dit_dh.PRESETS["g"]),
    "t_256": dict(model=dit_dh.PRESETS["t"]),
    **{name: {} for name in encoders.EXPERIMENTS},
    "dinov2_b_512": dict(num_steps=400 * STEPS_PER_EPOCH, data=dict(image_size=512)),
    # Shapes of the head, 80 epochs (Tables 16 and 17).
    "head_4x2048": dict(
        num_steps=80 * STEPS_PER_EPOCH,
        model=dict(depth=(28, 4)),
    ),
    "head_6x1152": dict(
        num_steps=80 * STEPS_PER_EPOCH,
        model=dict(hidden_size=(1152, 1152), depth=(28, 6)),
    ),
    "head_2x2688": dict(
        num_steps=80 * STEPS_PER_EPOCH,
        model=dict(hidden_size=(1152, 2688), num_heads=(16, 21)),
    ),
    # Latents of other kinds, with decoders of their own (Table 8 of the paper).
    "sd_vae": dict(latent_stats="none", decoder="own", model=dict(patch_size=2)),
    "pixels": dict(latent_stats="none", decoder="own"),
    "repa": dict(repa=dict(weight=0.5, target="latent")),
    "muon": dict(num_steps=80 * STEPS_PER_EPOCH, optimizer=MUON),
    # RAEv2 (arXiv:2605.18324): sums of DINOv3 layers, prediction of x, an early head
    # that guides, Muon. Its trunk takes time and class as tokens, ours by adaLN.
    "rae_v2": dict(
        num_steps=80 * STEPS_PER_EPOCH,
        model=dict(
            hidden_size=(1440, 2048),
            num_heads=(20, 16),
            prediction="x",
            early_depth=8,
        ),
        optimizer=MUON,
        sampling=dict(
            num_points=101,
            guidance="internal",
            guidance_scale=1.78,
            guidance_interval=(0.1, 1.0),
        ),
    ),
    "photos": blocks.photos_diffusion(
        dict(hidden_size=(128, 256), depth=(4, 2), num_heads=(4, 4)),
        sampling=dict(guidance_scale=2.0),
    ),
    "folder": dict(
        inherits="photos",
        num_steps=50_000,
        data=dict(
            source="class_folder", path="data/my_images", flip=True, batch_size=32
        ),
        flow=dict(shift_base=4096),
        optimizer=dict(name="adamw", peak_lr=5e-4, warmup_steps=500),
        ema_decay=0.999,
        every=dict(log=50, checkpoint=1_000, evaluate=2_000),
    ),
    **blocks.smoke_diffusion(
        dict(hidden_size=(32, 64), depth=(2, 1), num_heads=(2, 4))
    ),
}


def get_config(variant: str = "xl_256") -> ConfigDict:
    """Returns the config of a variant."""
    encoder = blocks.encoder("runs/ldae")
    if variant in ENCODERS:
        encoder = encoders.block(ENCODERS[variant])
    c = blocks.latent_diffusion(
        network="dit_dh",
        model=dit_dh.PRESETS["xl"],
        num_steps=800 * STEPS_PER_EPOCH,
        encoder=encoder,
        align_encoder=blocks.pretrained_encoder(
            encoders.PRESETS["dinov2_b"], normalize=False
        ),
    )
    c.optimizer.update(
        schedule="linear",
        warmup_steps=40 * STEPS_PER_EPOCH,
        warmup_from_zero=False,
        decay_end_step=800 * STEPS_PER_EPOCH,
    )
    c.ema_decay = 0.9995
    return config.apply_variant(c, VARIANTS, variant)
