"""Images to tokens and back. Tokens are row-major; features are (row, column, c)."""

import math

import jax
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import linear


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts (b, h, w, c) into tokens (b, n, patch_size^2 * c), channel fastest.

    Raises:
        ValueError: If height or width is not a multiple of the patch size.
    """
    b, h, w, c = images.shape
    p = patch_size
    if h % p or w % p:
        raise ValueError(f"Image size {h}x{w} is not a multiple of patch_size {p}.")
    x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
    tokens: jax.Array, patch_size: int, grid: tuple[int, int] | None = None
) -> jax.Array:
    """Joins tokens (b, n, patch_size^2 * c) to images (b, h, w, c).

    Args:
        tokens: What `patchify` returns.
        patch_size: Height and width of a patch.
        grid: Patches per column and per row; square when None.

    Raises:
        ValueError: If the tokens do not fill the grid, or a patch has no whole
            number of channels.
    """
    b, n, d = tokens.shape
    p = patch_size
    rows, columns = grid or (math.isqrt(n), math.isqrt(n))
    if rows * columns != n:
        raise ValueError(f"{n} tokens do not fill a grid of {rows}x{columns}.")
    if d % (p * p):
        raise ValueError(f"Token width {d} is not a multiple of patch_size^2, {p * p}.")
    x = tokens.reshape(b, rows, columns, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * p, columns * p, -1)


class PatchEmbed(nnx.Module):
    """Linear map of patches, equal to a convolution with stride `patch_size`."""

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        *,
        dtype: DTypeLike = "float32",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.proj = linear.linear(
            patch_size**2 * in_channels, hidden_size, dtype=dtype, init=init, rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) to tokens (b, n, d) in `dtype`."""
        return self.proj(patchify(images, self.patch_size))
