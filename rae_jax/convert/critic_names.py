"""Names of networks that judge images: the critic's heads, Inception and LPIPS."""

from collections.abc import Iterator

import numpy as np

from rae_jax.convert import tables

Entry, Extra, Table = tables.Entry, tables.Extra, tables.Table

_INCEPTION_STEM = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
)
_POOLED = ("branch_pool",)
_DOUBLE = tuple(f"branch3x3dbl_{i}" for i in (1, 2, 3))
_NARROW = ("branch1x1", "branch5x5_1", "branch5x5_2", *_DOUBLE, *_POOLED)
_FACTORISED = (
    "branch1x1",
    *(f"branch7x7_{i}" for i in (1, 2, 3)),
    *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)),
    *_POOLED,
)
_WIDE = (
    "branch1x1",
    *(f"branch3x3_{i}" for i in ("1", "2a", "2b")),
    *(f"branch3x3dbl_{i}" for i in ("1", "2", "3a", "3b")),
    *_POOLED,
)
_INCEPTION_BLOCKS = {
    "Mixed_5b": _NARROW,
    "Mixed_5c": _NARROW,
    "Mixed_5d": _NARROW,
    "Mixed_6a": ("branch3x3", *_DOUBLE),
    "Mixed_6b": _FACTORISED,
    "Mixed_6c": _FACTORISED,
    "Mixed_6d": _FACTORISED,
    "Mixed_6e": _FACTORISED,
    "Mixed_7a": (
        *(f"branch3x3_{i}" for i in (1, 2)),
        *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)),
    ),
    "Mixed_7b": _WIDE,
    "Mixed_7c": _WIDE,
}
_NORM_NAMES = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
}

# Positions of the convolutions in torchvision's `features`, by stage.
_LPIPS_STAGES = {
    "vgg": ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
    "alex": ((0,), (3,), (6,), (8,), (10,)),
}
_LPIPS_WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
_CLASSIFIER_LAYERS = {"vgg": (0, 3, 6), "alex": (1, 4, 6)}
_LPIPS_SHIFT = (-0.030, -0.088, -0.188)
_LPIPS_SCALE = (0.458, 0.448, 0.450)
LPIPS_LAYOUTS = ("torchvision", "lpips")


def discriminator_table(num_features: int = 5, *, spectral_norm: bool = True) -> Table:
    """Names of the official critic's heads ("disc" of a stage-1 checkpoint).

    Entries are in the order of its state dict and, without the spectral vectors "u"
    and "v", of its `parameters()`. The frozen backbone is not among them.

    Args:
        num_features: Number of heads.
        spectral_norm: Whether kernels are stored with their spectral vectors.
    """
    entries: list[Entry] = []
    for i in range(num_features):
        theirs, ours = f"heads.{i}", f"heads.{i}"
        entries += _critic_conv(f"{theirs}.0.0", f"{ours}.conv1", spectral_norm)
        entries += _critic_norm(f"{theirs}.0.1", f"{ours}.norm1")
        entries += _critic_conv(f"{theirs}.1.fn.0", f"{ours}.conv2", spectral_norm)
        entries += _critic_norm(f"{theirs}.1.fn.1", f"{ours}.norm2")
        entries += _critic_conv(f"{theirs}.2", f"{ours}.conv3", spectral_norm)
    return Table(tuple(entries))


def inception_table() -> Table:
    """Names of the FID Inception, the same in the files of both PyTorch ports.

    These are "weights-inception-2015-12-05-6726825d.pth" of torch-fidelity and
    "pt_inception-2015-12-05-6726825d.pth" of pytorch-fid. A batch norm's counter of
    batches, which has no effect, is kept where a file has it.
    """
    entries: list[Entry] = []
    extras: list[Extra] = []
    for unit in _inception_units():
        ours = unit.lower().replace("conv2d_", "conv_")
        entries.append(Entry(f"{unit}.conv.weight", f"{ours}.kernel", "conv2d"))
        for theirs, name in _NORM_NAMES.items():
            entries.append(Entry(f"{unit}.bn.{theirs}", f"{ours}.{name}"))
        extras.append(Extra(f"{unit}.bn.num_batches_tracked"))
    entries.append(Entry("fc.weight", "fc.kernel", "linear"))
    entries.append(Entry("fc.bias", "fc.bias"))
    return Table(tuple(entries), tuple(extras))


def lpips_table(
    backbone: str = "vgg", layout: str = "lpips", widths: tuple[int, ...] | None = None
) -> Table:
    """Names of LPIPS version 0.1.

    Args:
        backbone: "vgg" or "alex".
        layout: "lpips" is the state dict of the whole distance, as of the package lpips
            or of taming-transformers; "torchvision" the ImageNet network of
            torchvision ("features.*", its classifier ignored) together with the file
            of the linear heads ("lin0.model.1.weight" to "lin4.model.1.weight").
        widths: Channels of the five stages; by default those of the real network.

    Raises:
        ValueError: The backbone or the layout is unknown.
    """
    if layout not in LPIPS_LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}; choose from {LPIPS_LAYOUTS}.")
    if backbone not in _LPIPS_STAGES:
        raise ValueError(
            f"Unknown backbone {backbone!r}; choose from {list(_LPIPS_STAGES)}."
        )
    heads = _lpips_heads(widths or _LPIPS_WIDTHS[backbone])
    if layout == "torchvision":
        extras = _classifier(backbone)
    else:
        # The package lpips holds the heads a second time, in a list.
        copies = [Extra(f"lins.{k}.model.1.weight") for k in range(len(heads))]
        extras = _scaling_layer() + copies
    return Table((*_lpips_trunk(backbone, layout), *heads), tuple(extras))


def _lpips_trunk(backbone: str, layout: str) -> Iterator[Entry]:
    for i, positions in enumerate(_LPIPS_STAGES[backbone], start=1):
        group = "features" if layout == "torchvision" else f"net.slice{i}"
        for j, position in enumerate(positions, start=1):
            theirs, ours = f"{group}.{position}", f"conv{i}_{j}"
            yield Entry(f"{theirs}.weight", f"{ours}.kernel", "conv2d")
            yield Entry(f"{theirs}.bias", f"{ours}.bias")


def _lpips_heads(widths: tuple[int, ...]) -> list[Entry]:
    """Convolutions of 1 x 1 to one channel there, vectors here."""
    return [
        Entry(f"lin{k}.model.1.weight", f"head{k + 1}", "reshape", shape=(1, w, 1, 1))
        for k, w in enumerate(widths)
    ]


def _classifier(backbone: str) -> list[Extra]:
    return [
        Extra(f"classifier.{layer}.{name}")
        for layer in _CLASSIFIER_LAYERS[backbone]
        for name in ("weight", "bias")
    ]


def _inception_units() -> Iterator[str]:
    yield from _INCEPTION_STEM
    for block, units in _INCEPTION_BLOCKS.items():
        for unit in units:
            yield f"{block}.{unit}"


def _critic_conv(theirs: str, ours: str, spectral_norm: bool) -> list[Entry]:
    bias = Entry(f"{theirs}.bias", f"{ours}.bias")
    if not spectral_norm:
        return [Entry(f"{theirs}.weight", f"{ours}.kernel", "conv1d"), bias]
    return [
        bias,
        Entry(f"{theirs}.weight_orig", f"{ours}.kernel", "conv1d"),
        Entry(f"{theirs}.weight_u", f"{ours}.u"),
        Entry(f"{theirs}.weight_v", f"{ours}.v"),
    ]


def _critic_norm(theirs: str, ours: str) -> list[Entry]:
    return [
        Entry(f"{theirs}.weight", f"{ours}.scale"),
        Entry(f"{theirs}.bias", f"{ours}.bias"),
    ]


def _scaling_layer() -> list[Extra]:
    """The moments of ImageNet on the scale [-1, 1], constants of the distance."""

    def constant(values: tuple[float, ...]) -> np.ndarray:
        return np.array(values, np.float32)[None, :, None, None]

    return [
        Extra("scaling_layer.shift", lambda: constant(_LPIPS_SHIFT), check=True),
        Extra("scaling_layer.scale", lambda: constant(_LPIPS_SCALE), check=True),
    ]
