"""The masked autoencoder of arXiv:2111.06377: encoder of what is seen, decoder."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax import config as configs
from rae_jax.convert import encoder_names, mae_names, sources, tables
from rae_jax.layers import linear, norm, patches, stack
from rae_jax.models import (
    pretext,
    pretrained,
    recording,
    vit,
    vit_encoder,
    writers,
)

FAMILY = "mae"


class MAE(pretrained.Pretrained, nnx.Module):
    """Normalised images and noise that chooses patches, to predicted patches.

    The encoder is a `ViTEncoder` of the family "mae" and sees the chosen patches
    alone, so that a trained one is an encoder like the published ones. As in the
    official code weights begin Xavier-uniform, except that norms divide by a root
    with the 1e-12 that published configs have.

    Args:
        image_size: Image height and width, in pixels.
        patch_size: Height and width of a patch.
        hidden_size: Token width of the encoder.
        depth: Number of its blocks.
        num_heads: Its attention heads.
        intermediate_size: Inner width of its MLPs.
        decoder_hidden_size: Likewise of the decoder, as the next three.
        decoder_depth: Number of blocks.
        decoder_num_heads: Attention heads.
        decoder_intermediate_size: Inner width of the MLPs.
        mask_ratio: Share of the patches that the encoder does not see.
        dtype: Type of the products; parameters, tokens and norms are float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.

    Raises:
        ConfigError: The ratio leaves no patch to see, or none to predict.
    """

    layouts = (pretrained.OWN_LAYOUT, "huggingface")

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        intermediate_size: int,
        decoder_hidden_size: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_intermediate_size: int = 2048,
        mask_ratio: float = 0.75,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.num_patches = (image_size // patch_size) ** 2
        self.num_visible = _num_visible(self.num_patches, mask_ratio)
        common = dict(dtype=dtype, remat=remat, rngs=rngs)
        self.encoder = pretext.make_encoder(
            FAMILY,
            cls_std=0.02,
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            intermediate_size=intermediate_size,
            **common,
        )
        self.decoder = MAEDecoder(
            hidden_size,
            image_size // patch_size,
            3 * patch_size**2,
            decoder_hidden_size,
            decoder_depth,
            decoder_num_heads,
            decoder_intermediate_size,
            **common,
        )

    def __call__(
        self, images: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts the patches of images from those that have the least noise.

        Args:
            images: Normalised (b, h, w, 3).
            noise: (b, n), different numbers for the patches of an image.

        Returns:
            Predicted patches (b, n, p) float32, as `patches.patchify` cuts them, and
            the mask (b, n) float32, 1 where a patch was not seen.
        """
        order = jnp.argsort(noise, axis=1)
        places = jnp.argsort(order, axis=1)  # Of each patch in that order.
        latent = self.encode(images, order[:, : self.num_visible])
        mask = (places >= self.num_visible).astype(jnp.float32)
        return self.decoder(latent, places), mask

    def encode(self, images: jax.Array, visible: jax.Array) -> jax.Array:
        """Returns tokens (b, 1 + k, d) of the patches whose indices (b, k) are given.

        Patches are chosen before they are embedded: no work is done for the others.
        """
        chosen = patches.patchify(images, self.patch_size)
        chosen = jnp.take_along_axis(chosen, visible[:, :, None], axis=1)
        tokens = self.encoder.patch_embed.proj(chosen).astype(jnp.float32)
        places = pretext.fixed_positions(self.encoder)[0, 1:]
        return pretext.encode(self.encoder, tokens + jnp.take(places, visible, axis=0))

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        """Opens a folder of `ViTMAEForPreTraining`, such as facebook/vit-mae-base."""
        settings = pretrained.read_config(path)
        if settings.get("model_type") != mae_names.MODEL_TYPE:
            raise configs.ConfigError(
                f"{path} has no {pretrained.CONFIG_NAME} of model_type "
                f"{mae_names.MODEL_TYPE!r}, as a whole masked autoencoder needs."
            )
        arguments = recording.merged(mae_names.arguments(settings), overrides)
        source = mae_names.canonical(sources.open_tensors(path, part))
        return pretrained.Weights(arguments, mae_names.table(**arguments), source)

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        """Describes a folder that `ViTMAEForPreTraining` of transformers loads."""
        config, preprocessor = mae_names.settings(**arguments)
        return writers.Export(
            mae_names.table(**arguments),
            writers.WEIGHTS_NAME,
            configs={
                pretrained.CONFIG_NAME: config,
                vit_encoder.PREPROCESSOR_NAME: preprocessor,
            },
        )


class MAEDecoder(nnx.Module):
    """Tokens of the seen patches to predictions of all patches."""

    def __init__(
        self,
        in_features: int,
        grid: int,
        out_features: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        intermediate_size: int,
        *,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
    ):
        eps = encoder_names.FAMILIES[FAMILY].layer_norm_eps
        self.embed = linear.linear(in_features, hidden_size, dtype=dtype, rngs=rngs)
        make_block: Any = partial(
            vit.ViTBlock,
            hidden_size,
            num_heads,
            intermediate_size,
            layer_norm_eps=eps,
            dtype=dtype,
        )
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        self.norm = norm.LayerNorm(hidden_size, eps=eps, rngs=rngs)
        self.pred = linear.linear(hidden_size, out_features, dtype=dtype, rngs=rngs)
        pretext.draw_xavier(self, rngs)
        shape = (1, 1, hidden_size)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.pos_embed = nnx.Param(pretext.table(hidden_size, grid))

    def __call__(self, latent: jax.Array, places: jax.Array) -> jax.Array:
        """Maps tokens (b, 1 + k, c) to patches (b, n, p) float32.

        Args:
            latent: The class token and those of the seen patches.
            places: (b, n), the index among the k of each patch, k or more for those
                not seen.
        """
        x = self.embed(latent).astype(jnp.float32)
        seen = x.shape[1] - 1
        index = jnp.minimum(places, seen - 1)[:, :, None]
        found = jnp.take_along_axis(x[:, 1:], index, axis=1)
        is_seen = (places < seen)[:, :, None]
        tokens = jnp.where(is_seen, found, self.mask_token[...])
        x = jnp.concatenate([x[:, :1], tokens], axis=1)
        x = self.blocks(x + jax.lax.stop_gradient(self.pos_embed[...]))
        return self.pred(self.norm(x[:, 1:])).astype(jnp.float32)


def _num_visible(num_patches: int, mask_ratio: float) -> int:
    """Returns how many patches are seen, truncated as in the official code."""
    visible = int(num_patches * (1 - mask_ratio))
    if not 0 < visible < num_patches:
        raise configs.ConfigError(
            f"mask_ratio = {mask_ratio} leaves {visible} of {num_patches} patches to "
            "see; give one that leaves at least one to see and one to predict."
        )
    return visible
