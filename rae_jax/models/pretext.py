"""The ViT encoder as MAE and MoCo v3 train it: Xavier weights, fixed positions."""

import math
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rae_jax.layers import positions
from rae_jax.models import vit_encoder


def make_encoder(
    family: str,
    *,
    rngs: nnx.Rngs,
    cls_std: float,
    rows_first: bool = False,
    qkv_parts: int = 1,
    **sizes: Any,
) -> vit_encoder.ViTEncoder:
    """Returns a new encoder with a sine-cosine table and its last norm in full.

    Args:
        family: Key of `encoder_names.FAMILIES`, one with a class token.
        rngs: Randomness of the initial values.
        cls_std: Standard deviation of the class token.
        rows_first: Whether the first half of a position encodes the row, not the
            column.
        qkv_parts: See `draw_xavier`.
        **sizes: Of the encoder.
    """
    encoder = vit_encoder.ViTEncoder(family, normalize=False, rngs=rngs, **sizes)
    draw_xavier(encoder, rngs, qkv_parts=qkv_parts)
    shape = encoder.cls_token[...].shape
    encoder.cls_token[...] = cls_std * jax.random.normal(rngs.params(), shape)
    grid = encoder.input_size // encoder.patch_size
    encoder.pos_embed[...] = table(encoder.hidden_size, grid, rows_first=rows_first)
    return encoder


def table(hidden_size: int, grid: int, *, rows_first: bool = False) -> jax.Array:
    """Returns sine-cosine positions (1, 1 + grid^2, d), zero for the class token.

    Args:
        hidden_size: Token width d.
        grid: Patches per side.
        rows_first: The order of MoCo v3's official code; MAE's begins with columns.
    """
    found = positions.sincos_2d(hidden_size, grid)
    if rows_first:
        square = found.reshape(grid, grid, hidden_size)
        found = square.swapaxes(0, 1).reshape(grid**2, hidden_size)
    return jnp.asarray(np.pad(found, ((1, 0), (0, 0))))[None]


def draw_xavier(model: nnx.Module, rngs: nnx.Rngs, *, qkv_parts: int = 1) -> None:
    """Draws all kernels Xavier-uniform, stacked ones each for itself; biases are 0.

    Args:
        model: Changed in place.
        rngs: Randomness.
        qkv_parts: Into how many maps the fused one to queries, keys and values counts:
            1 in MAE's official code, 3 in MoCo v3's.
    """
    flat = flax.traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    for path in list(flat):
        if path[-1] != "kernel":
            continue
        *_, fan_in, fan_out = flat[path].shape
        fan_out = fan_out // qkv_parts if "qkv" in path else fan_out
        bound = math.sqrt(6 / (fan_in + fan_out))
        flat[path] = jax.random.uniform(
            rngs.params(), flat[path].shape, minval=-bound, maxval=bound
        )
        bias = (*path[:-1], "bias")
        if bias in flat:
            flat[bias] = jnp.zeros_like(flat[bias])
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, flax.traverse_util.unflatten_dict(flat))
    nnx.update(model, state)


def fixed_positions(encoder: vit_encoder.ViTEncoder) -> jax.Array:
    """Returns the position table (1, 1 + n, d), which receives no gradient."""
    return jax.lax.stop_gradient(encoder.pos_embed[...])


def encode(encoder: vit_encoder.ViTEncoder, tokens: jax.Array) -> jax.Array:
    """Runs the blocks on patch tokens, with the class token before them.

    Args:
        encoder: From `make_encoder`.
        tokens: Embedded patches with their positions (b, k, d), any choice of them.

    Returns:
        Tokens (b, 1 + k, d) float32 after the last norm.
    """
    cls_token = encoder.cls_token[...] + fixed_positions(encoder)[:, :1]
    cls_token = jnp.broadcast_to(cls_token, (len(tokens), 1, tokens.shape[-1]))
    x = jnp.concatenate([cls_token, tokens], axis=1)
    return encoder.norm(encoder.blocks(x))
