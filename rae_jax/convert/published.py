"""Where the weights of RAE's authors are (arXiv:2510.11690), under short names.

Sources are what `hub.locate` takes. Nothing here is needed to load a file by its path.
"""

from typing import NamedTuple

COLLECTION = "nyu-visionx/RAE-collections"


class Autoencoder(NamedTuple):
    """Parts of a published autoencoder in the official layout.

    Attributes:
        encoder: Hub id of the encoder.
        input_size: To which images are resized for it.
        decoder: Decoder weights.
        latent_stats: Statistics of its latents.
    """

    encoder: str
    input_size: int
    decoder: str
    latent_stats: str


def _autoencoder(
    encoder: str, input_size: int, decoder: str, stats: str
) -> Autoencoder:
    return Autoencoder(
        encoder,
        input_size,
        f"{COLLECTION}:decoders/{decoder}/model.pt",
        f"{COLLECTION}:stats/{stats}/stat.pt",
    )


_DINOV2_B = "facebook/dinov2-with-registers-base"

AUTOENCODERS = {
    "rae-dinov2-b": _autoencoder(
        _DINOV2_B, 224, "dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k"
    ),
    "rae-dinov2-b-512": _autoencoder(
        _DINOV2_B,
        448,
        "dinov2/wReg_base/ViTXL_n08_i512",
        "dinov2/wReg_base/imagenet1k_512",
    ),
    "rae-mae-b": _autoencoder(
        "facebook/vit-mae-base",
        256,
        "mae/base_p16/ViTXL_n08",
        "mae/base_p16/ImageNet1k",
    ),
    "rae-siglip2-b": _autoencoder(
        "google/siglip2-base-patch16-256",
        256,
        "siglip2/base_p16_i256/ViTXL_n08",
        "siglip2/base_p16_i256/ImageNet1k",
    ),
}

# Whole autoencoders in the layout of diffusers, which normalises latents by
# deviation + eps instead of sqrt(variance + eps).
DIFFUSERS = {
    "rae-dinov2-s-diffusers": "nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08",
    "rae-dinov2-b-diffusers": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
    "rae-dinov2-b-512-diffusers": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512",
    "rae-dinov2-l-diffusers": "nyu-visionx/RAE-dinov2-wReg-large-ViTXL-n08",
    "rae-siglip2-b-diffusers": "nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08",
    "rae-mae-b-diffusers": "nyu-visionx/RAE-mae-base-p16-ViTXL-n08",
}


# The KL autoencoders of latent diffusion that RAE compares with.
KL = {
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
}


def _dit(path: str) -> str:
    return f"{COLLECTION}:DiTs/Dinov2/wReg_base/{path}/stage2_model.pt"


# Diffusion transformers for the latents of "rae-dinov2-b" and "rae-dinov2-b-512". The
# small ones are the guides of autoguidance; "ep" counts their epochs.
DIFFUSION = {
    "dit-dh-xl-256": _dit("ImageNet256/DiTDH-XL"),
    "dit-dh-s-256-ep14": _dit("ImageNet256/DiTDH-S_ep14"),
    "dit-dh-xl-512-ep400": _dit("ImageNet512/DiTDH-XL_ep400"),
    "dit-dh-s-512-ep20": _dit("ImageNet512/DiTDH-S_ep20"),
}

SOURCES = DIFFUSERS | KL | DIFFUSION
