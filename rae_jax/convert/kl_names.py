"""Names and settings of diffusers' `AutoencoderKL`, the VAE of latent diffusion.

Names are those of diffusers since 0.18, with linear maps in the attention; `canonical`
turns the older spellings, some with convolutions of 1 x 1 there, into them.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rae_jax.convert import sources, tables

CLASS_NAME = "AutoencoderKL"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MARK = "encoder.down_blocks.0.resnets.0.norm1.weight"  # Only such files have it.
SCALING_FACTOR = 0.18215  # Of Stable Diffusion, which older settings leave out.

# Of the settings, which our class cannot differ from.
_FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
_FIXED |= {"latents_mean": None, "latents_std": None}
_BLOCKS = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}
_SAME = ("latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
_SAME += ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")
# What diffusers assumes of settings that are left out.
_DEFAULTS = {
    "block_out_channels": (64,),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": SCALING_FACTOR,
    "shift_factor": None,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# What weights for a choice of the user's do not decide.
_FREE = ("image_size", "dtype")
_ATTENTION = {"to_q": 0, "to_k": 1, "to_v": 2}
_OLD_NAMES = [
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
]

Settings = Mapping[str, Any]


def is_settings(settings: Settings) -> bool:
    """Whether a `config.json` is that of an `AutoencoderKL`."""
    return settings.get("_class_name") == CLASS_NAME


def canonical(source: sources.TensorSource) -> sources.TensorSource:
    """Returns the tensors in the common spelling, attention weights with two axes."""
    names = {}
    for name in source.shapes:
        new = name
        for pattern, replacement in _OLD_NAMES:
            new = re.sub(pattern, replacement, new)
        names[new] = name
    renamed = sources.renamed(source, names)
    squares = {n for n, s in renamed.shapes.items() if _is_pointwise(n, s)}
    shapes = {
        name: shape[:2] if name in squares else shape
        for name, shape in renamed.shapes.items()
    }

    def read(name: str) -> np.ndarray:
        return renamed.read(name).reshape(shapes[name])

    return sources.TensorSource(
        renamed.origin, shapes, renamed.dtypes, read, values=renamed.values
    )


def arguments(settings: Settings, origin: str) -> dict[str, Any]:
    """Returns the constructor arguments that a `config.json` describes.

    Raises:
        ValueError: It describes another class, or what ours cannot be.
    """
    if not is_settings(settings):
        found = settings.get("_class_name", settings.get("class", "no class"))
        raise ValueError(f"{origin}: config.json is of {found}, not of {CLASS_NAME}.")
    wrong = [f"{k}={settings[k]}" for k, v in _FIXED.items() if settings.get(k, v) != v]
    for key, only in _BLOCKS.items():
        wrong += [f"{key} with {t}" for t in settings.get(key, ()) if t != only]
    if wrong:
        raise ValueError(
            f"{origin}: config.json has {', '.join(wrong)}, which our {CLASS_NAME} "
            "cannot have."
        )
    given = _DEFAULTS | settings
    sides = given["sample_size"]
    sides = set(sides) if isinstance(sides, (list, tuple)) else {sides}
    if len(sides) != 1:
        raise ValueError(f"{origin}: sample_size {given['sample_size']} is not square.")
    return {key: given[key] for key in _SAME} | {
        "image_size": sides.pop(),
        "block_out_channels": tuple(given["block_out_channels"]),
        "shift_factor": given["shift_factor"] or 0.0,
    }


def arguments_of_shapes(shapes: tables.Shapes) -> dict[str, Any]:
    """Returns those constructor arguments that the shapes of a bare file tell."""
    convolutions = r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight"
    matches = {re.fullmatch(convolutions, n): s[0] for n, s in shapes.items()}
    found = {m.groups(): width for m, width in matches.items() if m}
    if not found or "encoder.conv_out.weight" not in shapes:
        return {}
    levels = 1 + max(int(level) for level, _ in found)
    return {
        "block_out_channels": tuple(found.get((str(i), "0"), 0) for i in range(levels)),
        "layers_per_block": 1 + max(int(block) for _, block in found),
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "mid_block_add_attention": any("attentions" in name for name in shapes),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of an autoencoder."""
    channels = list(arguments["block_out_channels"])
    blocks = {key: [kind] * len(channels) for key, kind in _BLOCKS.items()}
    settings = _FIXED | blocks | {key: arguments[key] for key in _SAME}
    settings |= {
        "block_out_channels": channels,
        "sample_size": arguments["image_size"],
        "shift_factor": arguments["shift_factor"] or None,
        "force_upcast": True,
    }
    named = {"_class_name": CLASS_NAME, "_diffusers_version": "0.42.1"}
    return named | dict(sorted(settings.items()))


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Returns in words how arguments contradict those of files."""
    return [
        f"{key} = {value}, the files have {stored[key]}"
        for key, value in given.items()
        if key in stored and key not in _FREE and _plain(value) != _plain(stored[key])
    ]


def table(arguments: Mapping[str, Any]) -> tables.Table:
    """Returns the table of an autoencoder's tensors from its constructor arguments."""
    channels = arguments.get("block_out_channels", (128, 256, 512, 512))
    count = arguments.get("layers_per_block", 2)
    attention = arguments.get("mid_block_add_attention", True)
    encoder = _half(channels, count, attention, "down")
    decoder = _half(channels[::-1], count + 1, attention, "up")
    entries = []
    if arguments.get("use_quant_conv", True):
        entries += _conv("quant_conv", "encoder.quant")
    if arguments.get("use_post_quant_conv", True):
        entries += _conv("post_quant_conv", "decoder.quant")
    halves = [
        tables.prefixed(tables.Table(tuple(part)), f"{name}.", f"{name}.")
        for name, part in (("encoder", encoder), ("decoder", decoder))
    ]
    return tables.joined(*halves, tables.Table(tuple(entries)))


def _half(
    channels: tuple[int, ...], count: int, attention: bool, direction: str
) -> list[tables.Entry]:
    """Returns the entries of the encoder ("down") or the decoder ("up")."""
    entries = _conv("conv_in", "conv_in")
    width = channels[0]
    for i, features in enumerate(channels):
        block, level = f"{direction}_blocks.{i}", f"levels.{i}"
        for j in range(count):
            changes = j == 0 and features != width
            entries += _resnet(
                f"{block}.resnets.{j}", f"{level}.blocks.{j}", shortcut=changes
            )
        if i < len(channels) - 1:
            sampler = f"{block}.{direction}samplers.0.conv"
            entries += _conv(sampler, f"{level}.resample")
        width = features
    entries += _resnet("mid_block.resnets.0", "mid.first")
    if attention:
        entries += _attention("mid_block.attentions.0", "mid.attention")
    entries += _resnet("mid_block.resnets.1", "mid.second")
    entries += _norm("conv_norm_out", "norm_out")
    return entries + _conv("conv_out", "conv_out")


def _resnet(name: str, path: str, shortcut: bool = False) -> list[tables.Entry]:
    entries = []
    for i in (1, 2):
        entries += _norm(f"{name}.norm{i}", f"{path}.norm{i}")
        entries += _conv(f"{name}.conv{i}", f"{path}.conv{i}")
    if shortcut:
        entries += _conv(f"{name}.conv_shortcut", f"{path}.shortcut")
    return entries


def _attention(name: str, path: str) -> list[tables.Entry]:
    entries = _norm(f"{name}.group_norm", f"{path}.norm")
    for key, i in _ATTENTION.items():
        entries += _linear(f"{name}.{key}", f"{path}.qkv", (i, 3))
    return entries + _linear(f"{name}.to_out.0", f"{path}.proj")


def _linear(
    name: str, path: str, part: tuple[int, int] | None = None
) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.kernel", "linear", part=part),
        tables.Entry(f"{name}.bias", f"{path}.bias", part=part),
    ]


def _conv(name: str, path: str) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.kernel", "conv2d"),
        tables.Entry(f"{name}.bias", f"{path}.bias"),
    ]


def _norm(name: str, path: str) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.scale"),
        tables.Entry(f"{name}.bias", f"{path}.bias"),
    ]


def _is_pointwise(name: str, shape: tables.Shape) -> bool:
    """Whether an attention weight is that of a convolution of 1 x 1."""
    return ".attentions." in name and tuple(shape[2:]) == (1, 1)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
