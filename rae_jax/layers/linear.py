"""Linear maps with the initialisations used by the papers."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]


def _uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _initializers(init: str, in_features: int) -> tuple[Initializer, Initializer]:
    zeros = nnx.initializers.zeros_init()
    normal = nnx.initializers.normal(0.02)
    torch = _uniform(1 / math.sqrt(in_features))
    table = {
        "torch": (torch, torch),
        "xavier": (nnx.initializers.xavier_uniform(), zeros),
        "zeros": (zeros, zeros),
        "normal": (normal, zeros),
        "normal_torch_bias": (normal, torch),
    }
    if init not in table:
        raise ValueError(f"Unknown init {init!r}; choose from {list(table)}.")
    return table[init]


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike = "float32",
    rngs: nnx.Rngs,
    use_bias: bool = True,
    init: str = "torch",
) -> nnx.Linear:
    """Creates a linear map (..., in_features) -> (..., out_features).

    Parameters are float32; the product and its result are in `dtype`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        dtype: Type of both operands and of the result.
        rngs: Randomness of the initial values.
        use_bias: Whether a bias is added.
        init: "torch" draws kernel and bias from U(+-1/sqrt(in_features)), the
            default of PyTorch; "xavier" draws the kernel Xavier-uniform, "normal"
            from N(0, 0.02), "zeros" sets it to zero, all three with a zero bias;
            "normal_torch_bias" combines the kernel of one with the bias of another.

    Raises:
        ValueError: If `init` is none of these.
    """
    kernel_init, bias_init = _initializers(init, in_features)
    make = partial(nnx.Linear, dtype=jnp.dtype(dtype), param_dtype=jnp.float32)
    return make(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        rngs=rngs,
    )
