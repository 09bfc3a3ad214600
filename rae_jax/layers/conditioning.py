"""Embeddings of time and class, and the dropping of labels for guidance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import linear, partition


class FourierTimeEmbedding(nnx.Module):
    """Random Fourier features of a time in [0, 1], then a two-layer network.

    The frequencies W ~ N(0, 1) are drawn once and stored with the parameters. They
    are a fixed table by intent; the official trainer of RAE nevertheless trained
    them, which `trainable_tables` allows.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_frequencies: int = 256,
        dtype: DTypeLike = "float32",
        init: str = "normal_torch_bias",
        trainable_tables: bool = False,
        rngs: nnx.Rngs,
    ):
        self.trainable_tables = trainable_tables
        self.W = nnx.Param(jax.random.normal(rngs.params(), (num_frequencies,)))
        self.fc1 = linear.linear(
            2 * num_frequencies, hidden_size, dtype=dtype, init=init, rngs=rngs
        )
        self.fc2 = linear.linear(
            hidden_size, hidden_size, dtype=dtype, init=init, rngs=rngs
        )

    def __call__(self, t: jax.Array) -> jax.Array:
        """Maps times (b,) to embeddings (b, d) in `dtype`."""
        w = self.W[...] if self.trainable_tables else jax.lax.stop_gradient(self.W[...])
        phase = 2 * math.pi * t.astype(jnp.float32)[:, None] * w[None, :]
        features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        return self.fc2(jax.nn.silu(self.fc1(features)))


class SinusoidalTimeEmbedding(nnx.Module):
    """DiT's embedding of a step index t: [cos | sin], then a two-layer network."""

    def __init__(
        self,
        hidden_size: int,
        out_size: int,
        *,
        in_dim: int = 256,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        if in_dim % 2:
            raise ValueError(f"in_dim must be even, got {in_dim}.")
        self.in_dim = in_dim
        self.fc1 = linear.linear(
            in_dim, hidden_size, dtype=dtype, init="normal", rngs=rngs
        )
        self.fc2 = linear.linear(
            hidden_size, out_size, dtype=dtype, init="normal", rngs=rngs
        )

    def __call__(self, t: jax.Array) -> jax.Array:
        """Maps indices (b,), not scaled to [0, 1], to (b, out_size) in `dtype`."""
        half = self.in_dim // 2
        frequencies = np.exp(-math.log(10000) * np.arange(half) / half)
        phase = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
        features = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
        return self.fc2(jax.nn.silu(self.fc1(features)))


class LabelEmbedding(nnx.Module):
    """One vector per class and one, of index `num_classes`, for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, *, rngs: nnx.Rngs):
        shape = (num_classes + 1, hidden_size)
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

    def __call__(self, y: jax.Array) -> jax.Array:
        """Maps labels (b,) in [0, num_classes] to (b, d) float32."""
        table = partition.gather(self.table[...], jnp.float32)
        return jnp.take(table, y, axis=0)


def drop_labels(y: jax.Array, key: jax.Array, rate: float, null: int) -> jax.Array:
    """Replaces each label of y (b,) by `null` with probability `rate`."""
    return jnp.where(jax.random.uniform(key, y.shape) < rate, null, y)
