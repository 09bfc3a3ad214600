"""Feed-forward parts of a transformer block."""

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import linear

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """Two linear maps with a GELU between them, (..., d) -> (..., d) in `dtype`."""

    def __init__(
        self,
        hidden_size: int,
        intermediate: int,
        *,
        activation: str = "gelu",
        dtype: DTypeLike = "float32",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {activation!r}; choose from {list(ACTIVATIONS)}."
            )
        self.activation = activation
        self.fc1 = linear.linear(
            hidden_size, intermediate, dtype=dtype, init=init, rngs=rngs
        )
        self.fc2 = linear.linear(
            intermediate, hidden_size, dtype=dtype, init=init, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        (h,) = self.fc1.columns(x)
        return self.fc2.rows(ACTIVATIONS[self.activation](h))


class SwiGLU(nnx.Module):
    """Gated feed-forward, w3(silu(a) * b) with [a | b] = w12(x)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate: int,
        *,
        dtype: DTypeLike = "float32",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        self.w12 = linear.linear(
            hidden_size, 2 * intermediate, dtype=dtype, init=init, rngs=rngs
        )
        self.w3 = linear.linear(
            intermediate, hidden_size, dtype=dtype, init=init, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = self.w12.columns(x, 2)
        return self.w3.rows(jax.nn.silu(gate) * value)


def swiglu_width(hidden_size: int, mlp_ratio: float) -> int:
    """Returns the inner width that gives SwiGLU the size of a plain MLP.

    Two thirds of the plain width, without rounding to a multiple, as in the
    official code of RAE (arXiv:2510.11690): 1152 -> 3072, 2048 -> 5461.
    """
    return int(2 / 3 * int(hidden_size * mlp_ratio))
