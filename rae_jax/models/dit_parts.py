"""What the diffusion transformers share: blocks, output layer, readings on the way."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax import config as configs
from rae_jax.diffusion import paths
from rae_jax.layers import attention, linear, mlp, norm, patches, positions, stack

PREDICTIONS = ("v", "x")
ALIGN_WIDTH = 2048  # Of the projection of REPA (arXiv:2410.06940).


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
        modulation = self.modulation(jax.nn.silu(c))
        if modulation.ndim == 3:
            # Or the compiler would keep the sum before it was rounded, twice the size.
            modulation = jax.lax.optimization_barrier(modulation)
        parts = jnp.split(modulation, 6, -1)
        parts = [part.astype(jnp.float32) for part in parts]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        dtype = self.attn.qkv.dtype
        h = norm.modulate(self.norm1(x), shift1, scale1, dtype)
        h = self.attn(h, rotary)
        x = x + norm.per_token(gate1) * h.astype(jnp.float32)
        h = self.mlp(norm.modulate(self.norm2(x), shift2, scale2, dtype))
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


class Projection(nnx.Module):
    """Three linear maps with SiLU between them, the projection of REPA.

    arXiv:2410.06940; products in `dtype`, the result (b, n, out_size) in float32.
    """

    def __init__(
        self, hidden_size: int, out_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        make = partial(linear.linear, dtype=dtype, init="xavier", rngs=rngs)
        self.fc1 = make(hidden_size, ALIGN_WIDTH)
        self.fc2 = make(ALIGN_WIDTH, ALIGN_WIDTH)
        self.fc3 = make(ALIGN_WIDTH, out_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(self.fc2(jax.nn.silu(self.fc1(x))))
        return self.fc3(x).astype(jnp.float32)


class Transformer(nnx.Module):
    """What a network may predict, and what may read its trunk half-way.

    A subclass has `blocks`, `in_channels` and `patch_size`, and a method `outputs`
    that returns `velocities.Outputs`.

    An early head predicts from the tokens after `early_depth` blocks, the weaker
    model of internal guidance (RAEv2, arXiv:2605.18324); a projection of those after
    `align_depth` blocks is compared with an encoder's features (REPA,
    arXiv:2410.06940).
    """

    def make_readers(
        self,
        hidden_size: int,
        depth: int,
        *,
        prediction: str,
        early_depth: int,
        align_depth: int,
        align_dim: int,
        use_rmsnorm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets the attributes that the methods below use.

        Raises:
            ValueError: For another prediction, or a depth that the trunk lacks.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(configs.suggest(prediction, PREDICTIONS, "prediction"))
        for name, at in (("early_depth", early_depth), ("align_depth", align_depth)):
            if not 0 <= at < depth:
                raise ValueError(f"{name} must be 0 (off) to {depth - 1}, not {at}.")
        if align_depth and align_dim < 1:
            raise ValueError(f"align_depth {align_depth} needs align_dim, the width.")
        self.prediction = prediction
        self.early_depth, self.align_depth = early_depth, align_depth
        common = dict(dtype=dtype, rngs=rngs)
        out_size = self.patch_size**2 * self.in_channels
        make_head = partial(FinalLayer, use_rmsnorm=use_rmsnorm, **common)
        self.early_layer = make_head(hidden_size, out_size) if early_depth else None
        make_projection = partial(Projection, hidden_size, align_dim, **common)
        self.projection = make_projection() if align_depth else None

    def run_blocks(
        self, x: jax.Array, c: jax.Array, rotary: attention.Rotary | None
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Runs the trunk; returns its tokens and, by depth, those that are read."""
        start, found = 0, {}
        for stop in sorted({self.early_depth, self.align_depth} - {0}):
            x = self.blocks(x, c, rotary, start=start, stop=stop)
            found[stop], start = x, stop
        return self.blocks(x, c, rotary, start=start), found

    def read_early(self, found: dict[int, jax.Array], c: jax.Array) -> jax.Array | None:
        """Returns what the early head predicts (b, h, w, c), not yet a velocity."""
        if self.early_layer is None:
            return None
        tokens = self.early_layer(found[self.early_depth], c)
        return patches.unpatchify(tokens, self.patch_size)

    def read_aligned(self, found: dict[int, jax.Array]) -> jax.Array | None:
        """Returns the projected tokens (b, n, align_dim), if they are compared."""
        if self.projection is None:
            return None
        return self.projection(found[self.align_depth])

    def velocity(self, out: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Turns what the network predicts (b, h, w, c) at x_t and t (b,) to velocity.

        A prediction of x is divided by t, at least by `paths.MIN_TIME_OF_X`.
        """
        if self.prediction == "v":
            return out
        return paths.v_from_x(out, x_t, t, paths.MIN_TIME_OF_X)

    def __call__(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the velocity (b, h, w, c) float32.

        Args:
            x_t: Noised latents (b, h, w, c).
            t: Times (b,) in [0, 1], shifted.
            y: Labels (b,) in [0, num_classes].
        """
        return self.outputs(x_t, t, y).velocity


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


def token_grid(input_size: int, patch_size: int) -> int:
    """Returns the tokens per side of latents of a size.

    Raises:
        ValueError: If the size is not a multiple of the patch size.
    """
    if input_size % patch_size:
        raise ValueError(
            f"input_size {input_size} is not a multiple of patch_size {patch_size}."
        )
    return input_size // patch_size
