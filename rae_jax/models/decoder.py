"""RAE's decoder: a ViT from encoder tokens to pixels (arXiv:2510.11690)."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.convert import rae_names, sources, tables
from rae_jax.layers import linear, norm, patches, positions, resize, stack
from rae_jax.models import pretrained, vit, writers

PRESETS = {
    "b": dict(hidden_size=768, depth=12, num_heads=12, intermediate_size=3072),
    "l": dict(hidden_size=1024, depth=24, num_heads=16, intermediate_size=4096),
    "xl": dict(hidden_size=1152, depth=28, num_heads=16, intermediate_size=4096),
}


class RAEDecoder(pretrained.Pretrained, nnx.Module):
    """The decoder half of a ViT-MAE with a trainable class token.

    Initialised as in the official code. `from_pretrained` also reads official
    decoders and the decoder of an official stage-1 checkpoint; `num_heads` has to be
    given unless width and depth are those of a preset.

    Args:
        in_channels: Width of the encoder's tokens.
        num_patches: Tokens per image, a square number.
        patch_size: Pixels per token and side.
        hidden_size: Token width.
        depth: Number of blocks.
        num_heads: Attention heads.
        intermediate_size: Inner width of the MLPs.
        layer_norm_eps: Added to the variance in all norms.
        trainable_pos_embed: Whether the position table receives gradients, as it
            did in the official training, though meant to be fixed.
        dtype: Type of the products; parameters, tokens and norms are float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.

    Raises:
        ValueError: If `num_patches` is not a square number.
    """

    layouts = (pretrained.OWN_LAYOUT, "official")

    def __init__(
        self,
        in_channels: int,
        num_patches: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        intermediate_size: int,
        *,
        layer_norm_eps: float = 1e-12,
        trainable_pos_embed: bool = True,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        self.grid = _grid(num_patches, "num_patches")
        self.patch_size = patch_size
        self.trainable_pos_embed = trainable_pos_embed
        self.embed = linear.linear(in_channels, hidden_size, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden_size)))
        self.pos_embed = nnx.Param(_pos_table(hidden_size, self.grid))
        make_block = partial(
            vit.ViTBlock,
            hidden_size,
            num_heads,
            intermediate_size,
            layer_norm_eps=layer_norm_eps,
            dtype=dtype,
        )
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        self.norm = norm.LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)
        self.pred = linear.linear(
            hidden_size, 3 * patch_size**2, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (b, n, c) to pixels (b, H, W, 3) float32.

        Pixels are in the encoder's normalised space: multiply by its standard
        deviation and add its mean. Another square number of tokens than
        `num_patches` is resized bilinearly after the embedding.

        Raises:
            ValueError: If the number of tokens is not a square number.
        """
        return self.pixels(self.features(tokens))

    def features(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (b, n, c) to what the last layer reads, (b, n, d) float32."""
        x = self._resize(self.embed(tokens).astype(jnp.float32))
        cls_token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1]))
        pos_embed = self.pos_embed[...]
        if not self.trainable_pos_embed:
            pos_embed = jax.lax.stop_gradient(pos_embed)
        x = jnp.concatenate([cls_token, x], axis=1) + pos_embed
        return self.norm(self.blocks(x)[:, 1:])

    def pixels(self, features: jax.Array) -> jax.Array:
        """Maps features (b, n, d) to pixels (b, H, W, 3) float32 by the last layer."""
        x = self.pred(features)
        return patches.unpatchify(x.astype(jnp.float32), self.patch_size)

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        source = sources.open_tensors(path, part)
        if any(name.startswith("decoder.") for name in source.shapes):
            source = sources.under(source, "decoder.")
        arguments = rae_names.decoder_sizes(source.shapes, **overrides)
        return pretrained.Weights(
            arguments, rae_names.decoder_table(**arguments), source
        )

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        return writers.Export(rae_names.decoder_table(**arguments), "model.pt")

    def _resize(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        grid = _grid(n, "the number of tokens")
        x = resize.resize_bilinear(x.reshape(b, grid, grid, d), self.grid, self.grid)
        return x.reshape(b, self.grid**2, d)


def _pos_table(hidden_size: int, grid: int) -> jax.Array:
    """Sine-cosine table (1, 1 + grid^2, d), zero for the class token."""
    table = positions.sincos_2d(hidden_size, grid)
    return jnp.asarray(np.pad(table, ((1, 0), (0, 0))))[None]


def _grid(num_tokens: int, name: str) -> int:
    grid = math.isqrt(num_tokens)
    if grid**2 != num_tokens:
        raise ValueError(f"{name} must be a square number, got {num_tokens}.")
    return grid
