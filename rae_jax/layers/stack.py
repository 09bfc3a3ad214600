"""Equal blocks stored stacked, scanned, and rematerialised by policy."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nnx.Module):
    """`depth` equal blocks, held as one block with parameters (depth, ...).

    Scanning compiles the block once, whatever the depth. Each block is initialised
    from its own key.

    Args:
        make_block: Called as make_block(rngs=...); the block maps (x, *args) to an
            array like x.
        depth: Number of blocks.
        remat: What the backward pass recomputes: "full" keeps only the tokens
            between blocks, "dots" also the results of the weight products, "none"
            everything.
        rngs: Randomness of the initial values.

    Raises:
        ValueError: If `remat` is unknown or `depth` is below one.
    """

    def __init__(
        self,
        make_block: Callable[..., nnx.Module],
        depth: int,
        *,
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        choices = [*REMAT_POLICIES, "none"]
        if remat not in choices:
            raise ValueError(f"Unknown remat {remat!r}; choose from {choices}.")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
        self.depth = depth
        self.remat = remat
        keys = jax.random.split(rngs.params(), depth)
        self.block = jax.vmap(lambda key: make_block(rngs=nnx.Rngs(key)))(keys)

    def __call__(
        self, x: jax.Array, *args: Any, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Runs blocks [start, stop) on x, each called as block(x, *args)."""
        # The body returns no per-block output: scan would stack what it returned.
        return self._scan(lambda x: None, x, args, start, stop)[0]

    def features(
        self, x: jax.Array, *args: Any, start: int = 0, stop: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the last output and all outputs (depth, *x.shape) of the blocks."""
        return self._scan(lambda x: x, x, args, start, stop)

    def weighted_sum(
        self,
        x: jax.Array,
        *args: Any,
        weights: Sequence[float],
        read: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the first len(weights) blocks and adds up what `read` makes of them.

        Returns the last output and the sum of weights[i] * read(output i). Unlike
        `features` it holds one array, however many blocks are read.
        """
        block = self._blocks(0, len(weights))

        def body(carry, step):
            x, total = carry
            block, weight = step
            x = pin_batch(block(x, *args))
            return (x, total + weight * read(x)), None

        shape = jax.eval_shape(read, x)
        carry = (pin_batch(x), jnp.zeros(shape.shape, shape.dtype))
        steps = (block, jnp.asarray(weights, jnp.float32))
        return jax.lax.scan(self._remat(body), carry, steps)[0]

    def _scan(self, collect, x, args, start, stop):
        def body(x, block):
            x = pin_batch(block(x, *args))
            return x, collect(x)

        return jax.lax.scan(self._remat(body), pin_batch(x), self._blocks(start, stop))

    def _blocks(self, start: int, stop: int | None) -> nnx.Module:
        if (start, stop) in ((0, None), (0, self.depth)):
            return self.block
        return jax.tree.map(lambda p: p[start:stop], self.block)

    def _remat(self, body: Callable) -> Callable:
        if self.remat == "none":
            return body
        # Inside a scan nothing can be merged with the forward pass, so the barriers
        # that prevent it would only cost time.
        return partial(
            jax.checkpoint, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
        )(body)


def pin_batch(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of x split over the mesh axis "data", the others whole.

    Without it the partitioner may split activations over features, which costs
    collectives in every block. Without a mesh that has an automatic axis "data" of
    a size that divides the batch, x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get("data") != AxisType.Auto or x.shape[0] % mesh.shape["data"]:
        return x
    return jax.lax.with_sharding_constraint(x, P("data"))
