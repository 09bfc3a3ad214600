"""The Inception network of FID, Inception Score and sFID, for inference.

Inception-v3 (arXiv:1512.00567) as in the TensorFlow graph of 2015 that these scores
are defined with; its ports call it "inception-v3-compat" (torch-fidelity) or the FID
Inception (pytorch-fid). It differs from later versions of the network: average pools
do not count padding, the last block pools by maximum, there are 1008 classes, and
images are resized as TensorFlow 1 did.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

IMAGE_SIZE = 299
FEATURE_DIM = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7

_NORM_EPS = 1e-3
# The features are a measure: they must not depend on the device's default precision.
_PRECISION = jax.lax.Precision.HIGHEST


class Unit(NamedTuple):
    """A convolution with its name in a block; of stride 2, it adds no padding."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Block(NamedTuple):
    """Chains of units side by side and a pooled branch, joined along channels.

    Attributes:
        chains: Each a tuple of units; a tuple at its end stands for units side by side.
        pool: "average" or "max" of 3 x 3 windows around each position, followed by a
            unit of `pool_features`; or "reduce", the maximum at stride 2 alone.
        pool_features: Width of the pooled branch.
    """

    chains: tuple
    pool: str
    pool_features: int = 0


class Activations(NamedTuple):
    """What the scores are made of.

    Attributes:
        pool: Last features, averaged over positions, (b, 2048), for FID.
        spatial: The first seven channels of a layer halfway, (b, 17 * 17 * 7), rows
            first and channels last, for sFID.
    """

    pool: jax.Array
    spatial: jax.Array


def _narrow(pool_features: int) -> Block:
    double = (
        Unit("branch3x3dbl_1", 64),
        Unit("branch3x3dbl_2", 96, (3, 3)),
        Unit("branch3x3dbl_3", 96, (3, 3)),
    )
    wide = (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5)))
    chains = ((Unit("branch1x1", 64),), wide, double)
    return Block(chains, "average", pool_features)


def _factorised(c: int) -> Block:
    """Convolutions of 7 x 7 as products of a row and a column."""
    row, column = (1, 7), (7, 1)
    single = (
        Unit("branch7x7_1", c),
        Unit("branch7x7_2", c, row),
        Unit("branch7x7_3", 192, column),
    )
    double = (
        Unit("branch7x7dbl_1", c),
        Unit("branch7x7dbl_2", c, column),
        Unit("branch7x7dbl_3", c, row),
        Unit("branch7x7dbl_4", c, column),
        Unit("branch7x7dbl_5", 192, row),
    )
    return Block(((Unit("branch1x1", 192),), single, double), "average", 192)


def _wide(pool: str) -> Block:
    def pair(name: str) -> tuple[Unit, Unit]:
        return Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))

    double = (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3)))
    chains = (
        (Unit("branch1x1", 320),),
        (Unit("branch3x3_1", 384), pair("branch3x3_2")),
        (*double, pair("branch3x3dbl_3")),
    )
    return Block(chains, pool, 192)


_TO_17 = Block(
    (
        (Unit("branch3x3", 384, (3, 3), 2),),
        (
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3), 2),
        ),
    ),
    "reduce",
)
_TO_8 = Block(
    (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2)),
        (
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, (3, 3), 2),
        ),
    ),
    "reduce",
)
BLOCKS = {
    "mixed_5b": _narrow(32),
    "mixed_5c": _narrow(64),
    "mixed_5d": _narrow(64),
    "mixed_6a": _TO_17,
    "mixed_6b": _factorised(128),
    "mixed_6c": _factorised(160),
    "mixed_6d": _factorised(160),
    "mixed_6e": _factorised(192),
    "mixed_7a": _TO_8,
    "mixed_7b": _wide("average"),
    "mixed_7c": _wide("max"),
}
# "mixed_6/conv" of the TensorFlow graph, whose blocks are counted from "mixed".
_SPATIAL_BLOCK = "mixed_6d"


class ConvNorm(nnx.Module):
    """A convolution without bias, a batch norm with fixed statistics and a ReLU."""

    def __init__(
        self,
        channels: int,
        features: int,
        kernel: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        padding: str = "SAME",
        rngs: nnx.Rngs,
    ):
        shape = (*kernel, channels, features)
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.Param(jnp.zeros(features))
        self.var = nnx.Param(jnp.ones(features))
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, channels) to (b, h', w', features)."""
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + _NORM_EPS)
        shift = self.bias[...] - self.mean[...] * scale
        return nnx.relu(x * scale[None, None, None, :] + shift[None, None, None, :])


class Mixed(nnx.Module):
    """A block of the network; its units are attributes by name."""

    def __init__(self, channels: int, block: Block, *, rngs: nnx.Rngs):
        self.block = nnx.static(block)
        self.features = 0
        for chain in block.chains:
            width = channels
            for step in chain:
                units = (step,) if isinstance(step, Unit) else step
                for unit in units:
                    setattr(self, unit.name, _make_unit(width, unit, rngs))
                width = sum(unit.features for unit in units)
            self.features += width
        if block.pool == "reduce":
            self.features += channels
        else:
            self.branch_pool = ConvNorm(channels, block.pool_features, rngs=rngs)
            self.features += block.pool_features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) to (b, h', w', features)."""
        outputs = [self._run(chain, x) for chain in self.block.chains]
        if self.block.pool == "reduce":
            return jnp.concatenate([*outputs, _reduce(x)], axis=-1)
        pooled = _average(x) if self.block.pool == "average" else _maximum(x)
        return jnp.concatenate([*outputs, self.branch_pool(pooled)], axis=-1)

    def _run(self, chain: tuple, x: jax.Array) -> jax.Array:
        for step in chain:
            units = (step,) if isinstance(step, Unit) else step
            parts = [getattr(self, unit.name)(x) for unit in units]
            x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        return x


class InceptionV3(nnx.Module):
    """Maps 8-bit images to the features that FID, Inception Score and sFID compare.

    Everything is float32. Pass the parameters to jit as an argument; the compiler
    would fold the convolutions of constants.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_1a_3x3 = ConvNorm(3, 32, (3, 3), stride=2, padding="VALID", rngs=rngs)
        self.conv_2a_3x3 = ConvNorm(32, 32, (3, 3), padding="VALID", rngs=rngs)
        self.conv_2b_3x3 = ConvNorm(32, 64, (3, 3), rngs=rngs)
        self.conv_3b_1x1 = ConvNorm(64, 80, rngs=rngs)
        self.conv_4a_3x3 = ConvNorm(80, 192, (3, 3), padding="VALID", rngs=rngs)
        channels = 192
        for name, block in BLOCKS.items():
            mixed = Mixed(channels, block, rngs=rngs)
            setattr(self, name, mixed)
            channels = mixed.features
        self.fc = nnx.Linear(channels, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> Activations:
        """Returns the features of uint8 images (b, h, w, 3) of any size.

        Raises:
            ValueError: The images are not uint8, on which the scores are defined;
                rounding changes them.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise ValueError(
                "Inception takes uint8 images (b, h, w, 3), not "
                f"{images.dtype} {images.shape}."
            )
        x = resize_like_tensorflow1(images.astype(jnp.float32), IMAGE_SIZE, IMAGE_SIZE)
        return self.activations((x - 128.0) / 128.0)

    def activations(self, x: jax.Array) -> Activations:
        """Returns the features of resized images (b, 299, 299, 3) in [-1, 1]."""
        x = self.conv_2b_3x3(self.conv_2a_3x3(self.conv_1a_3x3(x)))
        x = _reduce(x)  # (b, 73, 73, 64)
        x = self.conv_4a_3x3(self.conv_3b_1x1(x))
        x = _reduce(x)  # (b, 35, 35, 192)
        inputs = {}
        for name in BLOCKS:
            inputs[name] = x
            x = getattr(self, name)(x)
        spatial = getattr(self, _SPATIAL_BLOCK).branch1x1(inputs[_SPATIAL_BLOCK])
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        return Activations(jnp.mean(x, axis=(1, 2)), spatial)

    def logits(self, pool: jax.Array, *, use_bias: bool = False) -> jax.Array:
        """Returns class scores (b, 1008) of pooled features (b, 2048).

        Inception Scores are computed without the bias, an oversight of the first
        implementation that all later ones keep.
        """
        scores = jnp.dot(pool, self.fc.kernel[...], precision=_PRECISION)
        return scores + self.fc.bias[...][None, :] if use_bias else scores


def resize_like_tensorflow1(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes (b, h, w, c) float32 bilinearly to (b, height, width, c).

    Pixels are points at their upper left corners: output i reads position
    i * h / height, so images move by up to half a pixel, and the last rows and columns
    repeat. There is no antialiasing. Positions are rounded to float32 there, and here.
    """
    _, h, w, _ = images.shape
    images = _interpolate(images, 2, *_taps(w, width))
    return _interpolate(images, 1, *_taps(h, height))


def _taps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper neighbour of each output position, and the upper's weight."""
    positions = np.arange(m, dtype=np.float32) * np.float32(n / m)
    low = positions.astype(np.int32)
    return low, np.minimum(low + 1, n - 1), positions - low.astype(np.float32)


def _interpolate(
    x: jax.Array, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray
) -> jax.Array:
    shape = [1] * x.ndim
    shape[axis] = len(weight)
    a, b = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
    return a + (b - a) * weight.reshape(shape)


def _make_unit(channels: int, unit: Unit, rngs: nnx.Rngs) -> ConvNorm:
    return ConvNorm(
        channels,
        unit.features,
        unit.kernel,
        stride=unit.stride,
        padding="SAME" if unit.stride == 1 else "VALID",
        rngs=rngs,
    )


def _reduce(x: jax.Array) -> jax.Array:
    """Maximum of 3 x 3 windows at stride 2, inside the image."""
    return nnx.max_pool(x, (3, 3), (2, 2))


def _maximum(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), (1, 1), "SAME")


def _average(x: jax.Array) -> jax.Array:
    """Mean of the part of each 3 x 3 window that lies inside the image."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
