"""Pretrained vision transformers as representation encoders.

One network for all families of `encoder_names.FAMILIES`; a family fixes its prefix
tokens, positions, activation and norms.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax import storage
from rae_jax.convert import encoder_configs, encoder_names, sources, tables
from rae_jax.layers import attention, norm, patches, positions, resize, stack
from rae_jax.models import pretrained, recording, vit, writers

RESIZES = {
    "bicubic": resize.resize_bicubic,
    "bicubic_antialias": resize.resize_bicubic_antialias,
}
LAYER_MODES = ("mean_global", "sum")
PREPROCESSOR_NAME = "preprocessor_config.json"
_NEEDED = ("name", "image_size", *encoder_names.SIZES)


class ViTEncoder(pretrained.Pretrained, nnx.Module):
    """Normalised images to patch tokens, the last operation a LayerNorm.

    Any image whose sides are multiples of the patch size is taken: a position table
    is resampled as the family's code in transformers does it, rotary positions are
    computed.

    With `layers` the tokens are made of several blocks' outputs, each through the
    final norm, as RAEv2 does (arXiv:2605.18324): "mean_global", its released code, is
    their mean plus, at every token, the spatial mean of the last of them; "sum", the
    paper's text, is their sum.

    Args:
        name: Key of `encoder_names.FAMILIES`.
        image_size: Image height and width, in pixels.
        patch_size: Height and width of a patch.
        hidden_size: Token width.
        depth: Number of blocks.
        num_heads: Attention heads.
        intermediate_size: Inner width of the MLPs.
        table_size: Image size that the position table was trained for, of families
            that have a table; `image_size` when None.
        normalize: Whether the final norm drops its pretrained affine part, as the
            official code of RAE does.
        layers: Blocks to combine, counted from 0; the last one alone when empty.
        layer_mode: "mean_global" or "sum", see above.
        dtype: Type of the products; parameters, tokens and norms are float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.
        **changes: What differs from the family, see `encoder_names.Family`.

    Raises:
        ValueError: For an unknown family, mode or size that does not fit.

    Attributes:
        name: Name of the family.
        input_size: Image height and width that the autoencoder resizes to.
        patch_size: Pixels per token side.
        hidden_size: Features per token.
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
    """

    layouts = (pretrained.OWN_LAYOUT, "huggingface")

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        intermediate_size: int,
        table_size: int | None = None,
        normalize: bool = True,
        layers: Sequence[int] = (),
        layer_mode: str = "mean_global",
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
        **changes: Any,
    ):
        facts = encoder_names.facts(name, changes)
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}."
            )
        if layer_mode not in LAYER_MODES:
            raise ValueError(
                f"Unknown layer_mode {layer_mode!r}; choose from {LAYER_MODES}."
            )
        self.name, self.patch_size = name, patch_size
        self.input_size, self.hidden_size = image_size, hidden_size
        self.image_mean, self.image_std = facts.image_mean, facts.image_std
        self.layers, self.layer_mode = _checked_layers(layers, depth), layer_mode
        self.prefix = int(facts.cls_token) + facts.num_registers
        self.positions, self.rope_theta = facts.positions, facts.rope_theta
        self.head_dim = hidden_size // num_heads
        self.patch_embed = patches.PatchEmbed(
            patch_size, 3, hidden_size, dtype=dtype, rngs=rngs
        )
        grid = (table_size or image_size) // patch_size
        is_rotary = facts.positions == encoder_names.ROTARY
        num_positions = 0 if is_rotary else int(facts.cls_token) + grid**2
        self.cls_token = _draw(int(facts.cls_token), hidden_size, rngs)
        self.register_tokens = _draw(facts.num_registers, hidden_size, rngs)
        self.pos_embed = _draw(num_positions, hidden_size, rngs)
        widths = (hidden_size, num_heads, intermediate_size)
        make_block = partial(_make_block, facts, widths, dtype)
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        self.norm = norm.LayerNorm(
            hidden_size, eps=facts.layer_norm_eps, affine=not normalize, rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size) float32.

        Raises:
            ValueError: If h or w is not a multiple of the patch size.
        """
        x, rotary = self._embed(images)
        if not self.layers:
            return self._tokens(self.blocks(x, rotary))
        count = len(self.layers)
        weight = 1 / count if self.layer_mode == "mean_global" else 1.0
        weights = [weight * (i in self.layers) for i in range(self.layers[-1] + 1)]
        last, total = self.blocks.weighted_sum(
            x, rotary, weights=weights, read=self._tokens
        )
        if self.layer_mode == "mean_global":
            total = total + jnp.mean(self._tokens(last), axis=1, keepdims=True)
        return total

    def class_token(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to the last class token (b, hidden_size).

        It went through the final norm; `layers` do not matter.

        Raises:
            ValueError: The family has no class token.
        """
        if self.cls_token is None:
            raise ValueError(
                f"Encoders of the family {self.name!r} have no class token."
            )
        return self.norm(self.blocks(*self._embed(images))[:, 0])

    def block_features(
        self, images: jax.Array, indices: Sequence[int]
    ) -> list[jax.Array]:
        """Returns the patch tokens (b, n, d) after some blocks, before the final norm.

        Args:
            images: Normalised images (b, h, w, 3).
            indices: Blocks counted from 0, increasing.

        Raises:
            ValueError: If the indices do not increase or there is no such block.
        """
        return [x[:, self.prefix :] for x in self.block_tokens(images, indices)]

    def block_tokens(
        self,
        images: jax.Array,
        indices: Sequence[int],
        keep: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Returns what `block_features` does, class token and registers included.

        Args:
            images: Normalised images (b, h, w, 3).
            indices: Blocks counted from 0, increasing.
            keep: Factors (depth, 2, b) of the blocks' branches, see `vit.draw_keep`.

        Raises:
            ValueError: If the indices do not increase or there is no such block.
        """
        x, rotary = self._embed(images)
        found, start = [], 0
        for index in _checked_layers(indices, self.blocks.depth):
            stop = index + 1
            each = () if keep is None else (keep[start:stop],)
            x = self.blocks(x, rotary, start=start, stop=stop, each=each)
            found.append(x)
            start = stop
        return found

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        """Opens a folder of Hugging Face, or a file whose name and sizes are given."""
        arguments = recording.merged(read_arguments(path), overrides)
        missing = [key for key in _NEEDED if key not in arguments]
        if missing:
            raise ValueError(
                f"{path} has no {pretrained.CONFIG_NAME} that describes an encoder. "
                f"Give {', '.join(missing)}, such as those of encoders.PRESETS."
            )
        source = encoder_names.canonical(sources.open_tensors(path, part))
        table = encoder_names.table(**arguments)
        return pretrained.Weights(arguments, table, source)

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        """Describes a folder that the class of transformers loads.

        What transformers has no setting for (`normalize`, `layers`) is not in it.
        """
        name = arguments["name"]
        config, preprocessor = encoder_configs.config_from_sizes(name, arguments)
        prefix = encoder_names.HUB_PREFIXES.get(name, "")
        return writers.Export(
            encoder_names.table(**arguments),
            writers.WEIGHTS_NAME,
            rename=lambda key: prefix + key,
            configs={
                pretrained.CONFIG_NAME: config,
                PREPROCESSOR_NAME: preprocessor,
            },
        )

    def _tokens(self, x: jax.Array) -> jax.Array:
        return self.norm(x[:, self.prefix :])

    def _embed(self, images: jax.Array) -> tuple[jax.Array, attention.Rotary | None]:
        """Returns the tokens (b, prefix + n, d) float32 and the rotary tables."""
        b, h, w, _ = images.shape
        rows, columns = h // self.patch_size, w // self.patch_size
        x = self.patch_embed(images).astype(jnp.float32)
        rotary = None
        if self.pos_embed is None:
            rotary = positions.rotary_centers(
                self.head_dim,
                rows,
                columns,
                theta=self.rope_theta,
                num_prefix=self.prefix,
            )
        if self.cls_token is not None:
            cls_token = jnp.broadcast_to(self.cls_token[...], (b, 1, x.shape[-1]))
            x = jnp.concatenate([cls_token, x], axis=1)
        if self.pos_embed is not None:
            x = x + self._table(rows, columns)
        if self.register_tokens is not None:  # These have no position.
            registers = self.register_tokens[...]
            registers = jnp.broadcast_to(registers, (b, *registers.shape[1:]))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return x, rotary

    def _table(self, rows: int, columns: int) -> jax.Array:
        """Returns the position table (1, tokens, d) for a grid of patches."""
        table = self.pos_embed[...]
        first = 0 if self.cls_token is None else 1
        grid = math.isqrt(table.shape[1] - first)
        patch_table = table[:, first:].reshape(1, grid, grid, -1)
        patch_table = RESIZES[self.positions](patch_table, rows, columns)
        patch_table = patch_table.reshape(1, rows * columns, -1)
        return jnp.concatenate([table[:, :first], patch_table], axis=1)


def read_arguments(path: Path) -> pretrained.Arguments:
    """Returns what a folder's JSON files say of an encoder's constructor arguments.

    Raises:
        ValueError: They describe something else.
    """
    settings = pretrained.read_config(path)
    if settings.get("class") == ViTEncoder.__name__:
        return settings["arguments"]
    if "model_type" not in settings:
        return {}
    file = storage.path(path) / PREPROCESSOR_NAME
    preprocessor = json.loads(storage.read_bytes(file)) if file.is_file() else {}
    name, sizes = encoder_configs.sizes_from_config(settings, preprocessor)
    return {"name": name} | sizes


def _make_block(
    facts: encoder_names.Family,
    widths: tuple[int, int, int],
    dtype: DTypeLike,
    *,
    rngs: nnx.Rngs,
) -> vit.ViTBlock:
    block = vit.ViTBlock(
        *widths,
        layer_norm_eps=facts.layer_norm_eps,
        activation=facts.activation,
        layer_scale=1.0 if facts.layer_scale else None,
        gated=facts.gated,
        rotary_pairs="halves",
        dtype=dtype,
        rngs=rngs,
    )
    if not facts.key_bias:
        # Published weights have none, so ours stays zero.
        bias, width = block.attn.qkv.bias, widths[0]
        bias[...] = bias[...].at[width : 2 * width].set(0)
    return block


def _draw(count: int, hidden_size: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """Returns tokens (1, count, d) with small random values; None for no tokens."""
    if not count:
        return None
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, count, hidden_size)))


def _checked_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    layers = tuple(layers)
    if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(depth)):
        raise ValueError(
            f"Blocks must increase and lie in 0..{depth - 1}, got {layers}."
        )
    return layers
