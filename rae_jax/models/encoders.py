"""Name -> representation encoder, and the published ones.

An encoder maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size) whose
last operation is a LayerNorm, and has the attributes `input_size`, `patch_size`,
`hidden_size`, `image_mean` and `image_std`.
"""

from functools import partial
from typing import Any

from flax import nnx

from rae_jax import config
from rae_jax.convert import encoder_names
from rae_jax.models import ldae, vit_encoder

ENCODERS = {"ldae": ldae.LDAEEncoder} | {
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

# Blocks for `config.encoder`, with the input sizes of the official configs where
# there is one, else those that the encoder was trained for.
PRESETS = {
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
}


# Presets that the experiment files have variants of, at 256 pixels.
EXPERIMENTS = ("dinov2_s", "dinov2_b", "dinov2_l", "siglip2_b", "mae_b")
EXPERIMENTS += ("dinov3_l_k7", "dinov3_l_k23")


def make_encoder(name: str, *, rngs: nnx.Rngs, **sizes) -> nnx.Module:
    """Builds an encoder with random parameters.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(config.suggest(name, list(ENCODERS), "encoder"))
    return ENCODERS[name](**sizes, rngs=rngs)
