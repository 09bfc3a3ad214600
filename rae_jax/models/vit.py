"""The plain pre-norm ViT block shared by encoders and decoder."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import attention, mlp, norm


class ViTBlock(nnx.Module):
    """Attention and MLP, each behind an affine LayerNorm, added to the tokens.

    Tokens stay float32; products are in `dtype`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        layer_norm_eps: float = 1e-6,
        activation: str = "gelu",
        layer_scale: float | None = None,
        gated: bool = False,
        rotary_pairs: str = "adjacent",
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        """Initialises the block with PyTorch's defaults.

        Args:
            hidden_size: Token width.
            num_heads: Attention heads.
            intermediate_size: Inner width of the MLP.
            layer_norm_eps: Added to the variance in both norms.
            activation: "gelu" or "gelu_tanh".
            layer_scale: Initial value of a gain per feature on both branches
                (DINOv2); none when None.
            gated: Whether the MLP is a SwiGLU, whose activation is SiLU.
            rotary_pairs: See `positions.apply_rotary`.
            dtype: Type of the products.
            rngs: Randomness of the initial values.
        """
        self.norm1 = norm.LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)
        self.attn = attention.Attention(
            hidden_size, num_heads, rotary_pairs=rotary_pairs, dtype=dtype, rngs=rngs
        )
        self.norm2 = norm.LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)
        make_mlp = mlp.SwiGLU if gated else partial(mlp.MLP, activation=activation)
        self.mlp = make_mlp(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.scale1 = _gain(hidden_size, layer_scale)
        self.scale2 = _gain(hidden_size, layer_scale)

    def __call__(
        self, x: jax.Array, rotary: attention.Rotary | None = None
    ) -> jax.Array:
        """Maps tokens (b, n, d) float32 to tokens (b, n, d) float32.

        `rotary` are tables as `attention.Attention` takes them.
        """
        x = x + _scaled(self.attn(self.norm1(x), rotary), self.scale1)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2)


def _gain(hidden_size: int, value: float | None) -> nnx.Param | None:
    return None if value is None else nnx.Param(jnp.full((hidden_size,), value))


def _scaled(branch: jax.Array, gain: nnx.Param | None) -> jax.Array:
    branch = branch.astype(jnp.float32)
    return branch if gain is None else branch * gain[...][None, None, :]
