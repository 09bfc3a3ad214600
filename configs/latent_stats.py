r"""Mean and variance of an encoder's latents, one pass over the training images.

    rae-jax train --config configs/latent_stats.py:VARIANT --workdir runs/stats \
        --config.encoder.weights=runs/ldae

Variants: vit_b, of l-DAE; momentum, the official script's running average; of
published encoders, as in configs/rae_decoder.py: dinov2_s, dinov2_b, dinov2_l,
siglip2_b, mae_b, dinov3_l_k7, dinov3_l_k23 and dinov2_b_512; of the spaces with a
decoder of their own, sd_vae and pixels; photos; folder; smoke.
"""

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import encoders

VARIANTS = {
    "vit_b": {},
    "momentum": dict(
        mode="momentum", both_orientations=False, data=dict(flip=True, batch_size=256)
    ),
    **{name: {} for name in encoders.EXPERIMENTS},
    "dinov2_b_512": dict(data=dict(image_size=512)),
    "sd_vae": {},
    "pixels": {},
    "photos": dict(
        both_orientations=False,
        data=blocks.photos(batch_size=64),
        encoder=dict(weights="../ldae", sizes=blocks.PHOTOS_SIZES),
        every=dict(log=20, checkpoint=20),
    ),
    "folder": dict(
        inherits="photos",
        both_orientations=True,
        data=dict(source="class_folder", path="data/my_images"),
    ),
    "smoke": dict(
        num_steps=3,
        data=blocks.synthetic(),
        encoder=dict(weights="random", sizes=blocks.SMOKE_SIZES),
        every=dict(log=1, checkpoint=2, evaluate=3),
    ),
}


def get_config(variant: str = "vit_b") -> ConfigDict:
    """Returns the config of a variant."""
    c = blocks.run("latent_stats", num_steps=0)  # 0: one pass.
    c.mode = "exact"
    c.momentum = 0.1
    c.both_orientations = True  # Counts every image and its mirror image.
    c.data = blocks.data(flip=False, batch_size=512)
    c.encoder = blocks.encoder("runs/ldae")
    if variant in encoders.PRESETS or variant in encoders.SPACES:
        c.encoder = encoders.block(variant)
    return config.apply_variant(c, VARIANTS, variant)
