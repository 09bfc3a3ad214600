"""The KL autoencoder of latent diffusion (arXiv:2112.10752), diffusers' AutoencoderKL.

Its latents are the alternative that RAE compares with: four channels at an eighth of
the image's side, Gaussian given the image. Images inside are in [-1, 1].
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.convert import kl_names, sources, tables
from rae_jax.layers import convolution
from rae_jax.models import pretrained, recording, writers

_LOG_VARIANCES = (-30.0, 20.0)  # Clipped to these, as in the original code.
_HALF = (0.5, 0.5, 0.5)


class KLEncoder(pretrained.Pretrained, nnx.Module):
    """Images to the mean and log variance of their latents.

    Args: See `AutoencoderKL`.

    Attributes:
        input_size: Image height and width that latents are made of.
        patch_size: Pixels per latent and side.
        hidden_size: Channels of a latent.
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
    """

    image_mean = image_std = _HALF

    def __init__(
        self,
        image_size: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        *,
        scaling_factor: float = kl_names.SCALING_FACTOR,
        shift_factor: float = 0.0,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.input_size, self.hidden_size = image_size, latent_channels
        self.patch_size = _patch_size(image_size, block_out_channels)
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        c, moments = block_out_channels[-1], 2 * latent_channels
        options = dict(dtype=dtype, rngs=rngs)
        self.conv_in = convolution.conv(3, block_out_channels[0], **options)
        self.levels = nnx.List([])
        width = block_out_channels[0]
        for i, channels in enumerate(block_out_channels):
            self.levels.append(
                convolution.Level(
                    width,
                    channels,
                    norm_num_groups,
                    layers_per_block,
                    "half" if i < len(block_out_channels) - 1 else "same",
                    **options,
                )
            )
            width = channels
        self.mid = convolution.Middle(
            c, norm_num_groups, mid_block_add_attention, **options
        )
        self.norm_out = convolution.GroupNorm(c, norm_num_groups, rngs=rngs)
        self.conv_out = convolution.conv(c, moments, **options)
        self.quant = (
            convolution.conv(moments, moments, 1, **options) if use_quant_conv else None
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to moments (b, n, 2c), as tokens."""
        moments = self.moments(images)
        return moments.reshape(moments.shape[0], -1, moments.shape[-1])

    def moments(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, H, W, 3) to moments (b, h, w, 2c) float32.

        The first half of the channels are means, the second logarithms of variances.

        Raises:
            ValueError: If H or W is not a multiple of the patch size.
        """
        _, height, width, _ = images.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Image size {height}x{width} is not a multiple of {self.patch_size}."
            )
        x = self.conv_in(images).astype(jnp.float32)
        for level in self.levels:
            x = level(x)
        x = self.conv_out(nnx.silu(self.norm_out(self.mid(x))))
        x = x if self.quant is None else self.quant(x)
        return x.astype(jnp.float32)

    def latents(self, moments: jax.Array, eps: jax.Array | None = None) -> jax.Array:
        """Maps moments (b, h, w, 2c) to scaled latents (b, h, w, c).

        Args:
            moments: See `moments`.
            eps: Standard normal noise (b, h, w, c); None for the means.
        """
        mean, log_variance = self.gaussian(moments)
        if eps is not None:
            mean = mean + jnp.exp(0.5 * log_variance) * eps
        return (mean - self.shift_factor) * self.scaling_factor

    def variances(self, moments: jax.Array) -> jax.Array:
        """Maps moments (b, h, w, 2c) to the variances (b, h, w, c) of the latents."""
        return jnp.exp(self.gaussian(moments)[1]) * self.scaling_factor**2

    def gaussian(self, moments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps moments (b, h, w, 2c) to means and log variances, each (b, h, w, c)."""
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCES)


class KLDecoder(pretrained.Pretrained, nnx.Module):
    """Scaled latents to images in [-1, 1], not clipped.

    Args: See `AutoencoderKL`.

    Attributes:
        grid: Latents per side of an image of `image_size` pixels.
        patch_size: Pixels per latent and side.
    """

    def __init__(
        self,
        image_size: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        *,
        scaling_factor: float = kl_names.SCALING_FACTOR,
        shift_factor: float = 0.0,
        mid_block_add_attention: bool = True,
        use_post_quant_conv: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.patch_size = _patch_size(image_size, block_out_channels)
        self.grid = image_size // self.patch_size
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        c, options = latent_channels, dict(dtype=dtype, rngs=rngs)
        width, groups = block_out_channels[-1], norm_num_groups
        self.quant = (
            convolution.conv(c, c, 1, **options) if use_post_quant_conv else None
        )
        self.conv_in = convolution.conv(c, width, **options)
        self.mid = convolution.Middle(width, groups, mid_block_add_attention, **options)
        self.levels = nnx.List([])
        for i, channels in reversed(list(enumerate(block_out_channels))):
            sides = "double" if i else "same"
            self.levels.append(
                convolution.Level(
                    width, channels, groups, layers_per_block + 1, sides, **options
                )
            )
            width = channels
        self.norm_out = convolution.GroupNorm(width, groups, rngs=rngs)
        self.conv_out = convolution.conv(width, 3, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps latents (b, n, c), n a square number, to images (b, h, w, 3)."""
        b, n, c = tokens.shape
        side = math.isqrt(n)
        return self.images(tokens.reshape(b, side, side, c))

    def images(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, h, w, c) to images (b, H, W, 3) float32 in [-1, 1]."""
        return self.pixels(self.features(z))

    def features(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, h, w, c) to what the last layer sees, (b, H, W, d)."""
        x = z / self.scaling_factor + self.shift_factor
        x = x if self.quant is None else self.quant(x)
        x = self.mid(self.conv_in(x).astype(jnp.float32))
        for level in self.levels:
            x = level(x)
        return nnx.silu(self.norm_out(x))

    def pixels(self, features: jax.Array) -> jax.Array:
        """Maps `features` to images (b, H, W, 3) by the last layer, `conv_out`."""
        return self.conv_out(features).astype(jnp.float32)


class AutoencoderKL(pretrained.Pretrained, nnx.Module):
    """Encoder and decoder of latent diffusion, float32 but for the products.

    `from_pretrained` reads folders of diffusers; of a bare weight file it takes the
    group count, the scaling factor and the image size to be those of Stable Diffusion
    unless they are given. `rae.RAE.from_kl` makes it an autoencoder as any other.

    Args:
        image_size: Height and width of the images that it was trained for; other sizes
            that are multiples of `patch_size` work as well.
        latent_channels: Channels of a latent.
        block_out_channels: Width of each level; between levels the sides are halved.
        layers_per_block: Residual blocks per level; the decoder has one more.
        norm_num_groups: Groups of all norms.
        scaling_factor: By which latents are multiplied, ...
        shift_factor: ... after this was subtracted.
        mid_block_add_attention: Whether the middle has attention.
        use_quant_conv: Whether a linear map follows the encoder.
        use_post_quant_conv: Whether a linear map precedes the decoder.
        dtype: Type of the products.
        rngs: Randomness of the initial values.

    Raises:
        ValueError: Sizes do not fit together.
    """

    layouts = (pretrained.OWN_LAYOUT, "diffusers")

    def __init__(
        self,
        *,
        image_size: int = 256,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = kl_names.SCALING_FACTOR,
        shift_factor: float = 0.0,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        sizes = (image_size, latent_channels, tuple(block_out_channels))
        sizes += (layers_per_block, norm_num_groups)
        shared: dict[str, Any] = dict(
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            mid_block_add_attention=mid_block_add_attention,
            dtype=dtype,
            rngs=rngs,
        )
        self.encoder = KLEncoder(*sizes, use_quant_conv=use_quant_conv, **shared)
        self.decoder = KLDecoder(
            *sizes, use_post_quant_conv=use_post_quant_conv, **shared
        )

    def encode(self, images: jax.Array, eps: jax.Array | None = None) -> jax.Array:
        """Maps images (b, H, W, 3) in [0, 1] to scaled latents (b, h, w, c).

        Args:
            images: Sides are multiples of the patch size.
            eps: Standard normal noise (b, h, w, c); None for the means.
        """
        moments = self.encoder.moments((images.astype(jnp.float32) - 0.5) / 0.5)
        return self.encoder.latents(moments, eps)

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps scaled latents (b, h, w, c) to images (b, H, W, 3), not clipped."""
        return self.decoder.images(z) * 0.5 + 0.5

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        source = kl_names.canonical(sources.open_tensors(path, part))
        arguments = recording.merged(read_arguments(path, source), overrides)
        return pretrained.Weights(arguments, kl_names.table(arguments), source)

    @classmethod
    def export(
        cls, layout: str, arguments: pretrained.Arguments, ours: tables.Source
    ) -> writers.Export:
        return writers.Export(
            kl_names.table(arguments),
            kl_names.WEIGHTS_NAME,
            configs={pretrained.CONFIG_NAME: kl_names.settings_of(arguments)},
        )


def read_arguments(
    path: Path, source: tables.Source | None = None
) -> pretrained.Arguments:
    """Returns what is known of an autoencoder's constructor arguments.

    Args:
        path: Its folder or file, of any layout.
        source: Its tensors in the canonical spelling, if they are open already.

    Raises:
        ValueError: The folder describes something else.
    """
    settings = pretrained.read_config(path)
    if settings.get("class") == AutoencoderKL.__name__:
        return settings["arguments"]
    if settings:
        return kl_names.arguments(settings, str(path))
    source = source or kl_names.canonical(sources.open_tensors(path))
    return kl_names.arguments_of_shapes(source.shapes)


def _patch_size(image_size: int, block_out_channels: Sequence[int]) -> int:
    """Returns how many pixels a latent has per side."""
    size = 2 ** (len(block_out_channels) - 1)
    if image_size % size:
        raise ValueError(
            f"image_size {image_size} is not a multiple of {size}, the pixels per "
            f"latent of {len(block_out_channels)} levels."
        )
    return size
