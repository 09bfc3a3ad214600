r"""Stage 2 of RAE (arXiv:2510.11690): DiT-DH on normalised latents.

    rae-jax train --config configs/dit_dh.py:VARIANT --workdir runs/dit_dh \
        --config.encoder.weights=runs/ldae --config.latent_stats=runs/stats \
        --config.decoder=runs/decoder

Variants: s_256, b_256, l_256 and xl_256 with the paper's recipe, behind an l-DAE
ViT-B; XL behind published encoders, as in configs/rae_decoder.py: dinov2_s, dinov2_b,
dinov2_l, siglip2_b, mae_b, dinov3_l_k7, dinov3_l_k23, and dinov2_b_512, the paper's
400 epochs at 512 pixels; photos; folder; smoke.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import dit_dh, encoders

STEPS_PER_EPOCH = 1251  # ImageNet at batch 1024.

VARIANTS = {
    "s_256": dict(model=dit_dh.PRESETS["s"]),
    "b_256": dict(model=dit_dh.PRESETS["b"]),
    "l_256": dict(model=dit_dh.PRESETS["l"]),
    "xl_256": {},
    **{name: {} for name in encoders.EXPERIMENTS},
    "dinov2_b_512": dict(num_steps=400 * STEPS_PER_EPOCH, data=dict(image_size=512)),
    "photos": dict(
        num_steps=620,
        data=blocks.photos(batch_size=16),
        encoder=dict(weights="../ldae", sizes=blocks.PHOTOS_SIZES),
        latent_stats="../latent_stats",
        decoder="../rae_decoder",
        model=dict(
            hidden_size=(128, 256),
            depth=(4, 2),
            num_heads=(4, 4),
            num_classes=10,
            remat="none",
            dtype="float32",
        ),
        # Ten photographs vary far less than their dimension says: what is in a latent
        # can still be told at high noise, so times shift further towards it.
        flow=dict(shift_base=328),
        optimizer=dict(
            name="muon",
            peak_lr=8e-3,
            final_lr=1e-4,
            schedule="cosine",
            warmup_steps=30,
            warmup_from_zero=True,
            decay_end_step=0,
        ),
        ema_decay=0.98,
        sampling=dict(guidance_scale=2.0),
        every=dict(log=10, checkpoint=50, evaluate=620),
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
    "smoke": dict(
        num_steps=3,
        data=blocks.synthetic(),
        encoder=dict(weights="random", sizes=blocks.SMOKE_SIZES),
        latent_stats="none",
        decoder="none",
        model=dict(
            hidden_size=(32, 64),
            depth=(2, 1),
            num_heads=(2, 4),
            num_classes=10,
            dtype="float32",
        ),
        optimizer=dict(warmup_steps=1, decay_end_step=0),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
}


def get_config(variant: str = "xl_256") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("latent_diffusion", num_steps=800 * STEPS_PER_EPOCH)
    c.data = blocks.data()
    c.encoder = blocks.encoder("runs/ldae")
    if variant in encoders.PRESETS:
        c.encoder = blocks.pretrained_encoder(encoders.PRESETS[variant])
    c.latent_stats = "runs/stats"  # Workdir or .npz; "none": mean 0, variance 1.
    c.decoder = "runs/decoder"  # For pictures; "none" for none.
    c.network = "dit_dh"
    c.model = dit_dh.PRESETS["xl"] | dict(
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        qk_norm=False,
        trainable_tables=False,
        dtype="bfloat16",
        remat="full",
    )
    c.flow = dict(time="logit_normal", shift_base=4096)
    c.optimizer = blocks.optimizer(
        schedule="linear",
        warmup_steps=40 * STEPS_PER_EPOCH,
        warmup_from_zero=False,
        decay_end_step=800 * STEPS_PER_EPOCH,
        clip_norm=1.0,
    )
    c.ema_decay = 0.9995
    c.sampling = dict(
        name="euler",  # Another of diffusion.samplers.SAMPLERS.
        num_points=50,  # Of the official grid, which ends before t = 0 ...
        final_zero=False,  # ... unless a last step is added.
        times=(),  # A grid of its own instead, as the network sees times.
        options="",  # Of the sampler, such as "period=2" or "rtol=1e-4, atol=1e-6".
        guidance="cfg",  # autoguidance: by a weaker model of the same latents,
        guide="",  # the workdir of its run, or converted weights.
        guidance_scale=1.0,
        guidance_interval=(0.0, 1.0),
    )
    return config.apply_variant(c, VARIANTS, variant)
