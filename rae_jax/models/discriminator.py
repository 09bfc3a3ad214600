"""The critic of RAE's decoder: small 1-D convolutional heads on a frozen DINO.

The heads are those of StyleGAN-T (arXiv:2301.09515) as RAE's official code has them:
they see the tokens of a few blocks as sequences. The backbone is not part of this
module; `critic_features` runs any encoder that offers `block_features`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import partition, resize

IMAGE_SIZE = 224
BLOCKS = (2, 5, 8, 11)  # Of DINO ViT-S/8, whose depth is 12.
_NORM_EPS = 1e-6
_LENGTH_EPS = 1e-12
_SLOPE = 0.2


class Backbone(Protocol):
    """A frozen encoder that gives the tokens of some of its blocks.

    Attributes:
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def block_features(
        self, images: jax.Array, indices: Sequence[int]
    ) -> Sequence[jax.Array]:
        """Maps normalised images to patch tokens (b, n, d) after blocks `indices`.

        No final norm is applied and class or register tokens are dropped.
        """


class SpectralVector(nnx.Variable):
    """A singular vector of a kernel: state that is iterated, not trained."""


def preprocess(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], size: int
) -> jax.Array:
    """Returns what the frozen backbone sees, (b, size, size, 3) float32.

    Args:
        images: (b, h, w, 3) in [-1, 1], where augmentations see grey as 0; values
            beyond are not clipped.
        mean: Channel means that normalise images in [0, 1] for the backbone.
        std: Channel deviations likewise.
        size: Side after bilinear resizing, without antialiasing even when smaller.
    """
    x = resize.resize_bilinear(images, size, size)
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    scale, shift = 0.5 / std, (0.5 - mean) / std
    return x * scale[None, None, None, :] + shift[None, None, None, :]


def critic_features(
    backbone: Backbone,
    images: jax.Array,
    *,
    blocks: Sequence[int] = BLOCKS,
    size: int = IMAGE_SIZE,
) -> list[jax.Array]:
    """Returns the features of images for the heads, each (b, n, d).

    The first is a second copy of the last block's, so that one has two heads, as in
    the official code.

    Args:
        backbone: The frozen encoder; officially DINO ViT-S/8 with the tanh form of
            GELU.
        images: (b, h, w, 3) in [-1, 1].
        blocks: Blocks to read, ascending, the last block of the backbone last.
        size: Side in pixels that the backbone sees.
    """
    x = preprocess(images, backbone.image_mean, backbone.image_std, size)
    features = list(backbone.block_features(x, tuple(blocks)))
    return [features[-1], *features]


class Conv(nnx.Module):
    """A 1-D convolution over tokens, circular, of constant length.

    With spectral normalisation the kernel is divided by an estimate of its largest
    singular value, u^T W v. The vectors are constants of the forward pass: gradients
    reach the estimate through W alone. They improve by `power_iteration`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        *,
        spectral_norm: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}.")
        fan_in = in_features * kernel_size
        shape = (kernel_size, in_features, out_features)
        self.kernel = nnx.Param(_uniform(rngs, shape, fan_in))
        self.bias = nnx.Param(_uniform(rngs, (out_features,), fan_in))
        self.spectral_norm = spectral_norm
        if spectral_norm:
            self.u = SpectralVector(_direction(rngs, out_features))
            self.v = SpectralVector(_direction(rngs, fan_in))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (b, n, in_features) to (b, n, out_features) in `dtype`."""
        kernel = partition.gather(self.kernel[...], jnp.float32)
        if self.spectral_norm:
            kernel = kernel / _spectral_norm(kernel, self.u[...], self.v[...])
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        size, n = kernel.shape[0], x.shape[1]
        half = size // 2
        if half:
            x = jnp.concatenate([x[:, -half:], x, x[:, :half]], axis=1)
        # One product per tap: on CPUs the gradient of a convolution to its kernel
        # takes many times longer inside a conditional, where the critic's step is.
        y = sum(
            jnp.matmul(x[:, i : i + n], kernel[i], preferred_element_type=jnp.float32)
            for i in range(size)
        )
        return y.astype(self.dtype) + self.bias[...].astype(self.dtype)[None, None, :]


class GroupNorm(nnx.Module):
    """Normalises each sample over its tokens and over groups of channels, in float32.

    With as many groups as channels it is an instance norm, the "bn" of the official
    code, whose batch norm has a virtual batch of one.
    """

    def __init__(self, dim: int, groups: int, *, rngs: nnx.Rngs):
        if dim % groups:
            raise ValueError(f"{groups} groups do not divide {dim} channels.")
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (b, n, d) of any float type to (b, n, d) float32."""
        b, n, d = x.shape
        x = x.astype(jnp.float32).reshape(b, n, self.groups, -1)
        x = x - jnp.mean(x, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=(1, 3), keepdims=True)
        x = (x * jax.lax.rsqrt(variance + _NORM_EPS)).reshape(b, n, d)
        return x * self.scale[...][None, None, :] + self.bias[...][None, None, :]


class Head(nnx.Module):
    """Maps the tokens of one block to one logit per token."""

    def __init__(
        self, hidden_size: int, kernel_size: int, groups: int, *, rngs: nnx.Rngs, **conv
    ):
        self.conv1 = Conv(hidden_size, hidden_size, rngs=rngs, **conv)
        self.norm1 = GroupNorm(hidden_size, groups, rngs=rngs)
        self.conv2 = Conv(hidden_size, hidden_size, kernel_size, rngs=rngs, **conv)
        self.norm2 = GroupNorm(hidden_size, groups, rngs=rngs)
        self.conv3 = Conv(hidden_size, 1, rngs=rngs, **conv)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (b, n, d) to logits (b, n) float32."""
        x = jax.nn.leaky_relu(self.norm1(self.conv1(x)), _SLOPE)
        h = jax.nn.leaky_relu(self.norm2(self.conv2(x)), _SLOPE)
        x = (x + h) / np.float32(np.sqrt(2.0))
        return self.conv3(x)[..., 0].astype(jnp.float32)


class Discriminator(nnx.Module):
    """One head per feature of `critic_features`.

    The official code iterates the spectral vectors once before each forward pass of
    a discriminator step, so twice per step, for fakes and then for real images; the
    generator's step and inference use them as they are. Here the forward pass always
    uses them as they are, and the step calls `power_iteration`:

        graphdef, params, vectors = nnx.split(model, nnx.Param, SpectralVector)
    """

    def __init__(
        self,
        hidden_size: int = 384,
        num_features: int = 5,
        *,
        kernel_size: int = 9,
        norm_groups: int | None = None,
        spectral_norm: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        """Builds independent heads; defaults are those of RAE on DINO ViT-S/8.

        Args:
            hidden_size: Width of the features.
            num_features: Number of features and of heads.
            kernel_size: Width of each head's second convolution, odd.
            norm_groups: Groups of channels that are normalised together; None for
                one per channel.
            spectral_norm: Whether kernels are divided by their spectral norm.
            dtype: Type of the products; norms and logits are float32.
            rngs: Randomness of the initial values.
        """
        groups = hidden_size if norm_groups is None else norm_groups
        conv = dict(spectral_norm=spectral_norm, dtype=dtype)
        self.heads = nnx.List(
            Head(hidden_size, kernel_size, groups, rngs=rngs, **conv)
            for _ in range(num_features)
        )

    def __call__(self, features: Sequence[jax.Array]) -> jax.Array:
        """Maps features, each (b, n, d), to logits (b, num_features * n) float32."""
        pairs = zip(self.heads, features, strict=True)
        return jnp.concatenate([head(x) for head, x in pairs], axis=1)


def power_iteration(params: Mapping, vectors: Mapping) -> dict[Any, Any]:
    """Returns the spectral vectors after one power iteration on their kernels.

    Args:
        params: Parameters of a `Discriminator` as a plain nested dict.
        vectors: Its spectral vectors likewise, {"u": (o,), "v": (i k,)} per kernel.
    """
    if "u" in vectors:
        matrix = _matrix(params["kernel"])
        v = _unit(_dot(matrix.T, vectors["u"]))
        return {"u": _unit(_dot(matrix, v)), "v": v}
    return {k: power_iteration(params[k], part) for k, part in vectors.items()}


def _spectral_norm(kernel: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    u, v = jax.lax.stop_gradient(u), jax.lax.stop_gradient(v)
    return _dot(u, _dot(_matrix(kernel), v))


def _matrix(kernel: jax.Array) -> jax.Array:
    """A kernel (k, i, o) as the matrix (o, i k) of the official code."""
    return kernel.transpose(2, 1, 0).reshape(kernel.shape[2], -1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), _LENGTH_EPS)


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """PyTorch's default initial values of a convolution."""
    bound = fan_in**-0.5
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def _direction(rngs: nnx.Rngs, size: int) -> jax.Array:
    return _unit(jax.random.normal(rngs.params(), (size,)))
