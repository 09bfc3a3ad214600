"""Sums over rows and tokens in float32, as matrix products."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

ROWS = 8  # Of a TPU's registers.


@partial(jax.jit, static_argnums=1)
def sum_rows(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sums over axes that are neither the first, unless all before them are, nor last.

    Added up in float32 by a product with ones: as a sum it takes a TPU two to ten
    times as long, and of a product with one row alone the compiler would make a sum
    again. Counts of a model's FLOPs leave it out.

    Args:
        x: (b, n, d) or (b, d).
        axes: All but the last, (0,) or (0, 1), or the tokens alone, (1,).
    """
    kept = tuple(i for i in range(x.ndim - 1) if i not in axes)
    ones = jnp.ones((*(x.shape[i] for i in kept), ROWS, *(x.shape[i] for i in axes)))
    lhs = tuple(len(kept) + 1 + i for i in range(len(axes)))
    dims = ((lhs, tuple(axes)), (tuple(range(len(kept))), kept))
    ones = ones.astype(x.dtype)
    found = jax.lax.dot_general(ones, x, dims, preferred_element_type=jnp.float32)
    return jnp.take(found, 0, axis=len(kept))
