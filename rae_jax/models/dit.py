"""DiT in the form of LightningDiT.

The baseline of RAE (arXiv:2510.11690): DiT (arXiv:2212.09748) with RMSNorm, SwiGLU
and rotary positions (arXiv:2501.01423).
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.convert import dit_names, sources, tables
from rae_jax.diffusion import velocities
from rae_jax.layers import conditioning, patches, stack
from rae_jax.models import dit_parts, pretrained, writers

# From XXL on, the sizes of RAE's scaling study.
PRESETS = {
    "s": dict(hidden_size=384, depth=12, num_heads=6),
    "b": dict(hidden_size=768, depth=12, num_heads=12),
    "l": dict(hidden_size=1024, depth=24, num_heads=16),
    "xl": dict(hidden_size=1152, depth=28, num_heads=16),
    "xxl": dict(hidden_size=1280, depth=32, num_heads=16),
    "h": dict(hidden_size=1536, depth=32, num_heads=16),
    "g": dict(hidden_size=2048, depth=40, num_heads=16),
    "t": dict(hidden_size=2688, depth=40, num_heads=21),
}


class DiT(pretrained.Pretrained, dit_parts.Transformer):
    """Predicts the velocity of latents from their noised form, time and class.

    Initialised as in the official code; the output of a new network is zero.
    `from_pretrained` also reads official LightningDiT weights.

    Args:
        input_size: Height and width of the latents.
        in_channels: Channels of the latents.
        hidden_size: Token width.
        depth: Number of blocks.
        num_heads: Attention heads.
        patch_size: Latent entries per token and side.
        num_classes: Number of classes; this index itself means "no class".
        class_dropout_prob: Share of labels for the training loss to drop.
        learn_sigma: Whether as many outputs again are predicted and dropped.
        use_rmsnorm: See `dit_parts.DiTBlock`.
        use_rope: Whether attention rotates queries and keys.
        use_pos_embed: Whether a sine-cosine table is added to the tokens.
        trainable_tables: Whether that table and the time frequencies receive
            gradients, as they did in the official training.
        dtype: Type of the products; parameters, tokens and norms are float32.
        prediction: What is predicted inside, "v" the velocity or "x" the clean
            latents; the result is a velocity either way.
        early_depth: Blocks before the early head; 0 for none. See
            `dit_parts.Transformer`.
        align_depth: Blocks before the projection that is compared; 0 for none.
        align_dim: Width of the features it is compared with.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.
        **block: `mlp_ratio`, `qk_norm` and `use_swiglu` of `dit_parts.DiTBlock`.

    Raises:
        ValueError: If `input_size` is not a multiple of `patch_size`; or see
            `dit_parts.Transformer`.
    """

    layouts = (pretrained.OWN_LAYOUT, "official")

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        *,
        patch_size: int = 1,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
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
        d, common = hidden_size, dict(dtype=dtype, rngs=rngs)
        self.x_embedder = patches.PatchEmbed(
            patch_size, in_channels, d, init="xavier", **common
        )
        self.pos_embed = dit_parts.make_pos_embed(use_pos_embed, d, self.grid)
        self.t_embedder = conditioning.FourierTimeEmbedding(
            d, init="normal", trainable_tables=trainable_tables, **common
        )
        self.y_embedder = conditioning.LabelEmbedding(num_classes, d, rngs=rngs)
        block |= dict(use_rmsnorm=use_rmsnorm, dtype=dtype, init="xavier")
        make_block = partial(dit_parts.DiTBlock, d, num_heads, **block)
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        out_size = patch_size**2 * in_channels * (2 if learn_sigma else 1)
        self.final_layer = dit_parts.FinalLayer(
            d, out_size, use_rmsnorm=use_rmsnorm, **common
        )
        self.make_readers(
            d,
            depth,
            prediction=prediction,
            early_depth=early_depth,
            align_depth=align_depth,
            align_dim=align_dim,
            use_rmsnorm=use_rmsnorm,
            **common,
        )

    def outputs(self, x_t: jax.Array, t: jax.Array, y: jax.Array) -> velocities.Outputs:
        """Returns the velocity, that of the early head, and the projected tokens."""
        x = self.x_embedder(x_t).astype(jnp.float32)
        x = dit_parts.add_table(x, self.pos_embed, self.trainable_tables)
        c = self.t_embedder(t).astype(jnp.float32) + self.y_embedder(y)
        rotary = dit_parts.make_rotary(self.use_rope, self.blocks, self.grid)
        x, found = self.run_blocks(x, c, rotary)
        out = patches.unpatchify(self.final_layer(x, c), self.patch_size)
        out = out[..., : self.in_channels]
        early = self.read_early(found, c)
        if early is not None:
            early = self.velocity(early, x_t, t)
        aligned = self.read_aligned(found)
        return velocities.Outputs(self.velocity(out, x_t, t), early, aligned)

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        source = sources.open_tensors(path, part)
        arguments = dit_names.dit_sizes(source.shapes, **overrides)
        return pretrained.Weights(arguments, dit_names.dit_table(**arguments), source)

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        return writers.Export(dit_names.dit_table(**arguments), "model.pt")
