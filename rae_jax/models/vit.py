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
        self,
        x: jax.Array,
        rotary: attention.Rotary | None = None,
        keep: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens (b, n, d) float32 to tokens (b, n, d) float32.

        Args:
            x: Tokens.
            rotary: Tables as `attention.Attention` takes them.
            keep: Factors (2, b) of the two branches of each sample, see `draw_keep`.
        """
        first, second = (None, None) if keep is None else keep
        x = x + _scaled(self.attn(self.norm1(x), rotary), self.scale1, first)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2, second)


def draw_keep(key: jax.Array, rate: float, depth: int, batch_size: int) -> jax.Array:
    """Draws which branches of a stack are left out, as stochastic depth does.

    arXiv:1603.09382: the rate rises linearly from 0 in the first block to `rate` in
    the last. A branch is left out for single samples; those kept are scaled up, so
    that the mean does not change.

    Returns:
        Factors (depth, 2, batch_size): 0, or 1 / (1 - the rate of the block).

    Raises:
        ValueError: The rate is not within [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be within [0, 1), got {rate}.")
    share = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    kept = jax.random.uniform(key, (depth, 2, batch_size)) < share
    return kept / share


def _gain(hidden_size: int, value: float | None) -> nnx.Param | None:
    return None if value is None else nnx.Param(jnp.full((hidden_size,), value))


def _scaled(
    branch: jax.Array, gain: nnx.Param | None, keep: jax.Array | None
) -> jax.Array:
    branch = branch.astype(jnp.float32)
    if keep is not None:
        branch = branch * keep[:, None, None]
    return branch if gain is None else branch * gain[...][None, None, :]
