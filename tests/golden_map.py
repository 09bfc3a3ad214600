"""Reads the golden files and places official parameters in our parameter trees."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

FOLDER = Path(__file__).parent / "golden"

# Official name -> ours, applied in order; weights are named by rank afterwards.
RENAMES = [
    (r"^decoder_layers\.(\d+)\.", r"blocks.\1."),
    (r"^decoder_", ""),
    (r"^trainable_cls_token$", "cls_token"),
    (r"attention\.attention\.(query|key|value)\.", r"attn.qkv.\1."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"norm_final\.", "norm."),
    (r"adaLN_modulation\.1\.", "modulation."),
    (r"(t_embedder|timestep)\.mlp\.0\.", r"\1.fc1."),
    (r"(t_embedder|timestep)\.mlp\.2\.", r"\1.fc2."),
    (r"embedding_table\.weight$", "table"),
]
IGNORED = re.compile(r"freqs_(cos|sin)$")  # Rotary tables, which we compute.


def read(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of tests/golden/NAME.npz by key."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def under(arrays: dict, prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose key starts with `prefix`, without it."""
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def config(arrays: dict, key: str) -> dict:
    """Returns the constructor arguments stored as JSON under `key`."""
    return json.loads(str(arrays[key]))


def last(x: np.ndarray) -> jax.Array:
    """Moves channels of (b, c, h, w) last."""
    return jnp.asarray(np.moveaxis(x, 1, -1))


def place(key: str, value: np.ndarray, trunk_depth: int | None):
    """Returns our path, the index into the array there, and the value to expect.

    Blocks from `trunk_depth` on belong to DiT-DH's head.
    """
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    index = ()
    if match := re.match(r"blocks\.(\d+)\.", key):
        layer, stack = int(match[1]), "blocks"
        if trunk_depth is not None and layer >= trunk_depth:
            layer, stack = layer - trunk_depth, "head_blocks"
        key, index = f"{stack}.block.{key[match.end() :]}", (layer,)
    if key.endswith("weight"):
        key = key.removesuffix("weight") + ("scale" if value.ndim == 1 else "kernel")
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    elif value.ndim == 2 and key.endswith("kernel"):
        value = value.T
    if match := re.search(r"\.(query|key|value)", key):
        part = ["query", "key", "value"].index(match[1])
        width = value.shape[-1]
        index += (..., slice(part * width, (part + 1) * width))
        key = key.replace(match[0], "")
    return tuple(key.split(".")), index, value


def get(tree: dict, path: tuple[str, ...]):
    """Returns the leaf of a nested dict."""
    for name in path:
        tree = tree[name]
    return tree


def load(model: nnx.Module, official: dict, trunk_depth: int | None = None):
    """Returns the model with official parameters; every entry must be filled."""
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda p: np.full(p.shape, np.nan, np.float32), params)
    for key, value in official.items():
        if IGNORED.search(key):
            continue
        path, index, value = place(key, value, trunk_depth)
        target = get(params, path)
        assert target[index].shape == value.shape, (key, path)
        target[index] = value
    for path, leaf in jax.tree.leaves_with_path(params):
        assert not np.isnan(leaf).any(), f"{jax.tree_util.keystr(path)} not filled"
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
