"""DiT-DH: a deep narrow trunk conditions a shallow wide head (arXiv:2510.11690)."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.convert import dit_names, sources, tables
from rae_jax.layers import conditioning, linear, patches, stack
from rae_jax.models import dit, pretrained, writers

# Two blocks as wide as a DiT-G, whatever the trunk.
HEAD = dict(hidden_size=2048, depth=2, num_heads=16)
PRESETS = {
    name: {key: (trunk[key], HEAD[key]) for key in HEAD}
    for name, trunk in dit.PRESETS.items()
}


class DiTDH(pretrained.Pretrained, nnx.Module):
    """Predicts the velocity of latents from their noised form, time and class.

    The trunk sees x_t, time and class, and returns one vector per token. The head
    sees x_t again, modulated token by token by these vectors. They may be run
    apart: `head(x_t, trunk(x_t, t, y))` is the network, and the result of `trunk`
    can be kept for several calls of `head`.

    Initialised as in the official code; the output of a new network is zero.
    `from_pretrained` also reads official weights ("stage2_model.pt" and training
    checkpoints); `depth` has to be given where trunk and head are equally wide and
    the head is not two blocks deep.

    Args:
        input_size: Height and width of the latents.
        in_channels: Channels of the latents.
        hidden_size: Token widths of trunk and head.
        depth: Numbers of blocks of trunk and head.
        num_heads: Attention heads of trunk and head.
        num_classes: Number of classes; this index itself means "no class".
        class_dropout_prob: Share of labels for the training loss to drop.
        use_rmsnorm: See `dit.DiTBlock`.
        use_rope: Whether attention rotates queries and keys.
        use_pos_embed: Whether a sine-cosine table is added to the trunk's tokens;
            the head has rotary positions alone.
        trainable_tables: Whether that table and the time frequencies receive
            gradients, as they did in the official training.
        dtype: Type of the products; parameters, tokens and norms are float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.
        **block: `mlp_ratio`, `qk_norm` and `use_swiglu` of `dit.DiTBlock`.
    """

    layouts = (pretrained.OWN_LAYOUT, "official")

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        hidden_size: tuple[int, int],
        depth: tuple[int, int],
        num_heads: tuple[int, int],
        *,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_rmsnorm: bool = True,
        use_rope: bool = True,
        use_pos_embed: bool = True,
        trainable_tables: bool = False,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.use_rope, self.trainable_tables = use_rope, trainable_tables
        self.grid = input_size
        d, d_head = hidden_size
        common = dict(dtype=dtype, rngs=rngs)
        embed = partial(patches.PatchEmbed, 1, in_channels, init="xavier", **common)
        self.s_embedder, self.x_embedder = embed(d), embed(d_head)
        self.pos_embed = dit.make_pos_embed(use_pos_embed, d, input_size)
        self.t_embedder = conditioning.FourierTimeEmbedding(
            d, trainable_tables=trainable_tables, **common
        )
        self.y_embedder = conditioning.LabelEmbedding(num_classes, d, rngs=rngs)
        self.s_projector = linear.linear(d, d_head, **common) if d != d_head else None
        block |= dict(use_rmsnorm=use_rmsnorm, dtype=dtype)
        self.blocks, self.head_blocks = (
            stack.Stack(partial(dit.DiTBlock, *a, **block), n, remat=remat, rngs=rngs)
            for *a, n in zip(hidden_size, num_heads, depth, strict=True)
        )
        self.final_layer = dit.FinalLayer(
            d_head, in_channels, use_rmsnorm=use_rmsnorm, **common
        )

    def __call__(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the velocity (b, h, w, c) float32.

        Args:
            x_t: Noised latents (b, h, w, c).
            t: Times (b,) in [0, 1], shifted.
            y: Labels (b,) in [0, num_classes].
        """
        return self.head(x_t, self.trunk(x_t, t, y))

    def trunk(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the conditions s (b, n, trunk width) float32 of the head.

        Time enters twice, in the blocks and in the result; the class in the blocks.
        """
        t_embed = self.t_embedder(t).astype(jnp.float32)
        c = jax.nn.silu(t_embed + self.y_embedder(y))
        s = self.s_embedder(x_t).astype(jnp.float32)
        s = dit.add_table(s, self.pos_embed, self.trainable_tables)
        s = self.blocks(s, c, dit.make_rotary(self.use_rope, self.blocks, self.grid))
        return jax.nn.silu(t_embed[:, None, :] + s)

    def head(self, x_t: jax.Array, s: jax.Array) -> jax.Array:
        """Returns the velocity (b, h, w, c) float32 from conditions s of `trunk`."""
        if self.s_projector is not None:
            s = self.s_projector(s).astype(jnp.float32)
        x = self.x_embedder(x_t).astype(jnp.float32)
        rotary = dit.make_rotary(self.use_rope, self.head_blocks, self.grid)
        x = self.head_blocks(x, s, rotary)
        return patches.unpatchify(self.final_layer(x, s), 1)

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        source = sources.open_tensors(path, part)
        arguments = dit_names.dit_dh_sizes(source.shapes, **overrides)
        table = dit_names.dit_dh_table(**arguments)
        return pretrained.Weights(arguments, table, source)

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        return writers.Export(dit_names.dit_dh_table(**arguments), "model.pt")
