"""Pixels as latents: patches of the image, and nothing trained.

The space that pixel diffusion works in, in the shape of an encoder's: the baseline that
tells what a representation is worth. Pixels are in [-1, 1], which is near to what the
diffusion's noise expects, so latents need no statistics.
"""

import jax
from flax import nnx

from rae_jax.layers import patches
from rae_jax.models import pretrained

_CHANNELS = 3
_HALF = (0.5, 0.5, 0.5)


class PixelEncoder(pretrained.Pretrained, nnx.Module):
    """Normalised images to their patches, which are the tokens. It has no parameters.

    Args:
        image_size: Image height and width, in pixels.
        patch_size: Height and width of a patch.

    Raises:
        ValueError: If patches do not tile the image.

    Attributes:
        input_size: Image height and width that the autoencoder resizes to.
        hidden_size: Values of a patch, patch_size^2 * 3, channel fastest.
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
    """

    image_mean = image_std = _HALF

    def __init__(self, image_size: int, patch_size: int):
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}."
            )
        self.input_size, self.patch_size = image_size, patch_size
        self.hidden_size = patch_size**2 * _CHANNELS

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size)."""
        return patches.patchify(images, self.patch_size)


class PixelDecoder(pretrained.Pretrained, nnx.Module):
    """The inverse of `PixelEncoder`.

    Attributes:
        grid: Patches per side.
        patch_size: Height and width of a patch.
    """

    def __init__(self, image_size: int, patch_size: int):
        self.grid, self.patch_size = image_size // patch_size, patch_size

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (b, n, hidden_size) to normalised images (b, h, w, 3)."""
        return patches.unpatchify(tokens, self.patch_size)
