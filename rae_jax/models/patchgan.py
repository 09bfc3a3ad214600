"""The critic of latent diffusion's autoencoders: convolutions that judge patches.

Of pix2pix (arXiv:1611.07004), with the sizes of VQGAN (arXiv:2012.09841) and latent
diffusion (arXiv:2112.10752): each logit sees 70 x 70 pixels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.models import pretrained

_SLOPE = 0.2
_EPS = 1e-5
_STD = 0.02
_KERNEL = 4
_MAX_FACTOR = 8  # Of the first width.


class BatchNorm(nnx.Module):
    """Normalises channels over the batch, in float32, then scales and shifts them.

    A critic judges in training alone, so there are no running averages. The moments
    are those of the whole batch, on however many devices it lies.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        scale = 1 + _STD * jax.random.normal(rngs.params(), (channels,))
        self.scale, self.bias = nnx.Param(scale), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) of any float type to (b, h, w, c) float32."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=(0, 1, 2), keepdims=True)
        scale, bias = (p[...][None, None, None] for p in (self.scale, self.bias))
        return x * jax.lax.rsqrt(variance + _EPS) * scale + bias


class PatchGAN(pretrained.Pretrained, nnx.Module):
    """Maps images to one logit for each of their overlapping patches.

    Args:
        width: Channels of the first convolution; they double up to eight times that.
        num_layers: Convolutions that halve the sides; two that do not follow.
        dtype: Type of the products; norms and logits are float32.
        rngs: Randomness of the initial values.
    """

    def __init__(
        self,
        width: int = 64,
        num_layers: int = 3,
        *,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        widths = [width * min(2**i, _MAX_FACTOR) for i in range(num_layers + 1)]
        options = dict(dtype=jnp.dtype(dtype), rngs=rngs)
        self.conv_in = _conv(3, width, stride=2, **options)
        self.convs, self.norms = nnx.List([]), nnx.List([])
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < num_layers - 1 else 1
            # The norm subtracts whatever a bias would add.
            conv = _conv(before, after, stride=stride, use_bias=False, **options)
            self.convs.append(conv)
            self.norms.append(BatchNorm(after, rngs=rngs))
        self.conv_out = _conv(widths[-1], 1, stride=1, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (b, h, w, 3) in [-1, 1] to logits (b, h', w') float32.

        Raises:
            ValueError: The images are too small to be judged.
        """
        x = jax.nn.leaky_relu(self.conv_in(images), _SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), _SLOPE)
        x = self.conv_out(x)
        if not x.size:
            raise ValueError(
                f"Images of {images.shape[1]}x{images.shape[2]} pixels are too small "
                f"for a critic of {len(self.convs)} layers; give it fewer."
            )
        return x[..., 0].astype(jnp.float32)


def _conv(
    channels: int,
    width: int,
    *,
    stride: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    use_bias: bool = True,
) -> nnx.Conv:
    bound = (channels * _KERNEL**2) ** -0.5  # Of PyTorch's biases.

    def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Conv(
        channels,
        width,
        (_KERNEL, _KERNEL),
        strides=stride,
        padding=1,
        use_bias=use_bias,
        kernel_init=nnx.initializers.normal(_STD),
        bias_init=uniform,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )
