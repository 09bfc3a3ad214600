"""Normalisation over features and adaLN modulation, always in float32."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import sums


def _along_features(weight: jax.Array, ndim: int) -> jax.Array:
    return weight.reshape((1,) * (ndim - 1) + (-1,))


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed and returned in float32.

    The variance is the mean of squared deviations, not E[x^2] - E[x]^2, whose
    cancellation shows with the decoder's eps of 1e-12.
    """

    def __init__(
        self, dim: int, *, eps: float = 1e-6, affine: bool = True, rngs: nnx.Rngs
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim)) if affine else None
        self.bias = nnx.Param(jnp.zeros(dim)) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., d) of any float type to (..., d) float32."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.eps)
        if self.scale is None or self.bias is None:
            return x
        scale = _along_features(self.scale[...], x.ndim)
        return x * scale + _along_features(self.bias[...], x.ndim)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a weight, computed in float32."""

    def __init__(self, dim: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., d) of any float type to (..., d) float32."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + self.eps)
        return x * _along_features(self.scale[...], x.ndim)


def modulate(
    x: jax.Array, shift: jax.Array, scale: jax.Array, dtype: DTypeLike = "float32"
) -> jax.Array:
    """Returns x * (1 + scale) + shift for tokens x (b, n, d), in `dtype`.

    Args:
        x: Normalised tokens (b, n, d), float32.
        shift: Per sample (b, d) or per token (b, n, d), float32.
        scale: Like `shift`.
        dtype: What the result, computed in float32, is rounded to.
    """
    x = x * (1 + per_token(scale))
    if shift.ndim == 2:
        return _add_per_sample(x, shift, jnp.dtype(dtype))
    return (x + shift).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_per_sample(x, shift, dtype):
    return (x + shift[:, None, :]).astype(dtype)


def _add_per_sample_forward(x, shift, dtype):
    return _add_per_sample(x, shift, dtype), None


def _add_per_sample_backward(dtype, _, gradient):
    return gradient.astype(jnp.float32), sums.sum_rows(gradient, (1,))


_add_per_sample.defvjp(_add_per_sample_forward, _add_per_sample_backward)


def per_token(modulation: jax.Array) -> jax.Array:
    """Gives a per-sample modulation (b, d) a token axis, (b, 1, d).

    One that has a token axis already, (b, n, d), is returned as it is.
    """
    return modulation[:, None, :] if modulation.ndim == 2 else modulation
