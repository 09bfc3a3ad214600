"""Foreign layouts of whole autoencoders: official checkpoints and diffusers folders."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rae_jax.convert import (
    diffusers_names,
    hub,
    rae_names,
    sources,
    stats_files,
    tables,
)
from rae_jax.models import pretrained, recording, writers

OFFICIAL_EPS = 1e-5
STATS_FILES = ("*.pt", "*.npz")

Arguments = pretrained.Arguments


def open_diffusers(
    path: Path, settings: Mapping[str, Any], overrides: Arguments
) -> pretrained.Weights:
    """Opens the folder of a diffusers `AutoencoderRAE`.

    Args:
        path: The folder.
        settings: Its `config.json`.
        overrides: Arguments in place of the folder's.
    """
    source = sources.open_tensors(path)
    found = diffusers_names.arguments(settings, source)
    found |= _networks(found["encoder"], found["decoder"])
    arguments = recording.merged(found, overrides)
    table = _table(arguments)
    return pretrained.Weights(arguments, table, diffusers_names.read(source, settings))


def open_official(
    path: Path, part: str | None, overrides: Arguments
) -> pretrained.Weights:
    """Opens an official stage-1 checkpoint.

    Args:
        path: The file.
        part: "ema" (first choice) or "model".
        overrides: Arguments that the file does not tell: `encoder` and `decoder`, a
            dict each with `num_heads` or others, and `latent_stats`, the file of the
            statistics; without it latents are not normalised.
    """
    overrides = dict(overrides)
    stats_file = overrides.pop("latent_stats", None)
    source = rae_names.common(sources.open_tensors(path, part))
    decoder = rae_names.decoder_sizes(
        sources.under(source, "decoder.").shapes, **overrides.get("decoder", {})
    )
    grid = math.isqrt(decoder["num_patches"])
    encoder = rae_names.encoder_sizes(
        sources.under(source, "encoder.").shapes, grid, **overrides.get("encoder", {})
    )
    shape = (grid, grid, encoder["hidden_size"])
    stats = read_stats(stats_file, shape).arrays()
    found = _networks(encoder, decoder) | {
        "latent_shape": shape,
        "eps": OFFICIAL_EPS if stats_file else 0.0,
        "normalization": "variance",
    }
    arguments = recording.merged(found, overrides)
    added = {f"latent_{name}": array for name, array in stats.items()}
    return pretrained.Weights(
        arguments, _table(arguments), rae_names.with_added(source, added)
    )


def read_stats(
    source: str | Path | None, shape: tuple[int, int, int]
) -> stats_files.LatentStats:
    """Reads latent statistics of a shape (h, w, c); without a file, 0 and 1.

    Raises:
        ValueError: The file is for latents of another shape.
    """
    if source is None:
        return stats_files.LatentStats(None, np.ones(shape, np.float32))
    path = hub.locate(source, allow=STATS_FILES)
    stats = stats_files.read_stats(path)
    if stats.var.shape != tuple(shape):
        raise ValueError(
            f"{path} holds statistics for latents {stats.var.shape}, these latents "
            f"are {tuple(shape)}."
        )
    return stats


def export_official(arguments: Arguments, ours: tables.Source) -> writers.Export:
    """Describes the official layout: `model.pt`, and `stat.pt` for its statistics.

    Raises:
        ValueError: The official code has no such encoder or normalisation.
    """
    if arguments["scaling_factor"] != 1:
        raise ValueError(
            f"{ours.origin}: the official layout has no scaling_factor, and this one "
            f"is {arguments['scaling_factor']}."
        )
    encoder = _checked_encoder(arguments, "official")
    export = writers.Export(
        _table(arguments), "model.pt", rename=rae_names.to_official(encoder["name"])
    )
    mean = ours.read("latent_mean")
    if not mean.any() and (_scale(arguments, ours) == 1).all():
        return export  # Latents as they are, which the official code has no file for.
    var = _spread(arguments, ours, "variance", OFFICIAL_EPS)
    if (var < 0).any():
        raise ValueError(
            f"{ours.origin}: some deviations are so small that no variance leads to "
            "them with the official eps of 1e-5."
        )
    stats = stats_files.LatentStats(mean if mean.any() else None, var)

    def write_stats(folder: Path) -> None:
        stats_files.write_stats(folder / stats_files.OFFICIAL_NAME, stats)

    return export._replace(finish=write_stats)


def export_diffusers(
    arguments: Arguments, ours: tables.Source, allow_fixed_table: bool = False
) -> writers.Export:
    """Describes the layout of diffusers' `AutoencoderRAE`.

    Args:
        arguments: Constructor arguments.
        ours: Parameters.
        allow_fixed_table: Whether the fixed position table of diffusers' decoder may
            take the place of ours where they differ; images differ then.

    Raises:
        ValueError: diffusers cannot hold this autoencoder.
    """
    encoder = _checked_encoder(arguments, "diffusers")
    table = ours.read("decoder.pos_embed")
    diffusers_names.check_position_table(table, allow_fixed_table, ours.origin)
    std = _spread(arguments, ours, "deviation", diffusers_names.EPS)
    buffers = diffusers_names.buffers(ours.read("latent_mean"), std, encoder)
    settings = diffusers_names.settings_of(
        encoder,
        arguments["decoder"]["arguments"],
        buffers,
        arguments["scaling_factor"],
    )
    return writers.Export(
        _table(arguments),
        diffusers_names.WEIGHTS_NAME,
        rename=diffusers_names.to_diffusers(encoder["name"]),
        added=buffers,
        configs={pretrained.CONFIG_NAME: settings},
    )


def _networks(encoder: Arguments, decoder: Arguments) -> Arguments:
    return {
        "encoder": {"class": "ViTEncoder", "arguments": encoder},
        "decoder": {"class": "RAEDecoder", "arguments": decoder},
    }


def _table(arguments: Arguments) -> tables.Table:
    return rae_names.autoencoder_table(
        arguments["encoder"]["arguments"],
        arguments["decoder"]["arguments"],
        arguments["normalization"],
    )


def _checked_encoder(arguments: Arguments, layout: str) -> Arguments:
    encoder = arguments["encoder"]
    if encoder["class"] != "ViTEncoder":
        raise ValueError(
            f"The {layout} layout has no place for the encoder {encoder['class']}. "
            "Save with layout='rae_jax', or the decoder alone."
        )
    return encoder["arguments"]


def _spread(
    arguments: Arguments, ours: tables.Source, normalization: str, eps: float
) -> np.ndarray:
    """Returns variances or deviations that divide latents as ours do with `eps`.

    They are ours to the bit where ours are of that kind.
    """
    own = arguments["normalization"]
    if (own, arguments["eps"]) == (normalization, eps):
        return ours.read(rae_names.SPREADS[own])
    scale = _scale(arguments, ours)
    result = scale - eps if normalization == "deviation" else scale**2 - eps
    return result.astype(np.float32)


def _scale(arguments: Arguments, ours: tables.Source) -> np.ndarray:
    """Returns what latents are divided by, float64."""
    spread = ours.read(rae_names.SPREADS[arguments["normalization"]])
    spread = spread.astype(np.float64) + arguments["eps"]
    return np.sqrt(spread) if arguments["normalization"] == "variance" else spread
