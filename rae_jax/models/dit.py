"""DiT in the form of LightningDiT, and the blocks it shares with DiT-DH.

The baseline of RAE (arXiv:2510.11690): DiT (arXiv:2212.09748) with RMSNorm, SwiGLU
and rotary positions (arXiv:2501.01423).
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.convert import dit_names, sources, tables
from rae_jax.layers import (
    attention,
    conditioning,
    linear,
    mlp,
    norm,
    patches,
    positions,
    stack,
)
from rae_jax.models import pretrained, writers

# From XXL on, the sizes of RAE's scaling study.
PRESETS = {
    "s": dict(hidden_size=384, depth=12, num_heads=6),
    "b": dict(hidden_size=768, depth=12, num_heads=12),
    "l": dict(hidden_size=1024, depth=24, num_heads=16),
    "xl": dict(hidden_size=1152, depth=28, num_heads=16),
    "xxl": dict(hidden_size=1280, depth=32, num_heads=16),
    "h": dict(hidden_size=1536, depth=32, num_heads=16),
    "g": dict(hidden_size=2048, depth=40, num_heads=16),
    "t": dict(hidden_size=2688, depth=40, num_heads=21),
}


class DiTBlock(nnx.Module):
    """Pre-norm transformer block, shifted, scaled and gated by a condition.

    The modulation starts at zero, so a new block is the identity. Tokens, norms and
    the arithmetic of the modulation are float32; products are in `dtype`.

    Args:
        hidden_size: Token width.
        num_heads: Attention heads.
        mlp_ratio: Inner width of a plain MLP over `hidden_size`.
        cond_size: Width of the condition; `hidden_size` when None.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        use_swiglu: SwiGLU, or an MLP with tanh-GELU.
        use_rmsnorm: RMSNorm with a weight, or LayerNorm without affine.
        dtype: Type of the products.
        init: Of attention and MLP, see `linear.linear`.
        rngs: Randomness of the initial values.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        cond_size: int | None = None,
        qk_norm: bool = False,
        use_swiglu: bool = True,
        use_rmsnorm: bool = True,
        dtype: DTypeLike = "float32",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        self.norm1 = make_norm(hidden_size, use_rmsnorm, rngs)
        self.attn = attention.Attention(
            hidden_size, num_heads, qk_norm=qk_norm, dtype=dtype, init=init, rngs=rngs
        )
        self.norm2 = make_norm(hidden_size, use_rmsnorm, rngs)
        if use_swiglu:
            width = mlp.swiglu_width(hidden_size, mlp_ratio)
            make_mlp = partial(mlp.SwiGLU, hidden_size, width)
        else:
            width = int(hidden_size * mlp_ratio)
            make_mlp = partial(mlp.MLP, hidden_size, width, activation="gelu_tanh")
        self.mlp = make_mlp(dtype=dtype, init=init, rngs=rngs)
        self.modulation = linear.linear(
            cond_size or hidden_size,
            6 * hidden_size,
            dtype=dtype,
            init="zeros",
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, c: jax.Array, rotary: attention.Rotary | None = None
    ) -> jax.Array:
        """Maps tokens (b, n, d) to tokens (b, n, d), both float32.

        Args:
            x: Tokens.
            c: Conditions, per sample (b, cond_size) or per token (b, n, cond_size).
            rotary: See `attention.Attention`.
        """
        modulation = self.modulation(jax.nn.silu(c)).astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, -1)
        h = self.attn(norm.modulate(self.norm1(x), shift1, scale1), rotary)
        x = x + norm.per_token(gate1) * h.astype(jnp.float32)
        h = self.mlp(norm.modulate(self.norm2(x), shift2, scale2))
        return x + norm.per_token(gate2) * h.astype(jnp.float32)


class FinalLayer(nnx.Module):
    """Modulated norm and linear map to the output; zero at initialisation."""

    def __init__(
        self,
        hidden_size: int,
        out_size: int,
        *,
        cond_size: int | None = None,
        use_rmsnorm: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.norm = make_norm(hidden_size, use_rmsnorm, rngs)
        self.modulation = linear.linear(
            cond_size or hidden_size,
            2 * hidden_size,
            dtype=dtype,
            init="zeros",
            rngs=rngs,
        )
        self.linear = linear.linear(
            hidden_size, out_size, dtype=dtype, init="zeros", rngs=rngs
        )

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Maps tokens (b, n, d) to (b, n, out_size) float32.

        The conditions c are (b, cond_size) or (b, n, cond_size).
        """
        modulation = self.modulation(jax.nn.silu(c)).astype(jnp.float32)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x = norm.modulate(self.norm(x), shift, scale)
        return self.linear(x).astype(jnp.float32)


class DiT(pretrained.Pretrained, nnx.Module):
    """Predicts the velocity of latents from their noised form, time and class.

    Initialised as in the official code; the output of a new network is zero.
    `from_pretrained` also reads official LightningDiT weights.

    Args:
        input_size: Height and width of the latents.
        in_channels: Channels of the latents.
        hidden_size: Token width.
        depth: Number of blocks.
        num_heads: Attention heads.
        patch_size: Latent entries per token and side.
        num_classes: Number of classes; this index itself means "no class".
        class_dropout_prob: Share of labels for the training loss to drop.
        learn_sigma: Whether as many outputs again are predicted and dropped.
        use_rmsnorm: See `DiTBlock`.
        use_rope: Whether attention rotates queries and keys.
        use_pos_embed: Whether a sine-cosine table is added to the tokens.
        trainable_tables: Whether that table and the time frequencies receive
            gradients, as they did in the official training.
        dtype: Type of the products; parameters, tokens and norms are float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.
        **block: `mlp_ratio`, `qk_norm` and `use_swiglu` of `DiTBlock`.

    Raises:
        ValueError: If `input_size` is not a multiple of `patch_size`.
    """

    layouts = (pretrained.OWN_LAYOUT, "official")

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        *,
        patch_size: int = 1,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        use_rmsnorm: bool = True,
        use_rope: bool = True,
        use_pos_embed: bool = True,
        trainable_tables: bool = False,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.use_rope, self.trainable_tables = use_rope, trainable_tables
        self.in_channels, self.patch_size = in_channels, patch_size
        self.grid = _grid(input_size, patch_size)
        d, common = hidden_size, dict(dtype=dtype, rngs=rngs)
        self.x_embedder = patches.PatchEmbed(
            patch_size, in_channels, d, init="xavier", **common
        )
        self.pos_embed = make_pos_embed(use_pos_embed, d, self.grid)
        self.t_embedder = conditioning.FourierTimeEmbedding(
            d, init="normal", trainable_tables=trainable_tables, **common
        )
        self.y_embedder = conditioning.LabelEmbedding(num_classes, d, rngs=rngs)
        block |= dict(use_rmsnorm=use_rmsnorm, dtype=dtype, init="xavier")
        make_block = partial(DiTBlock, d, num_heads, **block)
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        out_size = patch_size**2 * in_channels * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(d, out_size, use_rmsnorm=use_rmsnorm, **common)

    def __call__(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the velocity (b, h, w, c) float32.

        Args:
            x_t: Noised latents (b, h, w, c).
            t: Times (b,) in [0, 1], shifted.
            y: Labels (b,) in [0, num_classes].
        """
        x = self.x_embedder(x_t).astype(jnp.float32)
        x = add_table(x, self.pos_embed, self.trainable_tables)
        c = self.t_embedder(t).astype(jnp.float32) + self.y_embedder(y)
        rotary = make_rotary(self.use_rope, self.blocks, self.grid)
        x = self.final_layer(self.blocks(x, c, rotary), c)
        return patches.unpatchify(x, self.patch_size)[..., : self.in_channels]

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        source = sources.open_tensors(path, part)
        arguments = dit_names.dit_sizes(source.shapes, **overrides)
        return pretrained.Weights(arguments, dit_names.dit_table(**arguments), source)

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        return writers.Export(dit_names.dit_table(**arguments), "model.pt")


def make_norm(hidden_size: int, use_rmsnorm: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Creates RMSNorm with a weight, or LayerNorm without affine; eps is 1e-6."""
    if use_rmsnorm:
        return norm.RMSNorm(hidden_size, rngs=rngs)
    return norm.LayerNorm(hidden_size, affine=False, rngs=rngs)


def make_pos_embed(use: bool, hidden_size: int, grid: int) -> nnx.Param | None:
    """Creates the sine-cosine table (1, grid^2, d) as a parameter, or nothing."""
    if not use:
        return None
    return nnx.Param(jnp.asarray(positions.sincos_2d(hidden_size, grid))[None])


def make_rotary(use: bool, blocks: stack.Stack, grid: int) -> attention.Rotary | None:
    """Returns the rotary tables of a stack of `DiTBlock`, or nothing."""
    return positions.rotary_2d(blocks.block.attn.head_dim, grid) if use else None


def add_table(x: jax.Array, table: nnx.Param | None, trainable: bool) -> jax.Array:
    """Adds a position table, if there is one, to tokens (b, n, d)."""
    if table is None:
        return x
    return x + (table[...] if trainable else jax.lax.stop_gradient(table[...]))


def _grid(input_size: int, patch_size: int) -> int:
    if input_size % patch_size:
        raise ValueError(
            f"input_size {input_size} is not a multiple of patch_size {patch_size}."
        )
    return input_size // patch_size
