"""Names of the official diffusion transformers, DiT-DH and LightningDiT.

Entries are in the order of the official `parameters()`, which numbers the optimiser's
state. Rotary tables are buffers there; here they are computed.
"""

import math
import re
from typing import Any

from rae_jax.convert import tables
from rae_jax.layers import mlp, positions

Shapes = tables.Shapes
Arguments = dict[str, Any]
_HEAD_DEPTH = 2
_EARLY, _ALIGN = "base_final_layer", "repa_projector"


def dit_dh_table(
    *,
    input_size: int,
    in_channels: int,
    hidden_size: tuple[int, int],
    depth: tuple[int, int],
    num_heads: tuple[int, int],
    patch_size: int = 1,
    early_depth: int = 0,
    align_depth: int = 0,
    qk_norm: bool = False,
    use_swiglu: bool = True,
    use_rmsnorm: bool = True,
    use_rope: bool = True,
    use_pos_embed: bool = True,
    **_: Any,
) -> tables.Table:
    """Returns the names of a DiT-DH ("DiTwDDTHead") from its constructor arguments.

    The official list of blocks holds the trunk's, then the head's.
    """
    (trunk, head), (trunk_depth, head_depth) = hidden_size, depth
    entries = [tables.Entry("pos_embed", "pos_embed")] if use_pos_embed else []
    patch = (in_channels, patch_size, patch_size)
    entries += _patch_embed("x_embedder", (head, *patch))
    entries += _patch_embed("s_embedder", (trunk, *patch))
    if trunk != head:
        entries += _linear("s_projector", "s_projector")
    entries += [*_embedders(), *_final_layer(use_rmsnorm)]
    flags = (qk_norm, use_swiglu, use_rmsnorm)
    for layer in range(trunk_depth):
        entries += _block(layer, "blocks.block", layer, *flags)
    for layer in range(head_depth):
        entries += _block(trunk_depth + layer, "head_blocks.block", layer, *flags)
    entries += _readers(use_rmsnorm, early_depth, align_depth)
    extras, grid = [], input_size // patch_size
    if use_rope:
        extras += _rotary("enc_feat_rope", trunk // num_heads[0], grid)
        extras += _rotary("dec_feat_rope", head // num_heads[1], grid)
    return tables.Table(tuple(entries), tuple(extras))


def dit_table(
    *,
    input_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    patch_size: int = 1,
    early_depth: int = 0,
    align_depth: int = 0,
    qk_norm: bool = False,
    use_swiglu: bool = True,
    use_rmsnorm: bool = True,
    use_rope: bool = True,
    use_pos_embed: bool = True,
    **_: Any,
) -> tables.Table:
    """Returns the names of a LightningDiT from its constructor arguments."""
    p = patch_size
    entries = [tables.Entry("pos_embed", "pos_embed")] if use_pos_embed else []
    entries += _patch_embed("x_embedder", (hidden_size, in_channels, p, p))
    entries += _embedders()
    for layer in range(depth):
        flags = (qk_norm, use_swiglu, use_rmsnorm)
        entries += _block(layer, "blocks.block", layer, *flags)
    entries += _final_layer(use_rmsnorm)
    entries += _readers(use_rmsnorm, early_depth, align_depth)
    extras = []
    if use_rope:
        extras = _rotary("feat_rope", hidden_size // num_heads, input_size // p)
    return tables.Table(tuple(entries), tuple(extras))


def dit_dh_sizes(shapes: Shapes, **known: Any) -> Arguments:
    """Deduces the constructor arguments of a DiT-DH from the shapes of its tensors.

    Args:
        shapes: Shape by official name.
        **known: Arguments to take as they are. Needed are `num_heads` where the file
            has no rotary tables, and `depth` where trunk and head are equally wide and
            the head is not two blocks deep.

    Raises:
        ValueError: The tensors are not those of a DiT-DH, or do not tell all.
    """
    embed = _shape(shapes, "s_embedder.proj.weight", "DiT-DH")
    trunk, in_channels, patch_size = embed[:3]
    head = _shape(shapes, "x_embedder.proj.weight", "DiT-DH")[0]
    found = dict(known) | {"in_channels": in_channels, "hidden_size": (trunk, head)}
    found["patch_size"] = patch_size
    if "depth" not in known:
        found["depth"] = _depths(shapes, trunk, head)
    if "num_heads" not in known:
        dims = [
            _rotary_dim(shapes, f"{k}_feat_rope", "num_heads") for k in ("enc", "dec")
        ]
        found["num_heads"] = (trunk // dims[0], head // dims[1])
    if "input_size" not in known:
        found["input_size"] = patch_size * _grid(shapes, "enc_feat_rope")
    found.setdefault("use_rope", True)
    return found | _common(shapes, (trunk, head), (0, found["depth"][0]), known) | known


def dit_sizes(shapes: Shapes, **known: Any) -> Arguments:
    """Deduces the constructor arguments of a LightningDiT, like `dit_dh_sizes`.

    A file without rotary tables is that of a network without them, and does not tell
    `num_heads`.
    """
    embed = _shape(shapes, "x_embedder.proj.weight", "DiT")
    hidden_size, in_channels, patch_size = embed[:3]
    found = dict(known) | {"in_channels": in_channels, "hidden_size": hidden_size}
    found |= {"patch_size": patch_size, "depth": len(_block_widths(shapes))}
    found.setdefault("use_rope", "feat_rope.freqs_cos" in shapes)
    if "num_heads" not in known:
        head_dim = _rotary_dim(shapes, "feat_rope", "num_heads")
        found["num_heads"] = hidden_size // head_dim
    if "input_size" not in known:
        found["input_size"] = patch_size * _grid(shapes, "feat_rope")
    outputs = _shape(shapes, "final_layer.linear.weight", "DiT")[0]
    found["learn_sigma"] = outputs == 2 * patch_size**2 * in_channels
    return found | _common(shapes, (hidden_size,), (0,), known) | known


def _patch_embed(name: str, shape: tables.Shape) -> list[tables.Entry]:
    weight, bias = _linear(f"{name}.proj", f"{name}.proj")
    return [weight._replace(form="patch", shape=shape), bias]


def _linear(name: str, path: str, layer: int | None = None) -> list[tables.Entry]:
    return [
        tables.Entry(f"{name}.weight", f"{path}.kernel", "linear", layer),
        tables.Entry(f"{name}.bias", f"{path}.bias", "same", layer),
    ]


def _embedders() -> list[tables.Entry]:
    return [
        tables.Entry("t_embedder.W", "t_embedder.W"),
        *_linear("t_embedder.mlp.0", "t_embedder.fc1"),
        *_linear("t_embedder.mlp.2", "t_embedder.fc2"),
        tables.Entry("y_embedder.embedding_table.weight", "y_embedder.table"),
    ]


def _final_layer(
    use_rmsnorm: bool, name: str = "final_layer", path: str = "final_layer"
) -> list[tables.Entry]:
    norm = tables.Entry(f"{name}.norm_final.weight", f"{path}.norm.scale")
    return [
        *([norm] if use_rmsnorm else []),
        *_linear(f"{name}.linear", f"{path}.linear"),
        *_linear(f"{name}.adaLN_modulation.1", f"{path}.modulation"),
    ]


def _readers(
    use_rmsnorm: bool, early_depth: int, align_depth: int
) -> list[tables.Entry]:
    """Returns the entries of what reads the trunk half-way.

    The official code has none; these names are those of RAEv2 and of REPA.
    """
    entries = []
    if early_depth:
        entries += _final_layer(use_rmsnorm, _EARLY, "early_layer")
    if align_depth:
        for layer, path in enumerate(("fc1", "fc2", "fc3")):
            entries += _linear(f"{_ALIGN}.{2 * layer}", f"projection.{path}")
    return entries


def _block(
    number: int, path: str, layer: int, qk_norm: bool, use_swiglu: bool, affine: bool
) -> list[tables.Entry]:
    """Returns the entries of official block `number`, our `layer` of a stack."""

    def scales(*names: str) -> list[tables.Entry]:
        start = f"blocks.{number}."
        return [
            tables.Entry(f"{start}{n}.weight", f"{path}.{n}.scale", "same", layer)
            for n in names
        ]

    def linears(**names: str) -> list[tables.Entry]:
        return [
            entry
            for ours, name in names.items()
            for entry in _linear(
                f"blocks.{number}.{name}", f"{path}.{ours.replace('_', '.')}", layer
            )
        ]

    inner = ("w12", "w3") if use_swiglu else ("fc1", "fc2")
    return [
        *(scales("norm1", "norm2") if affine else []),
        *linears(attn_qkv="attn.qkv"),
        *(scales("attn.q_norm", "attn.k_norm") if qk_norm else []),
        *linears(attn_proj="attn.proj"),
        *linears(**{f"mlp_{n}": f"mlp.{n}" for n in inner}),
        *linears(modulation="adaLN_modulation.1"),
    ]


def _rotary(name: str, head_dim: int, grid: int) -> list[tables.Extra]:
    """Returns the buffers (grid^2, head_dim) of cosines and sines."""
    return [
        tables.Extra(
            f"{name}.freqs_{kind}",
            make=lambda index=index: positions.rotary_2d(head_dim, grid)[index],
            check=True,
        )
        for index, kind in enumerate(("cos", "sin"))
    ]


def _shape(shapes: Shapes, name: str, kind: str) -> tables.Shape:
    if name not in shapes:
        raise ValueError(f"These are not the weights of a {kind}: {name!r} is missing.")
    return tuple(shapes[name])


def _block_widths(shapes: Shapes) -> list[int]:
    """Returns the widths of the blocks in their order."""
    numbers = [re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", n) for n in shapes]
    count = len([match for match in numbers if match])
    names = [f"blocks.{i}.attn.qkv.weight" for i in range(count)]
    return [_shape(shapes, name, "diffusion transformer")[1] for name in names]


def _depths(shapes: Shapes, trunk: int, head: int) -> tuple[int, int]:
    widths = _block_widths(shapes)
    head_depth = widths.count(head) if trunk != head else _HEAD_DEPTH
    if trunk == head and len(widths) <= head_depth:
        raise ValueError(
            f"Trunk and head are both {trunk} wide, so the file does not tell which of "
            f"its {len(widths)} blocks belong to the head. Give depth=(trunk, head)."
        )
    return len(widths) - head_depth, head_depth


def _rotary_dim(shapes: Shapes, name: str, argument: str) -> int:
    if f"{name}.freqs_cos" not in shapes:
        raise ValueError(
            f"The file has no {name}.freqs_cos, so {argument} cannot be told from it. "
            f"Give {argument}=..."
        )
    return shapes[f"{name}.freqs_cos"][1]


def _grid(shapes: Shapes, rotary: str) -> int:
    """Returns the tokens per side, from a position table or a rotary one."""
    if "pos_embed" in shapes:
        return math.isqrt(shapes["pos_embed"][1])
    if f"{rotary}.freqs_cos" in shapes:
        return math.isqrt(shapes[f"{rotary}.freqs_cos"][0])
    raise ValueError("The file has no position table. Give input_size=...")


def _common(
    shapes: Shapes, widths: tuple[int, ...], blocks: tuple[int, ...], known: Arguments
) -> Arguments:
    """Returns the arguments that both networks have.

    Args:
        shapes: Shape by official name.
        widths: Widths of trunk and head, or of the only stack.
        blocks: Numbers of a block of each.
        known: Arguments to take as they are.
    """
    for name, argument in ((_EARLY, "early_depth"), (_ALIGN, "align_depth")):
        if argument not in known and any(key.startswith(f"{name}.") for key in shapes):
            raise ValueError(
                f"The file has a {name}, but does not tell after how many blocks. "
                f"Give {argument}=..."
            )
    labels = _shape(shapes, "y_embedder.embedding_table.weight", "DiT")[0]
    use_swiglu = "blocks.0.mlp.w12.weight" in shapes
    found = {
        "num_classes": labels - 1,
        "use_swiglu": use_swiglu,
        "use_rmsnorm": "blocks.0.norm1.weight" in shapes,
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "use_pos_embed": "pos_embed" in shapes,
    }
    if f"{_ALIGN}.4.weight" in shapes:
        found["align_dim"] = shapes[f"{_ALIGN}.4.weight"][0]
    if "mlp_ratio" not in known:
        name = "blocks.{}.mlp.w3.weight" if use_swiglu else "blocks.{}.mlp.fc2.weight"
        inner = [_shape(shapes, name.format(i), "DiT")[1] for i in blocks]
        found["mlp_ratio"] = _mlp_ratio(widths, inner, use_swiglu)
    return found


def _mlp_ratio(widths: tuple[int, ...], inner: list[int], use_swiglu: bool) -> float:
    """Returns the roundest ratio that leads to these inner widths."""

    def leads(ratio: float) -> list[int]:
        if use_swiglu:
            return [mlp.swiglu_width(width, ratio) for width in widths]
        return [int(width * ratio) for width in widths]

    largest = widths.index(max(widths))
    guess = inner[largest] / widths[largest] * (1.5 if use_swiglu else 1)
    steps = (1, 2, 4, 8, 10, 100, 1000, widths[largest])
    for ratio in (math.ceil(guess * step - 1e-6) / step for step in steps):
        if leads(ratio) == inner:
            return float(ratio)
    raise ValueError(
        f"No mlp_ratio leads from widths {widths} to {tuple(inner)}. Give mlp_ratio=..."
    )
