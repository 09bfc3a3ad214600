"""Kinds of networks in weight files: how each is told, opened and written."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from rae_jax import config as configs
from rae_jax.convert import diffusers_names, encoder_names, kl_names, sources
from rae_jax.models import (
    autoencoder_kl,
    decoder,
    discriminator,
    dit,
    dit_dh,
    encoders,
    inception,
    judge_layouts,
    ldae_encoder,
    mae,
    perceptual,
    pretrained,
    rae,
    vit_encoder,
    writers,
)

OFFICIAL, DIFFUSERS, HUGGINGFACE = "official", "diffusers", "huggingface"
LAYOUTS = (OFFICIAL, DIFFUSERS, HUGGINGFACE, pretrained.OWN_LAYOUT)
STATS = "latent_stats"

Arguments = pretrained.Arguments


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        mark: Pattern of the name of a tensor that foreign files of this kind have.
        classes: Classes of such networks; a foreign file becomes the first.
        layouts: Foreign layouts, the usual one first.
        open: See `pretrained.Pretrained.open_foreign`.
        export: See `pretrained.Pretrained.export`.
    """

    mark: str
    classes: tuple[type[nnx.Module], ...]
    layouts: tuple[str, ...]
    open: Callable[[Path, str | None, Arguments], pretrained.Weights]
    export: Callable[..., writers.Export]


def _open_encoder(
    path: Path, part: str | None, overrides: Arguments
) -> pretrained.Weights:
    """Opens an encoder; what a bare file does not tell are a preset's sizes."""
    if not vit_encoder.read_arguments(path):
        source = encoder_names.canonical(sources.open_tensors(path, part))
        overrides = _preset(source, overrides.get("name")) | overrides
    return vit_encoder.ViTEncoder.open_foreign(path, part, overrides)


def _preset(source: sources.TensorSource, name: str | None) -> Arguments:
    """Returns the arguments of the first preset that tensors fit; {} for none.

    With a name it is one of that family.
    """
    for preset in encoders.PRESETS.values():
        if name not in (None, preset["name"]):
            continue
        arguments = {"name": preset["name"]} | preset["sizes"]
        table = encoder_names.table(**arguments)
        known = {e.name for e in (*table.entries, *table.extras)}
        shapes = {e.name: e.shape for e in table.entries if e.shape}
        fits = {name: source.shapes.get(name) for name in shapes} == shapes
        if fits and known.issuperset(source.shapes):
            return arguments
    return {}


def _of(mark: str, cls: Any, *layouts: str) -> Kind:
    return Kind(mark, (cls,), layouts, cls.open_foreign, cls.export)


# The first whose mark is in a file is its kind.
KINDS = {
    "dit_dh": _of(r"s_embedder\.proj\.weight", dit_dh.DiTDH, OFFICIAL),
    "dit": _of(r"x_embedder\.proj\.weight", dit.DiT, OFFICIAL),
    "autoencoder": _of(
        r"encoder\..*patch_embed.*\.weight", rae.RAE, OFFICIAL, DIFFUSERS
    ),
    "autoencoder_kl": _of(
        re.escape(kl_names.MARK), autoencoder_kl.AutoencoderKL, DIFFUSERS
    ),
    "decoder": _of(r"(decoder\.)?trainable_cls_token", decoder.RAEDecoder, OFFICIAL),
    "discriminator": Kind(
        r"heads\.0\.0\.0\.bias",
        (discriminator.Discriminator,),
        (OFFICIAL,),
        judge_layouts.open_discriminator,
        judge_layouts.export_discriminator,
    ),
    "lpips": Kind(
        r"lin0\.model\.1\.weight|features\.0\.weight",
        (perceptual.LPIPS,),
        (OFFICIAL,),
        judge_layouts.open_lpips,
        judge_layouts.export_lpips,
    ),
    "inception": Kind(
        r"Conv2d_1a_3x3\.conv\.weight",
        (inception.InceptionV3,),
        (OFFICIAL,),
        judge_layouts.open_inception,
        judge_layouts.export_inception,
    ),
    "encoder": Kind(
        r".*(patch_embeddings?(\.projection)?|patch_embed\.proj)\.weight",
        (vit_encoder.ViTEncoder, ldae_encoder.LDAEEncoder),
        (HUGGINGFACE,),
        _open_encoder,
        vit_encoder.ViTEncoder.export,
    ),
    # Told by hand: the encoder in such a file is what is mostly wanted.
    "mae": _of(r"decoder\.decoder_pred\.weight", mae.MAE, HUGGINGFACE),
}
NAMES = (*KINDS, STATS)


def guess(names: Iterable[str], origin: str) -> str:
    """Returns the kind of a foreign file from the names of its tensors.

    Raises:
        ValueError: They are those of no kind.
    """
    names = list(names)
    if "var" in names:
        return STATS
    for kind, facts in KINDS.items():
        if any(re.fullmatch(facts.mark, name) for name in names):
            return kind
    shown = ", ".join(sorted(names)[:3])
    raise ValueError(
        f"{origin}: its tensors ({shown}, ...) are of no known kind. If you know it, "
        f"give --kind; kinds are {', '.join(NAMES)}."
    )


def of_class(name: str) -> str:
    """Returns the kind of our own class; ValueError if there is none."""
    found = {cls.__name__: kind for kind, k in KINDS.items() for cls in k.classes}
    if name not in found:
        raise ValueError(configs.suggest(name, list(found), "class"))
    return found[name]


def layout_of(path: Path, kind: str) -> str:
    """Returns the layout that a file or folder is in."""
    settings = pretrained.read_config(path)
    if "class" in settings:
        return pretrained.OWN_LAYOUT
    if diffusers_names.is_settings(settings):
        return DIFFUSERS
    if kind == STATS:
        return pretrained.OWN_LAYOUT if path.suffix == ".npz" else OFFICIAL
    return KINDS[kind].layouts[0]
