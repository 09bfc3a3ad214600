"""The representation autoencoder: frozen encoder, trained decoder, latent statistics.

arXiv:2510.11690 section 3. Latents are channel-last grids (b, h, w, c).
"""

import math
import os
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from rae_jax import config as configs
from rae_jax.convert import (
    diffusers_names,
    hub,
    kl_names,
    published,
    rae_names,
    tables,
)
from rae_jax.layers import resize
from rae_jax.models import (
    autoencoder_kl,
    pretrained,
    rae_layouts,
    recording,
    vit_encoder,
    writers,
)
from rae_jax.models import decoder as decoders

NOISES = ("uniform", "half_normal")
Stats = dict[str, jax.Array]


def encode(encoder: Any, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Maps images (b, H, W, 3) in [0, 1] of any size to latents (b, h, w, c).

    Args:
        encoder: See `models.encoders`.
        images: Resized as `encode_raw` says.
        key: Randomness of latents that are drawn; without it they are the means.
    """
    return to_latents(encoder, encode_raw(encoder, images), key)


def encode_raw(encoder: Any, images: jax.Array) -> jax.Array:
    """Maps images (b, H, W, 3) in [0, 1] of any size to what `to_latents` takes.

    These are the latents (b, h, w, c) themselves, or of a KL autoencoder their moments
    (b, h, w, 2c): nothing random, so it can be stored.

    Resizes as the official code does (bicubic without antialiasing), normalises
    and encodes. No gradient flows back.
    """
    size = encoder.input_size
    if images.shape[1:3] != (size, size):
        images = resize.resize_bicubic(images, size, size)
    mean, std = _channels(encoder.image_mean), _channels(encoder.image_std)
    tokens = encoder((images.astype(jnp.float32) - mean) / std)
    b, n, c = tokens.shape
    grid = math.isqrt(n)
    z = tokens.astype(jnp.float32).reshape(b, grid, grid, c)
    return jax.lax.stop_gradient(z)


def to_latents(encoder: Any, raw: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Maps what `encode_raw` returns to latents (b, h, w, c).

    Those of a KL autoencoder are drawn with the key, or are the means without it, and
    have its scale; others are raw latents as they are.
    """
    if not isinstance(encoder, autoencoder_kl.KLEncoder):
        return raw
    shape = (*raw.shape[:-1], encoder.hidden_size)
    eps = None if key is None else jax.random.normal(key, shape)
    return encoder.latents(raw, eps)


def latent_variance(encoder: Any, raw: jax.Array) -> jax.Array | None:
    """Returns the variances (b, h, w, c) that latents of an image have; None for 0.

    Args:
        encoder: See `models.encoders`.
        raw: What `encode_raw` returns.
    """
    is_random = isinstance(encoder, autoencoder_kl.KLEncoder)
    return encoder.variances(raw) if is_random else None


def decode(decoder: Any, z: jax.Array, encoder: Any) -> jax.Array:
    """Maps raw latents (b, h, w, c) to images (b, H, W, 3), not clipped.

    The decoder works in the pixel space that the encoder normalises to.
    """
    b, h, w, c = z.shape
    images = decoder(z.reshape(b, h * w, c))
    return images * _channels(encoder.image_std) + _channels(encoder.image_mean)


def add_noise(
    z: jax.Array, key: jax.Array, tau: float, distribution: str = "uniform"
) -> jax.Array:
    """Adds sigma eps to raw latents (b, h, w, c), one sigma per sample.

    Args:
        z: Raw latents.
        key: Randomness.
        tau: Strength; 0 returns z.
        distribution: Of sigma: "uniform" is tau U(0, 1), the released code;
            "half_normal" is |N(0, tau^2)|, the paper's text.

    Raises:
        ValueError: For another distribution.
    """
    if distribution not in NOISES:
        raise ValueError(f"Unknown noise {distribution!r}; choose from {NOISES}.")
    if tau == 0:
        return z
    sigma_key, eps_key = jax.random.split(key)
    shape = (z.shape[0], 1, 1, 1)
    if distribution == "uniform":
        sigma = jax.random.uniform(sigma_key, shape)
    else:
        sigma = jnp.abs(jax.random.normal(sigma_key, shape))
    return z + tau * sigma * jax.random.normal(eps_key, z.shape)


def normalize(z: jax.Array, stats: Stats, eps: float = 1e-5) -> jax.Array:
    """Maps raw latents to those that the diffusion model sees."""
    return (z - stats["mean"][None]) / jnp.sqrt(stats["var"][None] + eps)


def denormalize(z: jax.Array, stats: Stats, eps: float = 1e-5) -> jax.Array:
    """Inverts `normalize`."""
    return z * jnp.sqrt(stats["var"][None] + eps) + stats["mean"][None]


def _channels(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[None, None, None, :]


class RAE(pretrained.Pretrained, nnx.Module):
    """Encoder, decoder and latent statistics as one autoencoder.

    `from_pretrained` also reads diffusers' `AutoencoderRAE`, official stage-1
    checkpoints (see `rae_layouts.open_official` for what these do not tell), and the
    names in `published`; `from_parts` assembles files of encoder, decoder and
    statistics.

    Args:
        encoder: See `models.encoders`.
        decoder: See `models.decoder`.
        latent_shape: Shape (h, w, c) of a latent; statistics start as 0 and 1.
        eps: Added to the variance or deviation (1e-5 in the official code).
        normalization: What latents are divided by after the mean is subtracted:
            "variance" is sqrt(var + eps), the official code; "deviation" is
            std + eps, diffusers.
        scaling_factor: By which normalised latents are multiplied (diffusers).

    Raises:
        ValueError: For another normalisation.
    """

    layouts = (pretrained.OWN_LAYOUT, "official", "diffusers")

    def __init__(
        self,
        encoder: nnx.Module,
        decoder: nnx.Module,
        latent_shape: tuple[int, int, int],
        *,
        eps: float = 1e-5,
        normalization: str = "variance",
        scaling_factor: float = 1.0,
    ):
        if normalization not in rae_names.SPREADS:
            allowed = list(rae_names.SPREADS)
            raise ValueError(configs.suggest(normalization, allowed, "normalization"))
        self.encoder, self.decoder, self.eps = encoder, decoder, eps
        self.scaling_factor = scaling_factor
        self.latent_mean = nnx.Param(jnp.zeros(latent_shape))
        is_variance, spread = normalization == "variance", jnp.ones(latent_shape)
        self.latent_var = nnx.Param(spread) if is_variance else None
        self.latent_std = None if is_variance else nnx.Param(spread)

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps images (b, H, W, 3) in [0, 1] to normalised latents (b, h, w, c)."""
        z = encode(self.encoder, images)
        z = (z - self.latent_mean[...][None]) / self._scale()[None]
        return z * self.scaling_factor

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps normalised latents (b, h, w, c) to images (b, H, W, 3), not clipped."""
        z = z / self.scaling_factor
        z = z * self._scale()[None] + self.latent_mean[...][None]
        return decode(self.decoder, z, self.encoder)

    def _scale(self) -> jax.Array:
        if self.latent_var is not None:
            return jnp.sqrt(self.latent_var[...] + self.eps)
        return self.latent_std[...] + self.eps

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, part: str | None = None, **overrides: Any
    ) -> Self:
        """Loads an autoencoder, see `Pretrained.from_pretrained`.

        Names of `published.AUTOENCODERS` stand for their parts.
        """
        if str(source) in published.AUTOENCODERS:
            parts = published.AUTOENCODERS[str(source)]
            overrides = {"encoder_input_size": parts.input_size} | overrides
            return cls.from_parts(
                parts.encoder,
                parts.decoder,
                latent_stats=parts.latent_stats,
                **overrides,
            )
        return super().from_pretrained(source, part=part, **overrides)

    @classmethod
    def from_parts(
        cls,
        encoder: str | os.PathLike | nnx.Module,
        decoder: str | os.PathLike | nnx.Module,
        *,
        latent_stats: str | os.PathLike | None = None,
        encoder_input_size: int | None = None,
        eps: float = 1e-5,
        **shared: Any,
    ) -> Self:
        """Assembles an autoencoder from networks or from their files.

        Args:
            encoder: An encoder, or what its class loads.
            decoder: A decoder, or what `RAEDecoder` loads.
            latent_stats: File of statistics, official or ours; none when None.
            encoder_input_size: To which images are resized; the encoder's own
                choice when None.
            eps: Added to the variance.
            **shared: `dtype` and `remat` of networks that are loaded.

        Raises:
            FileNotFoundError: A file is missing; the message says how to get it.
            ValueError: The parts do not fit together.
        """
        if not isinstance(encoder, nnx.Module):
            size = {"image_size": encoder_input_size} if encoder_input_size else {}
            encoder = _load_encoder(encoder, **size, **shared)
        if not isinstance(decoder, nnx.Module):
            decoder = decoders.RAEDecoder.from_pretrained(decoder, **shared)
        if decoder.embed.in_features != encoder.hidden_size:
            raise ValueError(
                f"The decoder is for latents of {decoder.embed.in_features} channels, "
                f"the encoder's have {encoder.hidden_size}."
            )
        grid = encoder.input_size // encoder.patch_size
        shape = (grid, grid, encoder.hidden_size)
        stats = rae_layouts.read_stats(latent_stats, shape).arrays()
        # Without statistics latents stay as they are, to the bit.
        model = cls(encoder, decoder, shape, eps=eps if latent_stats else 0.0)
        model.latent_mean = nnx.Param(jnp.asarray(stats["mean"]))
        model.latent_var = nnx.Param(jnp.asarray(stats["var"]))
        return model

    @classmethod
    def from_kl(cls, model: autoencoder_kl.AutoencoderKL, eps: float = 0.0) -> Self:
        """Makes a KL autoencoder one as any other; its latents have their own scale."""
        grid, channels = model.decoder.grid, model.encoder.hidden_size
        return cls(model.encoder, model.decoder, (grid, grid, channels), eps=eps)

    @classmethod
    def open_foreign(
        cls, path: Path, part: str | None, overrides: pretrained.Arguments
    ) -> pretrained.Weights:
        settings = pretrained.read_config(path)
        if diffusers_names.is_settings(settings):
            return rae_layouts.open_diffusers(path, settings, overrides)
        if kl_names.is_settings(settings):
            raise ValueError(
                f"{path} holds an AutoencoderKL: load it with "
                "AutoencoderKL.from_pretrained, and make it an RAE with RAE.from_kl."
            )
        return rae_layouts.open_official(path, part, overrides)

    @classmethod
    def export(
        cls,
        layout: str,
        arguments: pretrained.Arguments,
        ours: tables.Source,
        **options: Any,
    ) -> writers.Export:
        if layout == "official":
            return rae_layouts.export_official(arguments, ours, **options)
        return rae_layouts.export_diffusers(arguments, ours, **options)


def _load_encoder(source: str | os.PathLike, **overrides: Any) -> nnx.Module:
    """Loads an encoder of whatever class the source is for."""
    path = hub.locate(source, allow=pretrained.HUB_FILES)
    default = vit_encoder.ViTEncoder.__name__
    name = pretrained.read_config(path).get("class", default)
    if name not in recording.CLASSES:
        raise ValueError(configs.suggest(name, list(recording.CLASSES), "class"))
    return recording.CLASSES[name].from_pretrained(path, **overrides)
