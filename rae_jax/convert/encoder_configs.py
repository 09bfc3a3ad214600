"""Sizes of encoders from a Hugging Face `config.json`, and back.

A published file leaves out what equals the default of its class in transformers.
"""

from collections.abc import Mapping
from typing import Any

from rae_jax import config as configs
from rae_jax.convert import encoder_names

Settings = Mapping[str, Any]

NAMES = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "vit_mae": "mae",
    "ijepa": "ijepa",
    "dinov3_vit": "dinov3",
}
_VIT_B = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
)
_DINOV2 = dict(mlp_ratio=4, hidden_act="gelu", layer_norm_eps=1e-6)
DEFAULTS = {
    "dinov2": _VIT_B | _DINOV2 | dict(patch_size=14, use_swiglu_ffn=False),
    "dinov2_with_registers": _VIT_B
    | _DINOV2
    | dict(use_swiglu_ffn=False, num_register_tokens=4),
    "siglip": _VIT_B
    | dict(intermediate_size=3072, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "mae": _VIT_B
    | dict(intermediate_size=3072, hidden_act="gelu", layer_norm_eps=1e-12),
    "ijepa": _VIT_B
    | dict(intermediate_size=3072, hidden_act="gelu", layer_norm_eps=1e-12),
    "dinov3": dict(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        rope_theta=100.0,
        key_bias=False,
        use_gated_mlp=False,
        num_register_tokens=0,
    ),
}
# Settings that our encoder has no argument for, and the only value it can take.
_FIXED = {
    "num_channels": 3,
    "qkv_bias": True,
    "query_bias": True,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
}
_FACTS = {
    "layer_norm_eps": "layer_norm_eps",
    "num_register_tokens": "num_registers",
    "rope_theta": "rope_theta",
    "key_bias": "key_bias",
}
_CLASSES = {
    "dinov2": ("Dinov2Model", "dinov2", "BitImageProcessor"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "dinov2_with_registers",
        "BitImageProcessor",
    ),
    "siglip": ("SiglipVisionModel", "siglip_vision_model", "SiglipImageProcessor"),
    "mae": ("ViTMAEModel", "vit_mae", "ViTImageProcessor"),
    "ijepa": ("IJepaModel", "ijepa", "ViTImageProcessor"),
    "dinov3": ("DINOv3ViTModel", "dinov3_vit", "DINOv3ViTImageProcessorFast"),
}


def sizes_from_config(
    settings: Settings, preprocessor: Settings | None = None
) -> tuple[str, dict[str, Any]]:
    """Returns the family of an encoder and its constructor arguments.

    The input size is the one that the preprocessor crops or resizes to, if patches
    fill it, and else the one that the position table was trained for.

    Args:
        settings: Contents of `config.json`.
        preprocessor: Contents of `preprocessor_config.json`, if there is one.

    Raises:
        ValueError: For another model type, or a setting that our encoder lacks.
    """
    model_type = settings.get("model_type")
    if model_type not in NAMES:
        known = configs.suggest(str(model_type), list(NAMES), "model_type")
        raise ValueError(f"config.json is not of a known encoder. {known}")
    name, preprocessor = NAMES[model_type], preprocessor or {}
    given = DEFAULTS[name] | dict(settings.get("vision_config", settings))
    _check_fixed(given)
    patch_size = _one(given["patch_size"], "patch_size")
    table_size = _one(given["image_size"], "image_size")
    filled = table_size - table_size % patch_size
    sizes = {ours: given[key] for key, ours in _SIZES.items()}
    sizes |= {
        "image_size": _input_size(preprocessor, patch_size) or filled,
        "patch_size": patch_size,
        "intermediate_size": _intermediate_size(given),
    }
    if encoder_names.FAMILIES[name].positions != encoder_names.ROTARY:
        sizes["table_size"] = table_size
    return name, sizes | _changes(name, given, preprocessor)


def config_from_sizes(
    name: str, sizes: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config.json` and `preprocessor_config.json` of an encoder.

    Args:
        name: Family.
        sizes: The encoder's constructor arguments. What Hugging Face has no setting
            for (`normalize`, `layers`) is left out.

    Raises:
        ValueError: The family has no class in transformers, or the class cannot have
            these sizes.
    """
    if name not in _CLASSES:
        raise ValueError(
            f"transformers has no class for the encoder {name!r}, only for "
            f"{', '.join(_CLASSES)}."
        )
    family = encoder_names.facts(
        name, {k: v for k, v in sizes.items() if k in encoder_names.FACTS}
    )
    architecture, model_type, processor = _CLASSES[name]
    table_size = sizes.get("table_size") or sizes["image_size"]
    config = {"architectures": [architecture], "model_type": model_type}
    config |= {key: sizes[ours] for key, ours in _SIZES.items()}
    config |= {"image_size": table_size, "patch_size": sizes["patch_size"]}
    defaults = DEFAULTS[name]
    config |= {k: getattr(family, v) for k, v in _FACTS.items() if k in defaults}
    config |= _mlp_settings(name, family, sizes)
    size = {"height": sizes["image_size"], "width": sizes["image_size"]}
    return config, {
        "image_processor_type": processor,
        "do_resize": True,
        "size": size,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(family.image_mean),
        "image_std": list(family.image_std),
    }


def _check_fixed(given: Settings) -> None:
    wrong = [f"{k}={given[k]}" for k, v in _FIXED.items() if given.get(k, v) != v]
    if wrong:
        raise ValueError(
            f"config.json has {', '.join(wrong)}, which our encoder cannot have."
        )


def _one(value: Any, name: str) -> int:
    """Returns the height of a square size, which may be written as a pair."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ValueError(f"config.json: {name} {value} is not square.")
    return int(sides.pop())


def _input_size(preprocessor: Settings, patch_size: int) -> int | None:
    for key in ("crop_size", "size"):
        size = preprocessor.get(key)
        if isinstance(size, Mapping):
            height, width = size.get("height"), size.get("width")
            if height and height == width and height % patch_size == 0:
                return height
    return None


def _intermediate_size(given: Settings) -> int:
    if "mlp_ratio" not in given:
        return given["intermediate_size"]
    width = int(given["hidden_size"] * given["mlp_ratio"])
    return _gated_width(width) if given["use_swiglu_ffn"] else width


def _gated_width(width: int) -> int:
    """DINOv2's inner width of a SwiGLU: two thirds, up to a multiple of eight."""
    return (int(width * 2 / 3) + 7) // 8 * 8


def _changes(name: str, given: Settings, preprocessor: Settings) -> dict[str, Any]:
    """Returns the facts in which an encoder differs from its family."""
    found = {ours: given[key] for key, ours in _FACTS.items() if key in given}
    found["gated"] = given.get("use_swiglu_ffn", given.get("use_gated_mlp", False))
    activation = given["hidden_act"]
    # DINOv2's SwiGLU is one of SiLU, whatever its config says.
    is_silu = found["gated"] and (name != "dinov3" or activation == "silu")
    if not is_silu:
        if activation not in _ACTIVATIONS or found["gated"]:
            raise ValueError(
                f"config.json: unknown hidden_act {activation!r}; choose from "
                f"{list(_ACTIVATIONS)}, or 'silu' with a gated MLP."
            )
        found["activation"] = _ACTIVATIONS[activation]
    for key in ("image_mean", "image_std"):
        if key in preprocessor:
            found[key] = tuple(preprocessor[key])
    family = encoder_names.FAMILIES[name]
    return {k: v for k, v in found.items() if getattr(family, k) != v}


def _mlp_settings(
    name: str, family: encoder_names.Family, sizes: Settings
) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    config: dict[str, Any] = {"hidden_act": names[family.activation]}
    inner, width = sizes["intermediate_size"], sizes["hidden_size"]
    if not name.startswith("dinov2"):
        if family.gated:
            config["hidden_act"] = "silu"
        if name == "dinov3":
            config["use_gated_mlp"] = family.gated
        return config | {"intermediate_size": inner}
    for ratio in range(1, 17):
        plain = width * ratio
        if inner == (_gated_width(plain) if family.gated else plain):
            return config | {"mlp_ratio": ratio, "use_swiglu_ffn": family.gated}
    raise ValueError(
        f"transformers' DINOv2 cannot have intermediate_size {inner} at hidden_size "
        f"{width}: it is a whole multiple of the width, or two thirds of it if gated."
    )
