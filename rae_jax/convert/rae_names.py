"""Names of RAE's decoder and of the whole autoencoder, in one common spelling.

That spelling is `encoder.` before the names of `encoder_names`, `decoder.` before the
official decoder's, and the latent statistics under our own names. This module leads
from official checkpoints to it and back, `diffusers_names` from diffusers.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rae_jax.convert import encoder_names, sources, tables

Shapes = tables.Shapes
Arguments = dict[str, Any]

# Widths do not tell the number of heads; those of the published sizes are here.
DECODER_HEADS = {(768, 12): 12, (1024, 24): 16, (1152, 28): 16}
ENCODER_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}
# The attribute that holds the encoder inside the one that RAE holds.
OFFICIAL_WRAPPERS = {
    "dinov2": "encoder.",
    "dinov2_with_registers": "encoder.",
    "siglip": "model.",
    "mae": "model.",
}
POS_EMBED = "decoder_pos_embed"
# A position table that a diffusers file has and diffusers does not use.
UNUSED_POS_EMBED = "decoder.unused_pos_embed"
SPREADS = {"variance": "latent_var", "deviation": "latent_std"}


def decoder_table(*, depth: int, **_: Any) -> tables.Table:
    """Returns the official names of a decoder from its constructor arguments.

    They are in the order of the official `parameters()`.
    """
    entries = [
        tables.Entry(POS_EMBED, "pos_embed"),
        tables.Entry("trainable_cls_token", "cls_token"),
        *_linear("decoder_embed", "embed"),
    ]
    for layer in range(depth):
        entries += _decoder_block(layer)
    entries += _norm("decoder_norm", "norm") + _linear("decoder_pred", "pred")
    return tables.Table(tuple(entries))


def decoder_sizes(shapes: Shapes, **known: Any) -> Arguments:
    """Deduces the constructor arguments of a decoder from official shapes.

    Args:
        shapes: Shape by official name.
        **known: Arguments to take as they are. `num_heads` is needed unless width and
            depth are those of a published decoder.

    Raises:
        ValueError: The tensors are not those of a decoder, or do not tell all.
    """
    for name in ("decoder_embed.weight", "decoder_pred.weight", POS_EMBED):
        if name not in shapes:
            raise ValueError(
                f"These are not the weights of an RAE decoder: {name!r} is missing."
            )
    hidden_size, in_channels = shapes["decoder_embed.weight"]
    inner = _matching(shapes, r"decoder_layers\.(\d+)\.intermediate\.dense\.weight")
    found = {
        "in_channels": in_channels,
        "num_patches": shapes[POS_EMBED][1] - 1,
        "patch_size": math.isqrt(shapes["decoder_pred.weight"][0] // 3),
        "hidden_size": hidden_size,
        "depth": len(inner),
        "num_heads": DECODER_HEADS.get((hidden_size, len(inner))),
        "intermediate_size": inner[0][0] if inner else 0,
    } | known
    if found["num_heads"] is None:
        raise ValueError(
            f"A decoder of width {hidden_size} and depth {len(inner)} is none of the "
            f"published ones, {list(DECODER_HEADS)}, and a file does not tell the "
            "number of attention heads. Give num_heads=..."
        )
    return found


def encoder_sizes(shapes: Shapes, grid: int, **known: Any) -> Arguments:
    """Deduces the constructor arguments of an encoder from canonical shapes.

    Args:
        shapes: Shape by the name of `encoder_names.table`.
        grid: Patches per side of the input.
        **known: Arguments to take as they are. `num_heads` is needed unless the width
            is that of a published encoder.

    Raises:
        ValueError: The family is none that the official code has, or `num_heads` is
            not known.
    """
    is_siglip = "embeddings.patch_embedding.weight" in shapes
    patch = "embeddings.patch_embedding" if is_siglip else _VIT_PATCH
    table = "embeddings.position_embedding" + (".weight" if is_siglip else "s")
    family = known.get("name") or _family(shapes)
    first = int(encoder_names.facts(family, {}).cls_token)
    table_grid = math.isqrt(math.prod(shapes[table][:-1]) - first)
    width, _, _, patch_size = shapes[f"{patch}.weight"]
    inner = _matching(shapes, r".*\.(\d+)\.(?:mlp\.fc1|intermediate\.dense)\.weight")
    inner = [shape for shape in inner if shape[1] == width]
    found = {
        "name": family,
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": len(inner),
        "num_heads": ENCODER_HEADS.get(width),
        "intermediate_size": inner[0][0] if inner else 0,
        "table_size": table_grid * patch_size,
        "normalize": not {"layernorm.weight", "post_layernorm.weight"} & {*shapes},
    } | known
    if found["num_heads"] is None:
        raise ValueError(
            f"An encoder of width {width} is none of the published ones, "
            f"{list(ENCODER_HEADS)}, and a file does not tell the number of attention "
            "heads. Give encoder=dict(num_heads=...)."
        )
    return found


def autoencoder_table(
    encoder: Arguments, decoder: Arguments, normalization: str
) -> tables.Table:
    """Returns the names of an RAE in the common spelling.

    Args:
        encoder: Constructor arguments of the encoder.
        decoder: Constructor arguments of the decoder.
        normalization: Key of `SPREADS`.
    """
    statistics = ("latent_mean", SPREADS[normalization])
    return tables.joined(
        tables.prefixed(
            encoder_names.table(**encoder, final_norm=False), "encoder.", "encoder."
        ),
        tables.prefixed(decoder_table(**decoder), "decoder.", "decoder."),
        tables.Table(
            tuple(tables.Entry(name, name) for name in statistics),
            (tables.Extra(UNUSED_POS_EMBED),),
        ),
    )


def common(source: sources.TensorSource) -> sources.TensorSource:
    """Returns tensors under `encoder.` and `decoder.` with canonical encoder names.

    Accepts the spellings of transformers 4 and 5 and the wrappers' prefixes. What is
    neither keeps its name.
    """
    names = {n: n for n in source.shapes if not n.startswith("encoder.")}
    rest = sources.renamed(source, names)
    encoder = encoder_names.canonical(sources.under(source, "encoder."))
    shapes = {f"encoder.{name}": shape for name, shape in encoder.shapes.items()}
    dtypes = {f"encoder.{name}": dtype for name, dtype in encoder.dtypes.items()}

    def read(name: str) -> np.ndarray:
        if name in shapes:
            return encoder.read(name.removeprefix("encoder."))
        return rest.read(name)

    return sources.TensorSource(
        source.origin,
        shapes | rest.shapes,
        dtypes | rest.dtypes,
        read,
        values=source.values,
    )


def with_added(
    source: sources.TensorSource, added: Mapping[str, np.ndarray]
) -> sources.TensorSource:
    """Returns a source with tensors from memory beside its own, or in their place."""

    def read(name: str) -> np.ndarray:
        return added[name] if name in added else source.read(name)

    return sources.TensorSource(
        source.origin,
        source.shapes | {name: array.shape for name, array in added.items()},
        source.dtypes | {name: array.dtype for name, array in added.items()},
        read,
        values=source.values,
    )


def to_official(family: str) -> Callable[[str], str | None]:
    """Returns the function from the common spelling to official names.

    It gives None for the statistics, which have a file of their own.

    Raises:
        ValueError: The official code has no encoder of this family.
    """
    if family not in OFFICIAL_WRAPPERS:
        raise ValueError(
            f"The official code has no encoder of the family {family!r}, only "
            f"{', '.join(OFFICIAL_WRAPPERS)}. Save with layout='rae_jax'."
        )

    def rename(name: str) -> str | None:
        part, _, inner = name.partition(".")
        if part == "encoder":
            return f"encoder.{OFFICIAL_WRAPPERS[family]}{inner}"
        return name if part == "decoder" and name != UNUSED_POS_EMBED else None

    return rename


_VIT_PATCH = "embeddings.patch_embeddings.projection"


def _family(shapes: Shapes) -> str:
    if "embeddings.patch_embedding.weight" in shapes:
        return "siglip"
    if f"{_VIT_PATCH}.weight" not in shapes:
        raise ValueError(
            "The encoder is none of those that the official code has: "
            f"{', '.join(OFFICIAL_WRAPPERS)}. Assemble it with RAE.from_parts."
        )
    if "embeddings.register_tokens" in shapes:
        return "dinov2_with_registers"
    has_gains = "encoder.layer.0.layer_scale1.lambda1" in shapes
    return "dinov2" if has_gains else "mae"


def _matching(shapes: Shapes, pattern: str) -> list[tables.Shape]:
    return [shape for name, shape in shapes.items() if re.fullmatch(pattern, name)]


def _decoder_block(layer: int) -> list[tables.Entry]:
    attention = "attention.attention"
    entries = []
    for i, name in enumerate(("query", "key", "value")):
        part = [e._replace(part=(i, 3)) for e in _linear(f"{attention}.{name}", "qkv")]
        entries += [e._replace(path=f"attn.{e.path}") for e in part]
    entries += [
        *_linear("attention.output.dense", "attn.proj"),
        *_linear("intermediate.dense", "mlp.fc1"),
        *_linear("output.dense", "mlp.fc2"),
        *_norm("layernorm_before", "norm1"),
        *_norm("layernorm_after", "norm2"),
    ]
    return [
        entry._replace(
            name=f"decoder_layers.{layer}.{entry.name}",
            path=f"blocks.block.{entry.path}",
            layer=layer,
        )
        for entry in entries
    ]


def _linear(name: str, path: str) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.kernel", "linear"),
        tables.Entry(f"{name}.bias", f"{path}.bias"),
    ]


def _norm(name: str, path: str) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.scale"),
        tables.Entry(f"{name}.bias", f"{path}.bias"),
    ]
