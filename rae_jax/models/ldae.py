"""The denoising transformer of l-DAE.

One isotropic ViT; its first blocks are the encoder, the rest the decoder
(arXiv:2401.14404 section 3).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import conditioning, linear, positions, stack
from rae_jax.models import dit_parts


class LDAE(nnx.Module):
    """Tokens at noise level t to clean tokens, by one stack of blocks.

    Args:
        grid: Tokens per side.
        in_features: Values per input token.
        out_features: Values per output token; 0 leaves the output layer out, for
            an encoder.
        hidden_size: Width.
        depth: Number of blocks.
        num_heads: Attention heads.
        condition_divisor: The condition is hidden_size / condition_divisor wide
            (4 in the paper).
        num_classes: Number of classes, whose index itself means "no class"; 0 for a
            network that knows none.
        class_dropout_prob: Share of labels for the training loss to drop.
        learn_sigma: Whether as many outputs again say the variance of a step of
            ancestral sampling, see `losses.variational`.
        dtype: Type of the matrix products.
        remat: See `layers.stack.Stack`.
        rngs: Randomness of the initial values.
    """

    def __init__(
        self,
        *,
        grid: int,
        in_features: int,
        out_features: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        condition_divisor: int = 4,
        num_classes: int = 0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        self.grid, self.hidden_size = grid, hidden_size
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.learn_sigma = learn_sigma
        c_size = hidden_size // condition_divisor
        self.embed = linear.linear(
            in_features, hidden_size, dtype=dtype, init="xavier", rngs=rngs
        )
        self.t_embedder = conditioning.SinusoidalTimeEmbedding(
            c_size, c_size, rngs=rngs
        )

        plain = dict(cond_size=c_size, use_rmsnorm=False, dtype=dtype)
        make_block = partial(
            dit_parts.DiTBlock,
            hidden_size,
            num_heads,
            mlp_ratio=mlp_ratio,
            use_swiglu=False,
            init="xavier",
            **plain,
        )
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        out_size = out_features * (2 if learn_sigma else 1)
        make_final = partial(dit_parts.FinalLayer, rngs=rngs, **plain)
        self.final_layer = make_final(hidden_size, out_size) if out_size else None
        self.y_embedder = (
            conditioning.LabelEmbedding(num_classes, c_size, rngs=rngs)
            if num_classes
            else None
        )

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array | None = None
    ) -> jax.Array:
        """Maps tokens (b, n, in_features) to predictions.

        Args:
            x: Tokens.
            t: Step indices (b,).
            y: Classes (b,); none at all if None.

        Returns:
            (b, n, out_features) float32, with `learn_sigma` twice as wide: prediction,
            then variance; zero at initialisation.
        """
        c = self._condition(t, y)
        return self.final_layer(self.blocks(self._embed(x), c), c)

    def features(
        self, x: jax.Array, t: jax.Array, depth: int, y: jax.Array | None = None
    ) -> jax.Array:
        """Returns the tokens (b, n, hidden_size) after the first `depth` blocks."""
        return self.blocks(self._embed(x), self._condition(t, y), stop=depth)

    def block_features(
        self,
        x: jax.Array,
        t: jax.Array,
        indices: Sequence[int],
        y: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Returns the tokens (b, n, hidden_size) after each block of `indices`.

        Raises:
            ValueError: If the indices do not increase or there is no such block.
        """
        indices, depth = list(indices), self.blocks.depth
        if indices != sorted(set(indices)) or not set(indices) <= set(range(depth)):
            raise ValueError(
                f"Blocks must increase and lie in 0..{depth - 1}, got {indices}."
            )
        x, c, start, found = self._embed(x), self._condition(t, y), 0, []
        for index in indices:
            x = self.blocks(x, c, start=start, stop=index + 1)
            found.append(x)
            start = index + 1
        return found

    def _embed(self, x: jax.Array) -> jax.Array:
        table = jnp.asarray(positions.sincos_2d(self.hidden_size, self.grid))
        return self.embed(x).astype(jnp.float32) + table[None]

    def _condition(self, t: jax.Array, y: jax.Array | None) -> jax.Array:
        c = self.t_embedder(t)
        if self.y_embedder is None:
            return c
        y = jnp.full(t.shape, self.num_classes) if y is None else y
        return c.astype(jnp.float32) + self.y_embedder(y)
