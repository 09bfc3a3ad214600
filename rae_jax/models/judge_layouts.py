"""Foreign layouts of the networks that judge images: critic, LPIPS and Inception."""

import re
from pathlib import Path
from typing import Any

from rae_jax.convert import critic_names, hub, rae_names, sources, tables
from rae_jax.models import perceptual, pretrained, writers

CRITIC_PART = "disc"  # Of an official stage-1 checkpoint.
WEIGHTS_NAME = "model.pt"
_LPIPS_KERNEL = re.compile(r"(features|net\.slice\d)\.\d+\.weight")

Arguments = pretrained.Arguments


def open_discriminator(
    path: Path, part: str | None, overrides: Arguments
) -> pretrained.Weights:
    """Opens the heads of the official critic, alone or in a stage-1 checkpoint.

    `norm_groups` is needed where the heads have group norms: a file does not tell.
    """
    source = _open_critic(path, part)
    shapes = source.shapes
    heads = {m[1] for m in (re.match(r"heads\.(\d+)\.", name) for name in shapes) if m}
    is_spectral = "heads.0.1.fn.0.weight_orig" in shapes
    kernel = "heads.0.1.fn.0.weight" + ("_orig" if is_spectral else "")
    source.require(["heads.0.0.0.bias", kernel])
    arguments = {
        "hidden_size": shapes["heads.0.0.0.bias"][0],
        "num_features": len(heads),
        "kernel_size": shapes[kernel][2],
        "spectral_norm": is_spectral,
    } | overrides
    return pretrained.Weights(arguments, _critic_table(arguments), source)


def export_discriminator(
    layout: str, arguments: Arguments, ours: tables.Source
) -> writers.Export:
    """Describes the state dict of the official critic."""
    return writers.Export(_critic_table(arguments), WEIGHTS_NAME)


def open_lpips(
    path: Path, part: str | None, overrides: Arguments
) -> pretrained.Weights:
    """Opens LPIPS 0.1: one file of the whole distance, or a trunk and its heads.

    For the ImageNet network of torchvision, whose classifier is left out, the override
    `heads` is the file of the linear heads.
    """
    overrides = dict(overrides)
    heads = overrides.pop("heads", None)
    source = sources.open_tensors(path, part)
    is_trunk = "features.0.weight" in source.shapes
    if is_trunk and heads is None:
        raise ValueError(
            f"{path} is a network of torchvision, without the linear heads of LPIPS. "
            "Give their file: heads=vgg.pth."
        )
    if heads is not None:
        linear = sources.open_tensors(hub.locate(heads, allow=pretrained.HUB_FILES))
        added = {name: linear.read(name) for name in linear.shapes}
        kept = [name for name in source.shapes if not name.startswith("classifier.")]
        source = rae_names.with_added(sources.subset(source, kept), added)
    arguments = _lpips_sizes(source) | overrides
    layout = "torchvision" if is_trunk else "lpips"
    return pretrained.Weights(arguments, _lpips_table(arguments, layout), source)


def export_lpips(
    layout: str, arguments: Arguments, ours: tables.Source
) -> writers.Export:
    """Describes the file of the whole distance, as of the package lpips."""
    return writers.Export(_lpips_table(arguments, "lpips"), WEIGHTS_NAME)


def open_inception(
    path: Path, part: str | None, overrides: Arguments
) -> pretrained.Weights:
    """Opens the FID Inception of torch-fidelity or pytorch-fid."""
    source = sources.open_tensors(path, part)
    return pretrained.Weights(overrides, critic_names.inception_table(), source)


def export_inception(
    layout: str, arguments: Arguments, ours: tables.Source
) -> writers.Export:
    """Describes the file that torch-fidelity and pytorch-fid load."""
    return writers.Export(critic_names.inception_table(), WEIGHTS_NAME)


def _open_critic(path: Path, part: str | None) -> sources.TensorSource:
    if part is not None:
        return sources.open_tensors(path, part)
    try:
        return sources.open_tensors(path, CRITIC_PART)
    except ValueError:  # No checkpoint with parts: the heads alone.
        return sources.open_tensors(path)


def _critic_table(arguments: Arguments) -> tables.Table:
    return critic_names.discriminator_table(
        arguments["num_features"], spectral_norm=arguments["spectral_norm"]
    )


def _lpips_sizes(source: sources.TensorSource) -> dict[str, Any]:
    """Returns the backbone, by its number of convolutions, and its widths."""
    names = [f"lin{k}.model.1.weight" for k in range(5)]
    source.require(names)
    widths = tuple(source.shapes[name][1] for name in names)
    kernels = [name for name in source.shapes if _LPIPS_KERNEL.fullmatch(name)]
    depths = {
        sum(stage.convs for stage in stages): name
        for name, stages in perceptual.BACKBONES.items()
    }
    if len(kernels) not in depths:
        raise ValueError(
            f"{source.origin} has {len(kernels)} convolutions; LPIPS networks have "
            f"{', '.join(f'{n} ({name})' for n, name in depths.items())}."
        )
    backbone = depths[len(kernels)]
    usual = tuple(stage.width for stage in perceptual.BACKBONES[backbone])
    return {"backbone": backbone, "widths": None if widths == usual else widths}


def _lpips_table(arguments: Arguments, layout: str) -> tables.Table:
    return critic_names.lpips_table(
        arguments["backbone"], layout, arguments.get("widths")
    )
