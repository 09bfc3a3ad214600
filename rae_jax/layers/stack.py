"""Equal blocks stored stacked, scanned, and rematerialised by policy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rae_jax.layers import attention, linear, partition

_keep = jax.checkpoint_policies.save_only_these_names
_PRODUCTS = (linear.PRODUCT, attention.RESULT)
REMAT_POLICIES = {
    "full": None,
    "weights": _keep(partition.GATHERED),
    "attention": _keep(attention.RESULT),
    "dots": _keep(*_PRODUCTS),
    "unrolled": _keep(partition.GATHERED, *_PRODUCTS),
}
# So short a stack is no loop either.
SHORT = 2


class Stack(nnx.Module):
    """`depth` equal blocks, held as one block with parameters (depth, ...).

    Scanning compiles the block once, whatever the depth. Each block is initialised
    from its own key.

    Args:
        make_block: Called as make_block(rngs=...); the block maps (x, *args) to an
            array like x.
        depth: Number of blocks.
        remat: What the backward pass recomputes: "full" keeps only the tokens
            between blocks; "weights" also the weights that were gathered from other
            devices; "attention" the results of attention, "dots" those and the
            results of the weight products, "none" everything. "unrolled" keeps what
            "weights" and "dots" keep, without a loop: compiling takes longer, but
            nothing is copied into stacked arrays and back. In a stack of one or two
            blocks "weights" means the same.
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
        self,
        x: jax.Array,
        *args: Any,
        start: int = 0,
        stop: int | None = None,
        each: tuple = (),
    ) -> jax.Array:
        """Runs blocks [start, stop) on x.

        Args:
            x: What the first block takes.
            *args: What every block takes, called as block(x, *args, *own).
            start: First block.
            stop: One beyond the last block; all that are left when None.
            each: What each block has of its own, arrays with the block first.
        """
        # The body returns no per-block output: scan would stack what it returned.
        return self._scan(lambda x: None, x, args, start, stop, each)[0]

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
            x = partition.pin_batch(block(x, *args))
            return (x, total + weight * read(x)), None

        shape = jax.eval_shape(read, x)
        carry = (partition.pin_batch(x), jnp.zeros(shape.shape, shape.dtype))
        steps = (block, jnp.asarray(weights, jnp.float32))
        return self._run(body, carry, steps)[0]

    def _scan(self, collect, x, args, start, stop, each=()):
        def body(x, step):
            block, own = step
            x = partition.pin_batch(block(x, *args, *own))
            return x, collect(x)

        steps = (self._blocks(start, stop), each)
        return self._run(body, partition.pin_batch(x), steps)

    def _blocks(self, start: int, stop: int | None) -> nnx.Module:
        if (start, stop) in ((0, None), (0, self.depth)):
            return self.block
        return jax.tree.map(lambda p: p[start:stop], self.block)

    def _run(self, body: Callable, carry: Any, steps: Any) -> tuple[Any, Any]:
        if self.remat == "none":
            return jax.lax.scan(body, carry, steps)
        is_short = self.remat == "weights" and self.depth <= SHORT
        if self.remat == "unrolled" or is_short:
            body = jax.checkpoint(body, policy=REMAT_POLICIES["unrolled"])
            return jax.lax.scan(body, carry, steps, unroll=True)
        # Inside a loop nothing can be merged with the forward pass, so the barriers
        # that prevent it would only cost time.
        policy = REMAT_POLICIES[self.remat]
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return jax.lax.scan(body, carry, steps)
