"""Weights and settings of diffusers' `AutoencoderRAE`, and the common spelling.

Names follow transformers 5, which diffusers 0.42 builds its encoders with; files of
older versions are read as well.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rae_jax.convert import encoder_names, rae_names, sources

CLASS_NAME = "AutoencoderRAE"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
EPS = 1e-5  # Added to the deviation of latents there.
ENCODER_TYPES = {
    "dinov2": "dinov2_with_registers",
    "mae": "mae",
    "siglip2": "siglip",
}
_KINDS = {family: kind for kind, family in ENCODER_TYPES.items()}
# What the class there fixes, of which its settings say nothing.
_HEAD_DIM = 64
_TABLE_SIZES = {"dinov2": 518, "mae": 224, "siglip2": 256}
_INNER_SIZES = {"mae": 3072, "siglip2": 3072}
_DECODER_NORM_EPS = 1e-12
_BASE_GRID = 16

_DECODER_NAMES = {
    "attention.to_q.": "attention.attention.query.",
    "attention.to_k.": "attention.attention.key.",
    "attention.to_v.": "attention.attention.value.",
    "attention.to_out.0.": "attention.output.dense.",
}
# From transformers 4 to 5, by family.
_ENCODER_NAMES = [
    (r"attention\.attention\.query\.", "attention.q_proj."),
    (r"attention\.attention\.key\.", "attention.k_proj."),
    (r"attention\.attention\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
]
_MAE_NAMES = [
    (r"^encoder\.layer\.", "layers."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
]
_STATISTICS = {"latent_mean": "_latents_mean", "latent_std": "_latents_std"}
_PIXELS = {"image_mean": "encoder_mean", "image_std": "encoder_std"}

Settings = Mapping[str, Any]


def is_settings(settings: Settings) -> bool:
    """Whether a `config.json` is that of an `AutoencoderRAE`."""
    return settings.get("_class_name") == CLASS_NAME


def read(source: sources.TensorSource, settings: Settings) -> sources.TensorSource:
    """Returns the weights of a folder in the common spelling.

    The decoder's positions are diffusers' fixed table, as in diffusers itself; where
    the file has another one, a warning says so.
    """
    names = {}
    for name in source.shapes:
        if name not in (*_STATISTICS.values(), *_PIXELS.values()):
            names[_common_name(name)] = name
    grid = settings["encoder_input_size"] // settings["encoder_patch_size"]
    table = fixed_table(settings["decoder_hidden_size"], grid)
    if rae_names.UNUSED_POS_EMBED in names:
        given = source.read(names[rae_names.UNUSED_POS_EMBED])
        _warn_of_table(given, table, source.origin)
    shape = (settings["encoder_hidden_size"], grid, grid)
    added = {f"decoder.{rae_names.POS_EMBED}": table}
    for ours, theirs in _STATISTICS.items():
        added[ours] = _latent_statistic(source, theirs, shape)
    common = rae_names.common(sources.renamed(source, names))
    return rae_names.with_added(common, added)


def arguments(settings: Settings, source: sources.TensorSource) -> dict[str, Any]:
    """Returns the constructor arguments of the RAE in a folder.

    Args:
        settings: Its `config.json`.
        source: Its tensors, which hold the pixel statistics.

    Raises:
        ValueError: The encoder is of an unknown type, or its latents are not a grid.
    """
    kind, width = settings["encoder_type"], settings["encoder_hidden_size"]
    if kind not in ENCODER_TYPES or not settings.get("reshape_to_2d", True):
        raise ValueError(
            f"{source.origin}: encoder_type {kind!r} with reshape_to_2d="
            f"{settings.get('reshape_to_2d')} is not supported; encoder types are "
            f"{', '.join(ENCODER_TYPES)}."
        )
    image_size, patch_size = (
        settings[f"encoder_{k}"] for k in ("input_size", "patch_size")
    )
    grid = image_size // patch_size
    encoder = {
        "name": ENCODER_TYPES[kind],
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": settings["encoder_num_hidden_layers"],
        "num_heads": width // _HEAD_DIM,
        "intermediate_size": _INNER_SIZES.get(kind, 4 * width),
        "table_size": _TABLE_SIZES[kind] // patch_size * patch_size,
    }
    for ours, theirs in _PIXELS.items():
        encoder[ours] = tuple(source.read(theirs).reshape(-1).tolist())
    return {
        "encoder": encoder,
        "decoder": _decoder_arguments(settings, grid),
        "latent_shape": (grid, grid, width),
        "eps": EPS,
        "normalization": "deviation",
        "scaling_factor": settings.get("scaling_factor", 1.0),
    }


def settings_of(
    encoder: Mapping[str, Any],
    decoder: Mapping[str, Any],
    statistics: Mapping[str, np.ndarray],
    scaling_factor: float,
) -> dict[str, Any]:
    """Returns the `config.json` of an RAE.

    Args:
        encoder: Constructor arguments of the encoder.
        decoder: Constructor arguments of the decoder.
        statistics: What `buffers` returned.
        scaling_factor: By which normalised latents are multiplied.

    Raises:
        ValueError: diffusers cannot build such an encoder or decoder.
    """
    found = _problems(encoder, decoder)
    if found:
        raise ValueError(f"diffusers' {CLASS_NAME} cannot hold {'; '.join(found)}.")
    values = {k: v.tolist() if v.size > 1 else None for k, v in statistics.items()}
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        "decoder_hidden_size": decoder["hidden_size"],
        "decoder_intermediate_size": decoder["intermediate_size"],
        "decoder_num_attention_heads": decoder["num_heads"],
        "decoder_num_hidden_layers": decoder["depth"],
        "encoder_hidden_size": encoder["hidden_size"],
        "encoder_input_size": encoder["image_size"],
        "encoder_norm_mean": statistics["encoder_mean"].reshape(-1).tolist(),
        "encoder_norm_std": statistics["encoder_std"].reshape(-1).tolist(),
        "encoder_num_hidden_layers": encoder["depth"],
        "encoder_patch_size": encoder["patch_size"],
        "encoder_type": _KINDS[encoder["name"]],
        "image_size": None,
        "latents_mean": values["_latents_mean"],
        "latents_std": values["_latents_std"],
        "noise_tau": 0.0,
        "num_channels": 3,
        "patch_size": decoder["patch_size"],
        "reshape_to_2d": True,
        "scaling_factor": scaling_factor,
        "use_encoder_loss": False,
    }


def buffers(
    mean: np.ndarray, std: np.ndarray, encoder: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the buffers of a file.

    Args:
        mean: Latent mean (h, w, c).
        std: Latent deviation (h, w, c).
        encoder: Constructor arguments of the encoder.
    """
    facts = _facts(encoder)
    found = {
        theirs: np.asarray(getattr(facts, ours), np.float32).reshape(1, 3, 1, 1)
        for ours, theirs in _PIXELS.items()
    }
    # One entry stands for "no statistics" there, and a table for each entry else.
    for name, value, neutral in (("_latents_mean", mean, 0), ("_latents_std", std, 1)):
        moved = np.ascontiguousarray(np.moveaxis(value, -1, 0), np.float32)
        is_neutral = bool((moved == neutral).all())
        found[name] = np.full(1, neutral, np.float32) if is_neutral else moved
    return found


def to_diffusers(family: str) -> Callable[[str], str | None]:
    """Returns the function from the common spelling to that of diffusers.

    It gives None for what is no parameter there: position table and statistics.
    """
    spellings = _ENCODER_NAMES if family != "siglip" else []
    spellings = spellings + (_MAE_NAMES if family == "mae" else [])

    def rename(name: str) -> str | None:
        part, _, inner = name.partition(".")
        if name == rae_names.UNUSED_POS_EMBED:
            return f"decoder.{rae_names.POS_EMBED}"
        if part == "encoder":
            for pattern, replacement in spellings:
                inner = re.sub(pattern, replacement, inner)
            return f"encoder.{inner}"
        if part == "decoder" and inner != rae_names.POS_EMBED:
            names = {new: old for old, new in _DECODER_NAMES.items()}
            return f"decoder.{_replaced(inner, names)}"
        return None

    return rename


def check_position_table(
    table: np.ndarray, allow_fixed_table: bool, origin: str
) -> None:
    """Refuses to lose a decoder's position table.

    Args:
        table: Ours (1, 1 + n, d).
        allow_fixed_table: Whether diffusers' fixed table may take its place.
        origin: Where ours comes from.

    Raises:
        ValueError: The tables differ and may not.
    """
    fixed = fixed_table(table.shape[-1], math.isqrt(table.shape[1] - 1))
    difference = float(np.abs(table - fixed).max())
    if difference > 1e-6 and not allow_fixed_table:
        raise ValueError(
            f"{origin}: diffusers has a fixed position table in its decoder, and this "
            f"decoder's differs from it by up to {difference:.2g} (it was trained, or "
            "its grid is not 16x16), so images would differ. Pass "
            "allow_fixed_table=True to export it nevertheless."
        )


def fixed_table(hidden_size: int, grid: int) -> np.ndarray:
    """Returns the decoder's position table in diffusers, (1, 1 + n, d) float32.

    Positions are scaled to a grid of 16, so only there it is the official table.
    """
    positions = np.arange(grid, dtype=np.float32) / np.float32(grid / _BASE_GRID)
    omega = 1.0 / 10000 ** (np.arange(hidden_size // 4) / (hidden_size / 4))
    angles = positions.astype(np.float64)[:, None] * omega[None, :]
    code = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(code, (grid, 1)), np.repeat(code, grid, axis=0)
    table = np.concatenate([columns, rows], axis=1).astype(np.float32)
    return np.pad(table, ((1, 0), (0, 0)))[None]


def _decoder_arguments(settings: Settings, grid: int) -> dict[str, Any]:
    return {
        "in_channels": settings["encoder_hidden_size"],
        "num_patches": grid**2,
        "patch_size": settings["patch_size"],
        "hidden_size": settings["decoder_hidden_size"],
        "depth": settings["decoder_num_hidden_layers"],
        "num_heads": settings["decoder_num_attention_heads"],
        "intermediate_size": settings["decoder_intermediate_size"],
    }


def _problems(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> list[str]:
    """Returns what diffusers cannot build of an autoencoder."""
    kind, width = _KINDS.get(encoder["name"]), encoder["hidden_size"]
    patch_size = encoder["patch_size"]
    table_size = encoder["table_size"] or encoder["image_size"]
    inner, heads = encoder["intermediate_size"], encoder["num_heads"]
    eps = decoder["layer_norm_eps"]
    expected_inner = _INNER_SIZES.get(kind, 4 * width)
    expected_table = _TABLE_SIZES.get(kind, table_size)
    problems = {
        f"the encoder family {encoder['name']!r}": kind is None,
        "a final encoder norm with affine part": not encoder["normalize"],
        "an encoder of several layers": bool(encoder.get("layers")),
        "an encoder that differs from its family": _is_changed(encoder),
        f"{heads} encoder heads (width / 64 there)": heads != width // _HEAD_DIM,
        f"an encoder MLP of {inner} features": inner != expected_inner,
        f"a position table for {table_size} pixels": (
            table_size // patch_size != expected_table // patch_size
        ),
        f"a decoder with layer_norm_eps {eps}": eps != _DECODER_NORM_EPS,
    }
    return [text for text, is_problem in problems.items() if is_problem]


def _facts(encoder: Mapping[str, Any]) -> encoder_names.Family:
    changes = {k: v for k, v in encoder.items() if k in encoder_names.FACTS}
    return encoder_names.facts(encoder["name"], changes)


def _is_changed(encoder: Mapping[str, Any]) -> bool:
    """Whether more than the pixel statistics differs from what the class fixes."""
    family = encoder_names.FAMILIES[encoder["name"]]
    pixels = {name: getattr(family, name) for name in _PIXELS}
    return dataclasses.replace(_facts(encoder), **pixels) != family


def _common_name(name: str) -> str:
    if name == f"decoder.{rae_names.POS_EMBED}":
        return rae_names.UNUSED_POS_EMBED
    return _replaced(name, _DECODER_NAMES) if name.startswith("decoder.") else name


def _replaced(name: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


def _latent_statistic(
    source: sources.TensorSource, name: str, shape: tuple[int, int, int]
) -> np.ndarray:
    """Returns a buffer, which may be one number, as (h, w, c)."""
    value = source.read(name)
    value = value[0] if value.ndim == 4 else value
    try:
        value = np.broadcast_to(value, shape)
    except ValueError as error:
        raise ValueError(
            f"{source.origin}: {name} has shape {source.shapes[name]}, which does not "
            f"fit latents of {shape}."
        ) from error
    return np.ascontiguousarray(np.moveaxis(value, 0, -1), np.float32)


def _warn_of_table(given: np.ndarray, fixed: np.ndarray, origin: str) -> None:
    if given.shape != fixed.shape or np.abs(given - fixed).max() > 1e-6:
        warnings.warn(
            f"{origin} holds a decoder_pos_embed that differs from diffusers' fixed "
            "table. It is ignored, as diffusers does; the official decoder file gives "
            "the images that the decoder was trained for.",
            stacklevel=4,
        )
