"""Self-attention of whole samples on TPUs, rotation of queries and keys included.

With a few hundred tokens, the (n, n) logits of a head fit into the chip's vector
memory, so one kernel reads the fused projection and writes the result, and nothing
else passes through the main memory; XLA's own program moves (n, n) arrays in float32
six times. The backward pass computes the logits anew. Products have operands of the
projection's type and add up in float32; softmax and rotations are float32.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Tables = tuple[jax.Array, ...]
ROWS = 128  # Queries at a time.
VMEM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for.

    Attributes:
        num_heads: Attention heads.
        head_dim: Features of each.
        rotates: Whether queries and keys are rotated, by tables.
        interpret: Whether JAX carries it out step by step, as tests do on CPUs.
    """

    num_heads: int
    head_dim: int
    rotates: bool
    interpret: bool = False

    @property
    def width(self) -> int:
        """Features of all heads."""
        return self.num_heads * self.head_dim


def refusal(n: int, sizes: Sizes) -> str:
    """Returns why the kernel cannot be used for n tokens, or "" if it can."""
    if n % ROWS:
        return f"{n} tokens are no multiple of {ROWS}"
    needed = 2 * 7 * n * sizes.width * 2 + 8 * min(n, ROWS) * n * 4
    if needed > VMEM_BYTES:
        return f"{n} tokens of {sizes.width} features exceed the vector memory"
    return ""


def rotation(pairs: str, head_dim: int) -> np.ndarray:
    """Returns R (head_dim, head_dim) such that x @ R is x with its pairs turned by 90
    degrees; a product is what the chip does best, and with +-1 it is exact."""
    matrix = np.zeros((head_dim, head_dim), np.float32)
    index = np.arange(head_dim // 2)
    if pairs == "halves":
        first, second = index, index + head_dim // 2
    else:
        first, second = 2 * index, 2 * index + 1
    matrix[second, first], matrix[first, second] = -1, 1
    return matrix


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(qkv: jax.Array, tables: Tables, sizes: Sizes) -> jax.Array:
    """Returns attention (b, n, d) of a fused projection (b, n, 3 d), in its type.

    Args:
        qkv: Queries, keys and values, each with the heads side by side.
        tables: (cos, sin, R), (n, head_dim) twice and `rotation`; or none.
        sizes: Of the heads.
    """
    b, n, _ = qkv.shape
    return _call(_forward_kernel, (qkv,), tables, sizes, sizes.width, products=2)


def _attend_forward(qkv, tables, sizes):
    return attend(qkv, tables, sizes), (qkv, tables)


def _attend_backward(sizes, saved, gradient):
    qkv, tables = saved
    arrays = (qkv, gradient.astype(qkv.dtype))
    width = 3 * sizes.width
    gradient = _call(
        _backward_kernel, arrays, tables, sizes, width, products=5, scratch=2
    )
    return gradient, tuple(jnp.zeros_like(table) for table in tables)


attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, arrays, tables, sizes, width, *, products, scratch=0):
    """Runs a kernel on one sample after the other; shared out over a chip's cores."""
    b, n, _ = arrays[0].shape
    pairs = b * sizes.num_heads * n * n
    flops = 2 * products * pairs * sizes.head_dim
    if sizes.rotates:
        turns = 2 * (products - 1) // 2  # Queries and keys, and back in the gradient.
        flops += 2 * turns * b * n * sizes.width * sizes.head_dim
    moved = (sum(a.shape[-1] for a in arrays) + width) * b * n
    rows = [pl.BlockSpec((1, n, a.shape[-1]), lambda i: (i, 0, 0)) for a in arrays]
    whole = [pl.BlockSpec(table.shape, lambda i: (0, 0)) for table in tables]

    def run(*refs):
        first, last = len(arrays), len(arrays) + len(tables)
        angles = refs[first:last] or (None,) * 3
        kernel(*refs[:first], *angles, *refs[last:], sizes=sizes)

    return pl.pallas_call(
        run,
        grid=(b,),
        in_specs=rows + whole,
        out_specs=pl.BlockSpec((1, n, width), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, n, width), arrays[0].dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=pairs,
            bytes_accessed=moved * arrays[0].dtype.itemsize,
        ),
        scratch_shapes=[pltpu.VMEM((n, sizes.head_dim), jnp.float32)] * scratch,
        interpret=sizes.interpret,
        name=kernel.__name__.strip("_"),
    )(*arrays, *tables)


def _forward_kernel(qkv, cos, sin, turn, out, *, sizes):
    for head in range(sizes.num_heads):
        part = [_features(head, part, sizes) for part in range(3)]
        k = _rotate(qkv[0, :, part[1]], slice(None), cos, sin, turn, sizes)
        v = qkv[0, :, part[2]]

        @_for_row_blocks(qkv.shape[1])
        def _(rows, part=part, k=k, v=v):
            q = _rotate(qkv[0, rows, part[0]], rows, cos, sin, turn, sizes)
            weights = _softmax(q, k, sizes)
            result = _dot(weights.astype(v.dtype), v, 1, 0)
            out[0, rows, part[0]] = result.astype(out.dtype)


def _backward_kernel(qkv, gradient, cos, sin, turn, out, k_sum, v_sum, *, sizes):
    for head in range(sizes.num_heads):
        part = [_features(head, part, sizes) for part in range(3)]
        k = _rotate(qkv[0, :, part[1]], slice(None), cos, sin, turn, sizes)
        v = qkv[0, :, part[2]]
        k_sum[...] = v_sum[...] = jnp.zeros(k_sum.shape, jnp.float32)

        @_for_row_blocks(qkv.shape[1])
        def _(rows, part=part, k=k, v=v):
            q = _rotate(qkv[0, rows, part[0]], rows, cos, sin, turn, sizes)
            weights = _softmax(q, k, sizes)
            g = gradient[0, rows, part[0]]
            v_sum[...] += _dot(weights.astype(g.dtype), g, 0, 0)
            of_weights = _dot(g, v, 1, 1)
            mean = jnp.sum(weights * of_weights, axis=1, keepdims=True)
            of_logits = weights * (of_weights - mean) * sizes.head_dim**-0.5
            of_logits = of_logits.astype(k.dtype)
            k_sum[...] += _dot(of_logits, q, 0, 0)
            of_q = _dot(of_logits, k, 1, 0)
            of_q = _rotate_back(of_q, rows, cos, sin, turn, sizes)
            out[0, rows, part[0]] = of_q.astype(out.dtype)

        of_k = _rotate_back(k_sum[...], slice(None), cos, sin, turn, sizes)
        out[0, :, part[1]] = of_k.astype(out.dtype)
        out[0, :, part[2]] = v_sum[...].astype(out.dtype)


def _for_row_blocks(n: int) -> Callable:
    """Calls the decorated function with every block of rows; compiled once."""

    def run(body):
        def step(i, carry):
            body(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS))
            return carry

        jax.lax.fori_loop(0, n // ROWS, step, 0)

    return run


def _features(head: int, part: int, sizes: Sizes) -> slice:
    start = part * sizes.width + head * sizes.head_dim
    return slice(start, start + sizes.head_dim)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _softmax(q: jax.Array, k: jax.Array, sizes: Sizes) -> jax.Array:
    logits = _dot(q, k, 1, 1) * sizes.head_dim**-0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _rotate(x, rows, cos, sin, turn, sizes):
    if not sizes.rotates:
        return x
    wide = x.astype(jnp.float32) * cos[rows, :]
    return (wide + _dot(x, turn[...], 1, 0) * sin[rows, :]).astype(x.dtype)


def _rotate_back(x, rows, cos, sin, turn, sizes):
    """Turns the float32 gradient of a rotated array back."""
    if not sizes.rotates:
        return x
    turned = _dot((x * sin[rows, :]).astype(turn.dtype), turn[...], 1, 1)
    return x * cos[rows, :] + turned
