r"""The baselines of RAE's stage 2: LightningDiT and plain DiT, without a wide head.

    rae-jax train --config configs/dit.py:VARIANT --workdir runs/dit \
        --config.encoder.weights=runs/ldae --config.latent_stats=runs/stats \
        --config.decoder=runs/decoder

Everything but the network is as in configs/dit_dh.py, the average as in LightningDiT.

Variants: s_256, b_256, l_256 and xl_256 behind an l-DAE ViT-B; XL behind published
encoders: dinov2_s, dinov2_b, dinov2_l, siglip2_b, mae_b, dinov3_l_k7, dinov3_l_k23;
no_shift, XL without the time shift; plain, XL with the blocks of DiT (LayerNorm, GELU,
no rotary positions); repa; other latents sd_vae, sd_vae_repa (SiT with REPA) and
pixels; photos; smoke, smoke_sd_vae, smoke_pixels.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import dit, encoders

STEPS_PER_EPOCH = 1251  # ImageNet at batch 1024.
# Which published encoder a variant is behind.
ENCODERS = {name: name for name in encoders.EXPERIMENTS} | {
    "no_shift": "dinov2_b",
    "plain": "dinov2_b",
    "repa": "dinov2_b",
    "sd_vae": "sd_vae",
    "sd_vae_repa": "sd_vae",
    "pixels": "pixels",
    "smoke_sd_vae": "sd_vae_smoke",
    "smoke_pixels": "pixels_smoke",
}
VARIANTS = {
    "s_256": dict(model=dit.PRESETS["s"]),
    "b_256": dict(model=dit.PRESETS["b"]),
    "l_256": dict(model=dit.PRESETS["l"]),
    "xl_256": {},
    **{name: {} for name in encoders.EXPERIMENTS},
    "no_shift": dict(flow=dict(shift_base=16 * 16 * 768)),
    "plain": dict(model=dict(use_swiglu=False, use_rmsnorm=False, use_rope=False)),
    "repa": dict(repa=dict(weight=0.5, target="latent")),
    # Latents of other kinds, with decoders of their own (Table 8 of the paper).
    "sd_vae": dict(latent_stats="none", decoder="own", model=dict(patch_size=2)),
    "pixels": dict(latent_stats="none", decoder="own"),
    "sd_vae_repa": dict(inherits="sd_vae", repa=dict(weight=0.5)),
    "photos": blocks.photos_diffusion(dict(hidden_size=192, depth=4, num_heads=4)),
    **blocks.smoke_diffusion(dict(hidden_size=32, depth=2, num_heads=2)),
}


def get_config(variant: str = "xl_256") -> ConfigDict:
    """Returns the config of a variant."""
    encoder = blocks.encoder("runs/ldae")
    if variant in ENCODERS:
        encoder = encoders.block(ENCODERS[variant])
    c = blocks.latent_diffusion(
        network="dit",
        model=dit.PRESETS["xl"]
        | dict(use_swiglu=True, use_rmsnorm=True, use_rope=True),
        num_steps=800 * STEPS_PER_EPOCH,
        encoder=encoder,
        align_encoder=blocks.pretrained_encoder(
            encoders.PRESETS["dinov2_b"], normalize=False
        ),
    )
    return config.apply_variant(c, VARIANTS, variant)
