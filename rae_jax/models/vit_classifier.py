"""A vision transformer with a linear classifier on one vector per image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from rae_jax import config as configs
from rae_jax.layers import linear, norm
from rae_jax.models import vit_encoder

TOKENS = ("mean", "cls")
INIT_STD = 2e-5  # Of the classifier, as MAE fine-tunes.


class ViTClassifier(nnx.Module):
    """Images in [0, 1] to class scores.

    The vector is the mean of the patch tokens after the last block, behind a LayerNorm
    of its own, or the class token behind the encoder's last norm (arXiv:2111.06377).

    Args:
        make_encoder: Makes a `ViTEncoder`, called with `normalize` and `rngs`.
        num_classes: Number of classes.
        token: "mean" or "cls".
        rngs: Randomness of the initial values.

    Raises:
        ConfigError: The token does not exist.
    """

    def __init__(
        self,
        make_encoder: Callable[..., vit_encoder.ViTEncoder],
        num_classes: int,
        *,
        token: str = "mean",
        rngs: nnx.Rngs,
    ):
        if token not in TOKENS:
            raise configs.ConfigError(configs.suggest(token, TOKENS, "token"))
        self.is_mean = token == "mean"
        self.encoder = make_encoder(normalize=self.is_mean, rngs=rngs)
        if not self.is_mean and self.encoder.cls_token is None:
            raise configs.ConfigError(
                f"token = 'cls', but encoders {self.encoder.name!r} have no class "
                "token: set it to 'mean'."
            )
        width = self.encoder.hidden_size
        self.norm = norm.LayerNorm(width, rngs=rngs) if self.is_mean else None
        self.head = linear.linear(width, num_classes, init="zeros", rngs=rngs)
        draw = jax.random.truncated_normal(
            rngs.params(), -2, 2, self.head.kernel.shape, jnp.float32
        )
        self.head.kernel[...] = INIT_STD * draw

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.encoder.blocks.depth

    def __call__(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Returns class scores (b, num_classes) float32.

        Args:
            images: (b, h, w, 3) in [0, 1].
            keep: Factors (depth, 2, b) of the blocks' branches, see `vit.draw_keep`.
        """
        encoder = self.encoder
        mean, std = (
            jnp.asarray(values, jnp.float32)[None, None, None, :]
            for values in (encoder.image_mean, encoder.image_std)
        )
        (x,) = encoder.block_tokens((images - mean) / std, [self.depth - 1], keep)
        if self.is_mean:
            x = self.norm(jnp.mean(x[:, encoder.prefix :], axis=1))
        else:
            x = encoder.norm(x[:, 0])
        return self.head(x)
