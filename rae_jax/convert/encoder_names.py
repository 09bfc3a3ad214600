"""Names of pretrained encoders' tensors, and what is fixed in each family.

Names are those of the published files (transformers 4; timm for "dino", "mocov3"),
without the wrappers' prefixes; `canonical` turns every other spelling into them.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rae_jax import config as configs
from rae_jax.convert import sources, tables

ROTARY = "rotary"
IMAGENET = dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
HALF = dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Family:
    """What the encoders of one family have in common, whatever their size.

    Attributes:
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
        cls_token: Whether a class token comes first; it is dropped at the end.
        num_registers: Register tokens after it, without a position, dropped too.
        positions: "bicubic" or "bicubic_antialias", how the position table is
            resampled, or "rotary".
        rope_theta: Base of the rotary frequencies.
        layer_scale: Whether the branches have a gain per feature.
        gated: Whether the MLP is a SwiGLU.
        activation: Of a plain MLP: "gelu" or "gelu_tanh".
        layer_norm_eps: Added to the variance in all norms.
        key_bias: Whether keys have a bias.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    cls_token: bool = True
    num_registers: int = 0
    positions: str = "bicubic"
    rope_theta: float = 100.0
    layer_scale: bool = False
    gated: bool = False
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    key_bias: bool = True


FAMILIES = {
    "dinov2": Family(**IMAGENET, layer_scale=True),
    "dinov2_with_registers": Family(
        **IMAGENET, layer_scale=True, num_registers=4, positions="bicubic_antialias"
    ),
    "siglip": Family(**HALF, cls_token=False, activation="gelu_tanh"),
    "mae": Family(**IMAGENET, layer_norm_eps=1e-12),
    "dinov3": Family(
        **IMAGENET,
        layer_scale=True,
        num_registers=4,
        positions=ROTARY,
        layer_norm_eps=1e-5,
        key_bias=False,
    ),
    "dino": Family(**IMAGENET),
    "mocov3": Family(**IMAGENET),
    # Without a class token; also what an l-DAE encoder at a fixed time becomes.
    "ijepa": Family(**IMAGENET, cls_token=False),
}
FACTS = [field.name for field in dataclasses.fields(Family)]
SIZES = ("patch_size", "hidden_size", "depth", "num_heads", "intermediate_size")
# What goes before our names in the published files, where wrapper classes of
# transformers 4 cannot do without.
HUB_PREFIXES = {"siglip": "vision_model."}


def facts(family: str, changes: Mapping[str, Any]) -> Family:
    """Returns the facts of a family, with those in `changes` in their place.

    Raises:
        ValueError: For an unknown family or fact.
    """
    if family not in FAMILIES:
        raise ValueError(configs.suggest(family, list(FAMILIES), "encoder family"))
    for name in changes:
        if name not in FACTS:
            raise ValueError(configs.suggest(name, FACTS, "argument of an encoder"))
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return dataclasses.replace(FAMILIES[family], **changes)


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Returns in words how an encoder's arguments contradict those of its files.

    What a user may choose for given weights (`image_size`, `normalize`, `layers`,
    `dtype`, ...) is not compared.

    Args:
        given: Constructor arguments, `name` among them.
        stored: Those that the files describe.
    """
    ours, theirs = _fixed(given), _fixed(stored)
    return [
        f"{key} = {ours[key]}, the files have {theirs[key]}"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    ]


def _fixed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what weights fix: family, sizes and facts, those not given included."""
    known = {k: v for k, v in arguments.items() if k in FACTS}
    fixed = {k: arguments[k] for k in ("name", *SIZES) if k in arguments}
    fixed |= dataclasses.asdict(facts(arguments["name"], known))
    if fixed["positions"] != ROTARY:
        fixed["table_size"] = arguments.get("table_size") or arguments["image_size"]
    return fixed


class _Names(NamedTuple):
    """Foreign names in one family; several for one of ours are its equal parts."""

    block: str = "encoder.layer.{}."
    norms: tuple[str, str] = ("norm1", "norm2")
    qkv: tuple[str, ...] = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    )
    proj: str = "attention.output.dense"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    gated: tuple[tuple[str, ...], str] = (("mlp.weights_in",), "mlp.weights_out")
    final_norm: str = "layernorm"
    patch: str = "embeddings.patch_embeddings.projection"
    table: str = "embeddings.position_embeddings"
    cls_token: str = "embeddings.cls_token"


_NAMES = {
    "dinov2": _Names(),
    "dinov2_with_registers": _Names(),
    "mae": _Names(
        norms=("layernorm_before", "layernorm_after"),
        mlp=("intermediate.dense", "output.dense"),
    ),
    "siglip": _Names(
        block="encoder.layers.{}.",
        norms=("layer_norm1", "layer_norm2"),
        qkv=tuple(f"self_attn.{x}_proj" for x in "qkv"),
        proj="self_attn.out_proj",
        final_norm="post_layernorm",
        patch="embeddings.patch_embedding",
        table="embeddings.position_embedding.weight",
    ),
    "dinov3": _Names(
        block="layer.{}.",
        qkv=tuple(f"attention.{x}_proj" for x in "qkv"),
        proj="attention.o_proj",
        mlp=("mlp.up_proj", "mlp.down_proj"),
        gated=(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        final_norm="norm",
        patch="embeddings.patch_embeddings",
    ),
    "dino": _Names(
        block="blocks.{}.",
        qkv=("attn.qkv",),
        proj="attn.proj",
        final_norm="norm",
        patch="patch_embed.proj",
        table="pos_embed",
        cls_token="cls_token",
    ),
}
_NAMES["ijepa"] = _NAMES["mae"]
_NAMES["mocov3"] = _NAMES["dino"]


def table(
    name: str,
    *,
    depth: int,
    hidden_size: int,
    patch_size: int,
    intermediate_size: int,
    image_size: int,
    table_size: int | None = None,
    normalize: bool = True,
    final_norm: bool = True,
    **others: Any,
) -> tables.Table:
    """Returns the table of an encoder's tensors.

    Args:
        name: Family.
        depth: Number of blocks.
        hidden_size: Token width.
        patch_size: Pixels per token side.
        intermediate_size: Inner width of the MLPs.
        image_size: Input size; that of the position table where `table_size` is not
            given.
        table_size: Image size of the position table.
        normalize: Whether our final norm has no affine part; it is then an extra.
        final_norm: Whether the layout has that extra. RAE's own state dict has not.
        **others: The encoder's other sizes, of which the family's facts count.
    """
    family = facts(name, {k: v for k, v in others.items() if k in FACTS})
    names, width = _NAMES[name], hidden_size
    entries = _linear((names.patch,), "patch_embed.proj")
    shape = (width, 3, patch_size, patch_size)
    entries[0] = entries[0]._replace(form="patch", shape=shape)
    if family.cls_token:
        entries.append(tables.Entry(names.cls_token, "cls_token"))
    if family.num_registers:
        entries.append(tables.Entry("embeddings.register_tokens", "register_tokens"))
    if family.positions != ROTARY:
        grid = (table_size or image_size) // patch_size
        shape = (int(family.cls_token) + grid**2, width)
        shape = shape if name == "siglip" else (1, *shape)
        entries.append(tables.Entry(names.table, "pos_embed", "reshape", shape=shape))
    for layer in range(depth):
        entries += _block(names, family, layer)
    extras = _extras(name, width, intermediate_size)
    if not normalize:
        entries += _norm(names.final_norm, "norm")
    elif final_norm:
        ones, zeros = (partial(f, width, np.float32) for f in (np.ones, np.zeros))
        extras.append(tables.Extra(f"{names.final_norm}.weight", ones))
        extras.append(tables.Extra(f"{names.final_norm}.bias", zeros))
    return tables.Table(tuple(entries), tuple(extras))


def _block(names: _Names, family: Family, layer: int) -> list[tables.Entry]:
    fc1, fc2 = ((names.mlp[0],), names.mlp[1]) if not family.gated else names.gated
    first, second = ("mlp.w12", "mlp.w3") if family.gated else ("mlp.fc1", "mlp.fc2")
    entries = [
        *_norm(names.norms[0], "norm1"),
        *_linear(names.qkv, "attn.qkv"),
        *_linear((names.proj,), "attn.proj"),
        *_norm(names.norms[1], "norm2"),
        *_linear(fc1, first),
        *_linear((fc2,), second),
    ]
    if family.layer_scale:
        entries.append(tables.Entry("layer_scale1.lambda1", "scale1"))
        entries.append(tables.Entry("layer_scale2.lambda1", "scale2"))
    placed = []
    for entry in entries:
        absent = not family.key_bias and entry.name == f"{names.qkv[1]}.bias"
        foreign = "" if absent else names.block.format(layer) + entry.name
        path = f"blocks.block.{entry.path}"
        placed.append(entry._replace(name=foreign, path=path, layer=layer))
    return placed


def _linear(names: tuple[str, ...], path: str) -> list[tables.Entry]:
    entries = []
    for i, name in enumerate(names):
        part = (i, len(names)) if len(names) > 1 else None
        entries += [
            tables.Entry(f"{name}.weight", f"{path}.kernel", "linear", part=part),
            tables.Entry(f"{name}.bias", f"{path}.bias", part=part),
        ]
    return entries


def _norm(name: str, path: str) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.scale"),
        tables.Entry(f"{name}.bias", f"{path}.bias"),
    ]


def _extras(name: str, width: int, intermediate: int) -> list[tables.Extra]:
    """Returns the tensors of the published files that no latent depends on."""
    shapes = {}
    if name.startswith("dinov2"):
        shapes = {"embeddings.mask_token": (1, width)}
    elif name == "dinov3":
        shapes = {"embeddings.mask_token": (1, 1, width)}
    elif name == "siglip":
        shapes = {
            "head.probe": (1, 1, width),
            "head.attention.in_proj_weight": (3 * width, width),
            "head.attention.in_proj_bias": (3 * width,),
            "head.attention.out_proj.weight": (width, width),
            "head.attention.out_proj.bias": (width,),
            "head.layernorm.weight": (width,),
            "head.layernorm.bias": (width,),
            "head.mlp.fc1.weight": (intermediate, width),
            "head.mlp.fc1.bias": (intermediate,),
            "head.mlp.fc2.weight": (width, intermediate),
            "head.mlp.fc2.bias": (width,),
        }
    return [
        tables.Extra(key, partial(np.zeros, shape, np.float32))
        for key, shape in shapes.items()
    ]


# A tensor that every encoder of a kind has, and other spellings within that kind.
_ATTENTION = [
    (r"(layer\.\d+)\.attention\.q_proj\.", r"\1.attention.attention.query."),
    (r"(layer\.\d+)\.attention\.k_proj\.", r"\1.attention.attention.key."),
    (r"(layer\.\d+)\.attention\.v_proj\.", r"\1.attention.attention.value."),
    (r"(layer\.\d+)\.attention\.o_proj\.", r"\1.attention.output.dense."),
]
_SPELLINGS = {
    "embeddings.patch_embeddings.projection.weight": [
        # transformers 5; its MAE has no encoder module and other names in the MLP.
        (r"^layers\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
        (r"^layers\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
        (r"^layers\.", "encoder.layer."),
        *_ATTENTION,
        # Two halves of one tensor: `canonical` joins what gets the same name.
        (r"\.mlp\.(gate|up)_proj\.", ".mlp.weights_in."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    ],
    "embeddings.patch_embeddings.weight": [(r"^model\.layer\.", "layer.")],
    "embeddings.patch_embedding.weight": [],
    "patch_embed.proj.weight": [],
}
# Other networks and heads in published files, beside the encoder.
_BESIDE = ("decoder.", "text_model.", "logit_scale", "logit_bias", "classifier.")
_BESIDE += ("momentum_encoder.", "predictor.")
_PROJECTOR = r"head\.\d+\."  # Inside MoCo v3's encoders.


def canonical(source: sources.TensorSource) -> sources.TensorSource:
    """Returns an encoder's tensors under the names that `table` lists.

    Accepts the spellings of transformers 4 and 5 and any prefix of a wrapper. Text
    towers, decoders, classifiers, a momentum encoder and projectors that lie beside the
    encoder are left out.

    Raises:
        ValueError: There is no patch embedding of a known encoder.
    """
    prefix, spellings = _anchor(source)
    parts: dict[str, list[str]] = {}
    for old in sorted(source.shapes):
        name = old.removeprefix(prefix)
        if not old.startswith(prefix) and old.startswith(_BESIDE):
            continue
        if re.match(_PROJECTOR, name):
            continue
        for pattern, replacement in spellings:
            name = re.sub(pattern, replacement, name)
        parts.setdefault(name, []).append(old)
    if all(len(olds) == 1 for olds in parts.values()):
        return sources.renamed(source, {new: olds[0] for new, olds in parts.items()})

    def read(name: str) -> np.ndarray:
        return np.concatenate([source.read(old) for old in parts[name]])

    shapes = {}
    for new, olds in parts.items():
        rows = sum(source.shapes[old][0] for old in olds) if len(olds) > 1 else None
        first = source.shapes[olds[0]]
        shapes[new] = first if rows is None else (rows, *first[1:])
    dtypes = {new: source.dtypes[olds[0]] for new, olds in parts.items()}
    return sources.TensorSource(
        source.origin, shapes, dtypes, read, values=source.values
    )


def _anchor(source: sources.TensorSource) -> tuple[str, list[tuple[str, str]]]:
    """Returns the prefix of an encoder's names and its other spellings."""
    for anchor, spellings in _SPELLINGS.items():
        for name in source.shapes:
            if name.startswith(_BESIDE):
                continue
            if name == anchor or name.endswith(f".{anchor}"):
                return name.removesuffix(anchor), spellings
    raise ValueError(
        f"{source.origin} holds none of {', '.join(_SPELLINGS)}, so it is no encoder "
        f"of the families {', '.join(FAMILIES)}."
    )
