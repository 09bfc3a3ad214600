"""Name -> representation encoder, and the published ones.

An encoder maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size) whose
last operation is a LayerNorm, and has the attributes `input_size`, `patch_size`,
`hidden_size`, `image_mean` and `image_std`.

Two spaces to compare with are made by other networks, which bring their own decoder:
"sd_vae", the KL autoencoder of latent diffusion, and "pixels", patches as they are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax import nnx

from rae_jax import blocks, config
from rae_jax.convert import encoder_names
from rae_jax.models import autoencoder_kl, ldae_encoder, pixels, vit_encoder

Pair = tuple[nnx.Module, nnx.Module]
ENCODERS = {"ldae": ldae_encoder.LDAEEncoder} | {
    name: partial(vit_encoder.ViTEncoder, name) for name in encoder_names.FAMILIES
}

# hidden_size, depth, num_heads, intermediate_size.
_SIZES = {
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
    "g": (1536, 40, 24, 4096),  # Gated: two thirds of 4 x 1536.
}


def _preset(
    name: str, weights: str, size: str, patch_size: int, image_size: int, **others: Any
) -> dict[str, Any]:
    names = ("hidden_size", "depth", "num_heads", "intermediate_size")
    sizes = dict(zip(names, _SIZES[size], strict=True))
    sizes |= dict(image_size=image_size, patch_size=patch_size)
    return dict(name=name, weights=weights, sizes=sizes | others)


def _dinov2(weights: str, size: str, image_size: int = 224) -> dict[str, Any]:
    name = "dinov2_with_registers" if "registers" in weights else "dinov2"
    gated = dict(gated=True) if size == "g" else {}
    return _preset(name, weights, size, 14, image_size, table_size=518, **gated)


def _siglip(weights: str, size: str, patch_size: int, table_size: int):
    # Patches of 14 do not fill 384 pixels: its table is one of 27 x 27.
    image_size = table_size - table_size % patch_size
    return _preset(
        "siglip", weights, size, patch_size, image_size, table_size=table_size
    )


_DINOV2_REG = "facebook/dinov2-with-registers"
_DINOV3 = "facebook/dinov3-vit{}16-pretrain-lvd1689m"
_K7, _K23 = tuple(range(11, 24, 2)), tuple(range(1, 24))

_MERGED = encoder_names.HALF | dict(activation="gelu_tanh")

# Blocks for `config.encoder`, with the input sizes of the official configs where
# there is one, else those that the encoder was trained for.
PRESETS = {
    # l-DAE at a fixed noise level as a plain ViT: `rae-jax convert RUN runs/ldae_vit
    # --target huggingface`.
    "ldae_vit_b": _preset("ijepa", "runs/ldae_vit", "b", 16, 256, **_MERGED),
    "ldae_vit_l": _preset("ijepa", "runs/ldae_vit", "l", 16, 256, **_MERGED),
    "dinov2_s": _dinov2(f"{_DINOV2_REG}-small", "s"),
    "dinov2_b": _dinov2(f"{_DINOV2_REG}-base", "b"),
    "dinov2_l": _dinov2(f"{_DINOV2_REG}-large", "l"),
    "dinov2_g": _dinov2(f"{_DINOV2_REG}-giant", "g"),
    "dinov2_b_512": _dinov2(f"{_DINOV2_REG}-base", "b", 448),
    "dinov2_noreg_s": _dinov2("facebook/dinov2-small", "s"),
    "dinov2_noreg_b": _dinov2("facebook/dinov2-base", "b"),
    "dinov2_noreg_l": _dinov2("facebook/dinov2-large", "l"),
    "dinov2_noreg_g": _dinov2("facebook/dinov2-giant", "g"),
    "mae_b": _preset("mae", "facebook/vit-mae-base", "b", 16, 256, table_size=224),
    "mae_l": _preset("mae", "facebook/vit-mae-large", "l", 16, 256, table_size=224),
    "mae_h": _preset("mae", "facebook/vit-mae-huge", "h", 14, 224, table_size=224),
    "siglip2_b": _siglip("google/siglip2-base-patch16-256", "b", 16, 256),
    "siglip2_b_224": _siglip("google/siglip2-base-patch16-224", "b", 16, 224),
    "siglip2_b_384": _siglip("google/siglip2-base-patch16-384", "b", 16, 384),
    "siglip2_b_512": _siglip("google/siglip2-base-patch16-512", "b", 16, 512),
    "siglip2_l": _siglip("google/siglip2-large-patch16-256", "l", 16, 256),
    "siglip2_so400m": _siglip("google/siglip2-so400m-patch16-256", "so400m", 16, 256),
    "siglip2_so400m_p14": _siglip(
        "google/siglip2-so400m-patch14-224", "so400m", 14, 224
    ),
    "siglip2_so400m_p14_384": _siglip(
        "google/siglip2-so400m-patch14-384", "so400m", 14, 384
    ),
    "siglip_b": _siglip("google/siglip-base-patch16-256", "b", 16, 256),
    "siglip_l": _siglip("google/siglip-large-patch16-256", "l", 16, 256),
    "siglip_so400m_p14": _siglip("google/siglip-so400m-patch14-224", "so400m", 14, 224),
    "siglip_so400m_p14_384": _siglip(
        "google/siglip-so400m-patch14-384", "so400m", 14, 384
    ),
    "dinov3_s": _preset("dinov3", _DINOV3.format("s"), "s", 16, 256),
    "dinov3_b": _preset("dinov3", _DINOV3.format("b"), "b", 16, 256),
    "dinov3_l": _preset("dinov3", _DINOV3.format("l"), "l", 16, 256),
    # RAEv2's (arXiv:2605.18324).
    "dinov3_l_k7": _preset("dinov3", _DINOV3.format("l"), "l", 16, 256, layers=_K7),
    "dinov3_l_k23": _preset("dinov3", _DINOV3.format("l"), "l", 16, 256, layers=_K23),
    "dino_s8": _preset("dino", "timm/vit_small_patch8_224.dino", "s", 8, 224),
    "dino_s16": _preset("dino", "timm/vit_small_patch16_224.dino", "s", 16, 224),
    "dino_b16": _preset("dino", "timm/vit_base_patch16_224.dino", "b", 16, 224),
    # The official weights; its own files (vit-b-300ep.pth.tar) are read, too.
    "mocov3_b": _preset("mocov3", "nyu-visionx/moco-v3-vit-b", "b", 16, 224),
    "mocov3_l": _preset("mocov3", "nyu-visionx/moco-v3-vit-l", "l", 16, 224),
}


# Presets that the experiment files have variants of, at 256 pixels.
EXPERIMENTS = ("dinov2_s", "dinov2_b", "dinov2_l", "siglip2_b", "mae_b")
EXPERIMENTS += ("dinov3_l_k7", "dinov3_l_k23")


# Blocks for `config.encoder` of the spaces with a decoder of their own, for images of
# 256 pixels or, for smoke runs, 32.
_SD_VAE = dict(
    image_size=256,
    patch_size=8,
    hidden_size=4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
    scaling_factor=0.18215,
    shift_factor=0.0,
    mid_block_add_attention=True,
    use_quant_conv=True,
    use_post_quant_conv=True,
    dtype="float32",
)
_SMALL = dict(
    image_size=32,
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
)
SPACES = {
    "sd_vae": dict(name="sd_vae", weights="stabilityai/sd-vae-ft-ema", sizes=_SD_VAE),
    "sd_vae_mse": dict(
        name="sd_vae", weights="stabilityai/sd-vae-ft-mse", sizes=_SD_VAE
    ),
    "sd_vae_smoke": dict(name="sd_vae", weights="random", sizes=_SD_VAE | _SMALL),
    "pixels": dict(
        name="pixels",
        weights="none",
        sizes=dict(image_size=256, patch_size=16, hidden_size=768),
    ),
    "pixels_smoke": dict(
        name="pixels",
        weights="none",
        sizes=dict(image_size=32, patch_size=8, hidden_size=192),
    ),
}


def block(preset: str) -> dict[str, Any]:
    """Returns the block for `config.encoder` of a name in `PRESETS` or `SPACES`.

    Raises:
        ConfigError: For an unknown name.
    """
    if preset in SPACES:
        return SPACES[preset] | {"sizes": dict(SPACES[preset]["sizes"])}
    if preset in PRESETS:
        return blocks.pretrained_encoder(PRESETS[preset])
    known = [*PRESETS, *SPACES]
    raise config.ConfigError(config.suggest(preset, known, "encoder preset"))


def make_encoder(name: str, *, rngs: nnx.Rngs, **sizes: Any) -> nnx.Module:
    """Builds an encoder with random parameters.

    Raises:
        ValueError: For an unknown name.
    """
    if name in OWN_DECODER:
        return make_pair(name, rngs=rngs, **sizes)[0]
    if name not in ENCODERS:
        known = [*ENCODERS, *OWN_DECODER]
        raise ValueError(config.suggest(name, known, "encoder"))
    return ENCODERS[name](**sizes, rngs=rngs)


def make_pair(name: str, *, rngs: nnx.Rngs, **sizes: Any) -> Pair:
    """Builds encoder and decoder of a space that has both, with random parameters.

    Raises:
        ConfigError: The encoder of this name has no decoder of its own.
        ValueError: Sizes do not fit together.
    """
    if name not in OWN_DECODER:
        raise config.ConfigError(
            f"The encoder {name!r} has no decoder of its own, as "
            f"{' and '.join(OWN_DECODER)} have. Name the workdir of a decoder run "
            "or converted weights of an autoencoder, or 'none'."
        )
    return OWN_DECODER[name](rngs=rngs, **sizes)


def kl_arguments(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an `AutoencoderKL` from the sizes of "sd_vae"."""
    others = {k: v for k, v in sizes.items() if k not in ("patch_size", "hidden_size")}
    return others | {"latent_channels": sizes["hidden_size"]}


def _sd_vae(*, rngs: nnx.Rngs, **sizes: Any) -> Pair:
    model = autoencoder_kl.AutoencoderKL(**kl_arguments(sizes), rngs=rngs)
    _check("patch_size", sizes, model.encoder.patch_size, "block_out_channels")
    return model.encoder, model.decoder


def _pixels(
    *, rngs: nnx.Rngs, image_size: int, patch_size: int, hidden_size: int
) -> Pair:
    encoder = pixels.PixelEncoder(image_size, patch_size)
    _check(
        "hidden_size", dict(hidden_size=hidden_size), encoder.hidden_size, "patch_size"
    )
    return encoder, pixels.PixelDecoder(image_size, patch_size)


def _check(name: str, sizes: Mapping[str, Any], implied: int, by: str) -> None:
    """Raises where a size that the latents' shape is told by says something else."""
    if sizes[name] != implied:
        raise config.ConfigError(
            f"encoder.sizes.{name} = {sizes[name]}, but {by} implies {implied}."
        )


OWN_DECODER: dict[str, Callable[..., Pair]] = {"sd_vae": _sd_vae, "pixels": _pixels}
