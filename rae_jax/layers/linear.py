"""Linear maps with the initialisations used by the papers."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ad_checkpoint
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from rae_jax.layers import partition, sums

Initializer = Callable[..., jax.Array]
LANES = 128  # Of a TPU's registers.
FUSES = ("TPU v6",)  # Where a product gains from computing its operand on the way.
PRODUCT = "product"  # Name of results that `stack.Stack` may keep.


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


class Linear(nnx.Linear):
    """A linear map whose kernel may lie split over devices, see `partition`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in_features) to (..., out_features) in `dtype`."""
        return self._map(x, partition.gather(self.kernel[...], self.dtype))

    def columns(
        self, x: jax.Array, count: int = 1, unit: int = 1
    ) -> tuple[jax.Array, ...]:
        """Returns the result in `count` equal parts (..., out_features / count).

        A mesh with an axis `tensor` shares out the features of each part, in runs of
        `unit`; the linear map that follows is `rows`.
        """
        x = x.astype(self.dtype)
        if not partition.device().device_kind.startswith(FUSES):
            # Made once: fused into the product, the norm before it would be computed
            # anew for every tile, which takes a TPU v5 half as long as the product.
            x = jax.lax.optimization_barrier(x)
        size = self.out_features // count
        is_split = partition.splits_features(size, unit)
        # Parts that do not begin at a multiple of a TPU's lanes are costly to cut out
        # of the result; out of the kernel, before it is gathered, they are not.
        is_aligned = count == 1 or size < LANES or size % LANES == 0
        if is_aligned and not is_split:
            y = self(x)
            return (y,) if count == 1 else tuple(jnp.split(y, count, axis=-1))
        kernel = partition.gather(
            self.kernel[...],
            self.dtype,
            shape=(self.in_features, count, size),
            used=P(None, None, "tensor") if is_split else P(),
        )
        bias = None if self.bias is None else self.bias[...].reshape(count, size)
        parts = [
            self._map(x, kernel[:, i], None if bias is None else bias[i])
            for i in range(count)
        ]
        pin = partition.pin_features if is_split else lambda part, _: part
        return tuple(pin(part, unit) for part in parts)

    def rows(self, x: jax.Array, unit: int = 1) -> jax.Array:
        """Maps features that `columns` has shared out, and adds up over devices."""
        split = partition.splits_features(self.in_features, unit)
        used = P("tensor") if split else P()
        kernel = partition.gather(self.kernel[...], self.dtype, used=used)
        return (
            partition.pin_batch(self._map(x, kernel)) if split else self._map(x, kernel)
        )

    def _map(self, x, kernel, bias=None):
        if bias is None and self.bias is not None:
            bias = self.bias[...]
        y = product(x.astype(self.dtype), kernel, bias)
        return ad_checkpoint.checkpoint_name(y, PRODUCT)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Returns x @ kernel + bias in the type of x and kernel, which is one.

    The bias is added to the sum in float32, before it is rounded. Gradients have the
    operands' types and are sums in float32; all of their products have operands of
    one type, which those of a cast result would not have.

    Args:
        x: (..., in_features).
        kernel: (in_features, out_features).
        bias: (out_features,) float32, or None.
    """
    y = _dot(x, kernel, x.ndim - 1, 0)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(x.dtype)


def _product_forward(x, kernel, bias):
    return product(x, kernel, bias), (x, kernel, bias)


def _product_backward(saved, gradient):
    x, kernel, bias = saved
    rows = tuple(range(x.ndim - 1))
    of_x = _dot(gradient, kernel, x.ndim - 1, 1, x.dtype)
    # Rounded by the product itself, so that devices add up what they send.
    of_kernel = _dot(x, gradient, rows, rows, kernel.dtype)
    if bias is None:
        return of_x, of_kernel, None
    return of_x, of_kernel, sums.sum_rows(gradient, rows).astype(bias.dtype)


product.defvjp(_product_forward, _product_backward)


def _dot(a, b, a_axes, b_axes, dtype=jnp.float32):
    axes = tuple((n,) if isinstance(n, int) else n for n in (a_axes, b_axes))
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike = "float32",
    rngs: nnx.Rngs,
    use_bias: bool = True,
    init: str = "torch",
) -> Linear:
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
    make = partial(Linear, dtype=jnp.dtype(dtype), param_dtype=jnp.float32)
    return make(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        rngs=rngs,
    )
