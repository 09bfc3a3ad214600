"""Convolutions, group norms and the blocks of convolutional autoencoders."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import attention, linear

SAME = ((1, 1), (1, 1))  # Padding of kernels of three.
RIGHT_AND_BELOW = ((0, 1), (0, 1))  # That of halving in latent diffusion's VAE.


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] = SAME,
    dtype: DTypeLike = "float32",
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Creates a convolution (b, h, w, in_channels) -> (b, h', w', out_channels).

    Parameters are float32, the kernel drawn from U(+-1/sqrt(fan in)), the bias zero;
    the product and its result are in `dtype`.
    """
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding if kernel_size > 1 else "VALID",
        kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Normalisation over positions and the channels of a group, in float32.

    Raises:
        ValueError: If the channels do not make up `groups` equal groups.
    """

    def __init__(
        self, channels: int, groups: int, *, eps: float = 1e-6, rngs: nnx.Rngs
    ):
        if channels % groups:
            raise ValueError(
                f"{channels} channels do not make up {groups} equal groups."
            )
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) of any float type to (b, h, w, c) float32."""
        b, h, w, c = x.shape
        x = x.astype(jnp.float32).reshape(b, h * w, self.groups, c // self.groups)
        x = x - jnp.mean(x, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=(1, 3), keepdims=True)
        x = (x * jax.lax.rsqrt(variance + self.eps)).reshape(b, h, w, c)
        scale, bias = (p[...].reshape(1, 1, 1, c) for p in (self.scale, self.bias))
        return x * scale + bias


class ResidualBlock(nnx.Module):
    """Two convolutions beside a shortcut, a map of 1 x 1 where widths differ."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        *,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(in_channels, groups, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        widths_differ = in_channels != out_channels
        self.shortcut = (
            conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)
            if widths_differ
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, in_channels) to (b, h, w, out_channels) float32."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return x.astype(jnp.float32) + h.astype(jnp.float32)


class SpatialAttention(nnx.Module):
    """Attention of every position to all others, with one head, as a residual."""

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, groups, rngs=rngs)
        options = dict(dtype=dtype, rngs=rngs)
        self.qkv = linear.linear(channels, 3 * channels, **options)
        self.proj = linear.linear(channels, channels, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) to (b, h, w, c) float32."""
        b, h, w, c = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, h * w, c)).reshape(b, h * w, 3, 1, c)
        # One head as wide as this has no kernel on any device.
        out = attention.attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        out = self.proj(out.reshape(b, h * w, c))
        return x + out.astype(jnp.float32).reshape(b, h, w, c)


class Level(nnx.Module):
    """Residual blocks at one resolution, then a change of the sides.

    Args:
        in_channels: Width of the input.
        channels: Width of the output.
        groups: Groups of the norms.
        count: Number of blocks.
        sides: "half", "double" or "same".
        dtype: Type of the products.
        rngs: Randomness of the initial values.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        groups: int,
        count: int,
        sides: str,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.sides = sides
        self.blocks = nnx.List([])
        for i in range(count):
            width = channels if i else in_channels
            self.blocks.append(
                ResidualBlock(width, channels, groups, dtype=dtype, rngs=rngs)
            )
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        if sides == "half":
            options |= dict(stride=2, padding=RIGHT_AND_BELOW)
        resamples = sides != "same"
        self.resample = conv(channels, channels, **options) if resamples else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, in_channels) to (b, h', w', channels) float32."""
        for block in self.blocks:
            x = block(x)
        if self.resample is None:
            return x
        x = double(x) if self.sides == "double" else x
        return self.resample(x).astype(jnp.float32)


class Middle(nnx.Module):
    """Two residual blocks at the lowest resolution, attention between them."""

    def __init__(
        self,
        channels: int,
        groups: int,
        attention: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        block, options = ResidualBlock, dict(dtype=dtype, rngs=rngs)
        self.first = block(channels, channels, groups, **options)
        self.attention = (
            SpatialAttention(channels, groups, **options) if attention else None
        )
        self.second = block(channels, channels, groups, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) to (b, h, w, c) float32."""
        x = self.first(x)
        x = x if self.attention is None else self.attention(x)
        return self.second(x)


def double(x: jax.Array) -> jax.Array:
    """Repeats every pixel of (b, h, w, c) in a square of two by two."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
