"""Multi-head self-attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import linear, norm, positions

Rotary = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Self-attention over all tokens, with a fused projection of q, k and v.

    Products are in `dtype`; logits and softmax are in float32.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        rotary_pairs: str = "adjacent",
        dtype: DTypeLike = "float32",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        if rotary_pairs not in positions.PAIRS:
            raise ValueError(
                f"Unknown rotary_pairs {rotary_pairs!r}; choose from {positions.PAIRS}."
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}."
            )
        self.num_heads, self.rotary_pairs = num_heads, rotary_pairs
        self.head_dim = hidden_size // num_heads
        self.qkv = linear.linear(
            hidden_size, 3 * hidden_size, dtype=dtype, init=init, rngs=rngs
        )
        self.q_norm = norm.RMSNorm(self.head_dim, rngs=rngs) if qk_norm else None
        self.k_norm = norm.RMSNorm(self.head_dim, rngs=rngs) if qk_norm else None
        self.proj = linear.linear(
            hidden_size, hidden_size, dtype=dtype, init=init, rngs=rngs
        )

    def __call__(self, x: jax.Array, rotary: Rotary | None = None) -> jax.Array:
        """Maps tokens (b, n, d) to (b, n, d) in `dtype`.

        Args:
            x: Tokens.
            rotary: Tables (cos, sin), each (n, head_dim), that rotate q and k.
        """
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (b, n, k, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cos, sin = (jnp.asarray(table, jnp.float32) for table in rotary)
            q = positions.apply_rotary(q, cos, sin, self.rotary_pairs)
            k = positions.apply_rotary(k, cos, sin, self.rotary_pairs)
        out = jax.nn.dot_product_attention(q.astype(v.dtype), k.astype(v.dtype), v)
        return self.proj(out.reshape(b, n, d))
