"""DiT-DH: a deep narrow trunk conditions a shallow wide head (arXiv:2510.11690)."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.convert import dit_names, sources, tables
from rae_jax.diffusion import velocities
from rae_jax.layers import conditioning, linear, patches, stack
from rae_jax.models import dit, dit_parts, pretrained, writers

# Two blocks as wide as a DiT-G, whatever the trunk.
HEAD = dict(hidden_size=2048, depth=2, num_heads=16)
PRESETS = {
    name: {key: (trunk[key], HEAD[key]) for key in HEAD}
    for name, trunk in dit.PRESETS.items()
}


class DiTDH(pretrained.Pretrained, dit_parts.Transformer):
    """Predicts the velocity of latents from their noised form, time and class.

    The trunk sees x_t, time and class, and returns one vector per token. The head
    sees x_t again, modulated token by token by these vectors. They may be run
    apart: `head(x_t, trunk(x_t, t, y), t)` is the network, and the result of `trunk`
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
        patch_size: Latent entries per token and side.
        num_classes: Number of classes; this index itself means "no class".
        class_dropout_prob: Share of labels for the training loss to drop.
        use_rmsnorm: See `dit_parts.DiTBlock`.
        use_rope: Whether attention rotates queries and keys.
        use_pos_embed: Whether a sine-cosine table is added to the trunk's tokens;
            the head has rotary positions alone.
        trainable_tables: Whether that table and the time frequencies receive
            gradients, as they did in the official training.
        dtype: Type of the products; parameters, tokens and norms are float32.
        prediction: See `dit.DiT`.
        early_depth: Blocks of the trunk before the early head; see `dit.DiT`.
        align_depth: Blocks of the trunk before the projection that is compared.
        align_dim: Width of the features it is compared with.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.
        **block: `mlp_ratio`, `qk_norm` and `use_swiglu` of `dit_parts.DiTBlock`.

    Raises:
        ValueError: See `dit.DiT`.
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
        patch_size: int = 1,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_rmsnorm: bool = True,
        use_rope: bool = True,
        use_pos_embed: bool = True,
        trainable_tables: bool = False,
        prediction: str = "v",
        early_depth: int = 0,
        align_depth: int = 0,
        align_dim: int = 0,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.use_rope, self.trainable_tables = use_rope, trainable_tables
        self.in_channels, self.patch_size = in_channels, patch_size
        self.grid = dit_parts.token_grid(input_size, patch_size)
        d, d_head = hidden_size
        common = dict(dtype=dtype, rngs=rngs)
        embed = partial(
            patches.PatchEmbed, patch_size, in_channels, init="xavier", **common
        )
        self.s_embedder, self.x_embedder = embed(d), embed(d_head)
        self.pos_embed = dit_parts.make_pos_embed(use_pos_embed, d, self.grid)
        self.t_embedder = conditioning.FourierTimeEmbedding(
            d, trainable_tables=trainable_tables, **common
        )
        self.y_embedder = conditioning.LabelEmbedding(num_classes, d, rngs=rngs)
        self.s_projector = linear.linear(d, d_head, **common) if d != d_head else None
        block |= dict(use_rmsnorm=use_rmsnorm, dtype=dtype)
        stacked = dict(remat=remat, rngs=rngs)
        self.blocks, self.head_blocks = (
            stack.Stack(partial(dit_parts.DiTBlock, *a, **block), n, **stacked)
            for *a, n in zip(hidden_size, num_heads, depth, strict=True)
        )
        self.final_layer = dit_parts.FinalLayer(
            d_head, patch_size**2 * in_channels, use_rmsnorm=use_rmsnorm, **common
        )
        self.make_readers(
            d,
            depth[0],
            prediction=prediction,
            early_depth=early_depth,
            align_depth=align_depth,
            align_dim=align_dim,
            use_rmsnorm=use_rmsnorm,
            **common,
        )

    def outputs(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> velocities.Outputs:
        """Returns the velocity, that of the early head, and the projected tokens."""
        s, early, aligned = self._trunk(x_t, t, y)
        if early is not None:
            early = self.velocity(early, x_t, t)
        return velocities.Outputs(self.head(x_t, s, t), early, aligned)

    def trunk(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the conditions s (b, n, trunk width) float32 of the head.

        Time enters twice, in the blocks and in the result; the class in the blocks.
        """
        return self._trunk(x_t, t, y)[0]

    def trunk_and_early(
        self, x_t: jax.Array, t: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what `trunk` does, and what the early head predicts (b, h, w, c)."""
        return self._trunk(x_t, t, y)[:2]

    def head(self, x_t: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the velocity (b, h, w, c) float32 from conditions s of `trunk`.

        The head itself sees no time; t only turns a prediction of x into a velocity.
        """
        if self.s_projector is not None:
            s = self.s_projector(s).astype(jnp.float32)
        x = self.x_embedder(x_t).astype(jnp.float32)
        rotary = dit_parts.make_rotary(self.use_rope, self.head_blocks, self.grid)
        x = self.final_layer(self.head_blocks(x, s, rotary), s)
        return self.velocity(patches.unpatchify(x, self.patch_size), x_t, t)

    def _trunk(self, x_t, t, y):
        t_embed = self.t_embedder(t).astype(jnp.float32)
        c = jax.nn.silu(t_embed + self.y_embedder(y))
        s = self.s_embedder(x_t).astype(jnp.float32)
        s = dit_parts.add_table(s, self.pos_embed, self.trainable_tables)
        rotary = dit_parts.make_rotary(self.use_rope, self.blocks, self.grid)
        s, found = self.run_blocks(s, c, rotary)
        s = jax.nn.silu(t_embed[:, None, :] + s)
        return s, self.read_early(found, c), self.read_aligned(found)

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
