"""Tokenizers of l-DAE that are trained: patch-wise, and convolutional.

See `tokenizers.Tokenizer` for what they have in common.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from rae_jax.layers import patches
from rae_jax.models import autoencoder_kl, patch_autoencoder, pretrained, tokenizers

GROUP = 2  # Latents of a convolutional autoencoder per token and side: DiT's patch.

Params = Any
Moments = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class NetworkTokenizer:
    """A trained autoencoder as a tokenizer.

    Attributes:
        params: Parameters of the network.
        scale: What latents are divided by, (latent_dim,).
        latent_dim: Values of a token.
        patch_size: Pixels per token and side.
        arguments: Constructor arguments of the network, as JSON.
    """

    params: Params
    scale: jax.Array
    latent_dim: int = flax.struct.field(pytree_node=False)
    patch_size: int = flax.struct.field(pytree_node=False)
    arguments: str = flax.struct.field(pytree_node=False)

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps images (b, h, w, 3) in [-1, 1] to latents (b, n, latent_dim).

        With a key they are drawn from the posterior, else they are its means.
        """
        return tokenizers.draw(self.moments(images), self.scale, key)

    @classmethod
    def of(cls, model: nnx.Module, scale: jax.Array) -> Self:
        """Wraps a network; works on shapes as well."""
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        arguments = json.dumps(model.arguments, sort_keys=True)
        size = cls.size_of(model.arguments)
        return cls(params, scale, scale.shape[0], size, arguments)


@flax.struct.dataclass
class PatchCode(NetworkTokenizer):
    """The code of a `PatchAutoencoder`."""

    network = patch_autoencoder.PatchAutoencoder

    def moments(self, images: jax.Array) -> Moments:
        """See `tokenizers.Tokenizer`."""
        with _exact():
            mean, log_variance = self._model().gaussian(images)
        if log_variance is None:
            return mean, jnp.zeros_like(mean)
        return mean, jnp.exp(log_variance)

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to images (b, h, w, 3) in [-1, 1]."""
        with _exact():
            return self._model().images(z * tokenizers.row(self.scale))

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel (p, latent_dim) and bias of the map of patches to means."""
        part = self.params["encoder"]
        return part["kernel"] / self.scale[None, :], part["bias"] / self.scale

    def inverse_affine(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel (latent_dim, p) and bias of the map of latents to patches."""
        part = self.params["decoder"]
        return self.scale[:, None] * part["kernel"], part["bias"]

    @staticmethod
    def size_of(arguments: Mapping[str, Any]) -> int:
        """Returns the pixels per token and side."""
        return arguments["patch_size"]

    def _model(self) -> nnx.Module:
        return nnx.merge(_graphdef(self.network, self.arguments), self.params)


@flax.struct.dataclass
class ConvCode(NetworkTokenizer):
    """Two by two latents of an `AutoencoderKL` as a token.

    They are in the order in which DiT's patch embedding reads them: row, column,
    channel. Latents have the network's own scaling factor before `scale` divides.
    """

    network = autoencoder_kl.AutoencoderKL

    def moments(self, images: jax.Array) -> Moments:
        """See `tokenizers.Tokenizer`."""
        encoder = self._model().encoder
        moments = encoder.moments(images)
        pair = (encoder.latents(moments), encoder.variances(moments))
        mean, variance = (patches.patchify(x, GROUP) for x in pair)
        return mean, variance

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to images (b, h, w, 3) in [-1, 1]."""
        z = patches.unpatchify(z * tokenizers.row(self.scale), GROUP)
        return self._model().decoder.images(z)

    @staticmethod
    def size_of(arguments: Mapping[str, Any]) -> int:
        """Returns the pixels per token and side."""
        return GROUP * 2 ** (len(arguments["block_out_channels"]) - 1)

    def _model(self) -> nnx.Module:
        return nnx.merge(_graphdef(self.network, self.arguments), self.params)


def _exact() -> Any:
    """Products of float32 as such, which a TPU would round to bfloat16 first."""
    return jax.default_matmul_precision("highest")


@functools.lru_cache(maxsize=32)
def _graphdef(cls: type, arguments: str) -> nnx.GraphDef:
    return pretrained.Skeleton(cls, json.loads(arguments)).graphdef


def posterior(
    network: nnx.Module, images: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns means and log variances of the latents of images in [-1, 1].

    Of a `PatchAutoencoder` (b, n, d), of an `AutoencoderKL` (b, h, w, c), before its
    scaling factor. Log variances are None where latents are not random.
    """
    if isinstance(network, autoencoder_kl.AutoencoderKL):
        encoder = network.encoder
        return encoder.gaussian(encoder.moments(images))
    return network.gaussian(images)


def images_of(network: nnx.Module, z: jax.Array) -> jax.Array:
    """Maps latents, as from `posterior`, to images (b, h, w, 3) in [-1, 1]."""
    if isinstance(network, autoencoder_kl.AutoencoderKL):
        return network.decoder.images(z)
    return network.images(z)
