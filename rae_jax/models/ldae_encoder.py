"""The encoder half of an l-DAE at one noise level (arXiv:2401.14404)."""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax import config as configs
from rae_jax.diffusion import paths, schedules
from rae_jax.layers import norm, patches
from rae_jax.models import (
    autoencoder_kl,
    ldae,
    ldae_merging,
    learned_tokenizers,
    pretrained,
    tokenizers,
    vit_encoder,
)

CLEAN = ("projected", "raw")
SPACES = ("latent", "image")
HUGGINGFACE = "huggingface"


class LDAEEncoder(pretrained.Pretrained, nnx.Module):
    """The first blocks of an l-DAE at one fixed noise level, as RAE's encoder.

    Images first become what the network was trained on: latents of its tokenizer or,
    where it reads images, their projection on the leading components. Where the
    pre-training added noise in these alone, the patch embedding never learned to read
    the others. The output norm has no affine part, as in all encoders of RAE.

    Args:
        image_size: Image height and width.
        patch_size: Pixels per token side.
        latent_dim: Values per latent token.
        hidden_size: Width.
        depth: Blocks that are the encoder, any number of those that were trained.
        num_heads: Attention heads.
        time_index: Noise level that the network is told, 10 in the paper.
        tokenizer: One of `tokenizers.NAMES`.
        input_space: What the network reads: "latent", or "image" (patches).
        clean: How an image without noise is shown where `input_space` is "image":
            "projected", or "raw" without the projection.
        schedule: Of the noise, see `schedules.noise_schedule`.
        num_levels: Its number of levels.
        num_classes: Of a network that was conditioned on them; it is told none.
        mlp_ratio: Inner width of the MLPs over `hidden_size`.
        condition_divisor: See `ldae.LDAE`.
        vae: Sizes of the convolutional tokenizer, arguments of an `AutoencoderKL`;
            not looked at with the others.
        dtype: Type of the products of the network; the tokenizer's are in float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.

    Raises:
        ValueError: For an unknown name or sizes that do not fit together.

    Attributes:
        input_size: Image height and width that it takes.
        patch_size: Pixels per token side.
        hidden_size: Features per token.
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
    """

    layouts = (pretrained.OWN_LAYOUT, HUGGINGFACE)
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        latent_dim: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        time_index: int = 10,
        tokenizer: str = "pca",
        input_space: str = "image",
        clean: str = "projected",
        schedule: str = "linear_sigma",
        num_levels: int = 1000,
        num_classes: int = 0,
        mlp_ratio: float = 4.0,
        condition_divisor: int = 4,
        vae: Mapping[str, Any] | None = None,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        _check(tokenizer, input_space, clean, schedule)
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}."
            )
        if not 0 <= time_index < num_levels:
            raise ValueError(
                f"time_index must be within 0 and {num_levels - 1}, not {time_index}."
            )
        self.input_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.depth = hidden_size, depth
        self.time_index, self.clean = time_index, clean
        self.schedule, self.num_levels = schedule, num_levels
        patch_dim = 3 * patch_size**2
        in_image = input_space == "image"
        if tokenizer in tokenizers.CONVOLUTIONAL:
            self.encode = ConvLatents(image_size, latent_dim, vae or {}, rngs=rngs)
        else:
            self.encode = PatchLatents(patch_size, latent_dim)
        self.decode = AffineMap(latent_dim, patch_dim) if in_image else None
        self.net = ldae.LDAE(
            grid=image_size // patch_size,
            in_features=patch_dim if in_image else latent_dim,
            out_features=0,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            condition_divisor=condition_divisor,
            num_classes=num_classes,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )
        self.norm = norm.LayerNorm(hidden_size, eps=1e-6, affine=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size)."""
        return self.norm(self.raw_features(images))

    def raw_features(
        self,
        images: jax.Array,
        *,
        time_index: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the tokens before the output norm, which the linear probe pools.

        Args:
            images: Normalised images (b, h, w, 3).
            time_index: Noise level that the network is told; its own when None.
            key: Randomness of noise of this level, one key or one per image (b,);
                without it the input is clean.
        """
        x, t = self.inputs(images, time_index, key)
        return self.net.features(x, t, self.depth)

    def block_features(
        self,
        images: jax.Array,
        indices: Sequence[int],
        *,
        time_index: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Returns the tokens (b, n, hidden_size) after some blocks, before the norm.

        Args:
            images: Normalised images (b, h, w, 3).
            indices: Blocks counted from 0, increasing.
            time_index: See `raw_features`.
            key: Likewise.

        Raises:
            ValueError: If the indices do not increase or there is no such block.
        """
        return self.net.block_features(*self.inputs(images, time_index, key), indices)

    def latents(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to clean latents (b, n, latent_dim)."""
        return self.encode(images)

    def inputs(
        self,
        images: jax.Array,
        time_index: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what the network reads (b, n, in_features) and the level (b,).

        See `raw_features` for the arguments.
        """
        level = self.time_index if time_index is None else time_index
        t = jnp.full(images.shape[:1], level)
        if key is None and self.decode is not None and self.clean == "raw":
            return patches.patchify(images, self.patch_size), self._told(t)
        z = self.latents(images)
        z_t = z
        if key is not None:
            tables = schedules.noise_schedule(self.schedule, self.num_levels)
            gamma, sigma = (jnp.asarray(table)[t] for table in tables)
            z_t = paths.diffuse(z, _noise(key, z.shape), gamma, sigma)
        if self.decode is None:
            return z_t, self._told(t)
        x = self.decode(z_t)
        if self.clean == "raw":  # What the projection left out is not lost.
            x = x + patches.patchify(images, self.patch_size) - self.decode(z)
        return x, self._told(t)

    def _told(self, t: jax.Array) -> jax.Array:
        """Returns the level that the network is told: of a single one always 0."""
        return jnp.zeros_like(t) if self.schedule == "single_sigma" else t

    def merged(self, time_index: int | None = None) -> vit_encoder.ViTEncoder:
        """Returns the same function as a plain ViT of the family "ijepa", exactly.

        Args:
            time_index: Noise level to fix; its own when None.

        Raises:
            ValueError: The network is conditioned on more than a fixed time.
        """
        arguments = self.arguments
        if time_index is not None:
            arguments |= {"time_index": time_index}
        source, _ = pretrained.parameters_of(self)
        arguments, arrays = ldae_merging.merge(arguments, source)
        network = pretrained.Skeleton(vit_encoder.ViTEncoder, arguments)
        return network.filled(arrays.items(), (), source.origin)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        layout: str = pretrained.OWN_LAYOUT,
        **options: Any,
    ) -> None:
        """Writes the encoder; in the layout "huggingface" merged into a plain ViT.

        See `Pretrained.save_pretrained`.
        """
        if layout == HUGGINGFACE:
            self.merged().save_pretrained(folder, layout, **options)
            return
        super().save_pretrained(folder, layout, **options)


class AffineMap(nnx.Module):
    """x @ kernel + bias in float32 at full precision, as a tokenizer needs it."""

    def __init__(self, in_features: int, out_features: int):
        self.kernel = nnx.Param(jnp.eye(in_features, out_features))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, n, in_features) to (b, n, out_features)."""
        highest = jax.lax.Precision.HIGHEST
        y = jnp.matmul(x, self.kernel[...], precision=highest)
        return y + self.bias[...][None, None, :]


class PatchLatents(nnx.Module):
    """Images to latents by one affine map of their patches."""

    def __init__(self, patch_size: int, latent_dim: int):
        self.patch_size = patch_size
        self.map = AffineMap(3 * patch_size**2, latent_dim)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (b, h, w, 3) in [-1, 1] to latents (b, n, latent_dim)."""
        return self.map(patches.patchify(images, self.patch_size))


class ConvLatents(nnx.Module):
    """Images to the means of a KL autoencoder's latents, as `ConvCode` orders them."""

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        arguments: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
    ):
        group = learned_tokenizers.GROUP**2
        known = inspect.signature(autoencoder_kl.KLEncoder.__init__).parameters
        sizes = {k: v for k, v in arguments.items() if k in known}
        sizes |= {"image_size": image_size, "latent_channels": latent_dim // group}
        self.network = autoencoder_kl.KLEncoder(**sizes, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(latent_dim))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (b, h, w, 3) in [-1, 1] to latents (b, n, latent_dim)."""
        z = self.network.latents(self.network.moments(images))
        z = patches.patchify(z, learned_tokenizers.GROUP)
        return z / self.scale[...][None, None, :]


def encoder_params(params: dict, tokenizer: Any, depth: int, in_image: bool) -> dict:
    """Cuts the parameters of an `LDAEEncoder` out of those of a trained `LDAE`.

    Args:
        params: Plain parameters of the LDAE.
        tokenizer: One of `models.tokenizers`, of the same run.
        depth: Number of blocks that are the encoder.
        in_image: Whether the network reads images.
    """
    blocks = jax.tree.map(lambda p: p[:depth], params["blocks"])
    names = [n for n in ("embed", "t_embedder", "y_embedder") if n in params]
    net = {name: params[name] for name in names} | {"blocks": blocks}
    if isinstance(tokenizer, learned_tokenizers.ConvCode):
        network = tokenizer.params["encoder"]
        return {"net": net, "encode": {"network": network, "scale": tokenizer.scale}}
    found = {"net": net, "encode": {"map": _affine(tokenizer.affine())}}
    if in_image:
        found["decode"] = _affine(tokenizer.inverse_affine())
    return found


def _affine(arrays: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    return dict(zip(("kernel", "bias"), arrays, strict=True))


def _check(tokenizer: str, input_space: str, clean: str, schedule: str) -> None:
    """Raises a ConfigError for names that do not exist or do not go together."""
    for value, known, kind in (
        (input_space, SPACES, "input_space"),
        (clean, CLEAN, "clean input"),
        (schedule, schedules.SCHEDULES, "noise schedule"),
    ):
        if value not in known:
            raise configs.ConfigError(configs.suggest(value, known, kind))
    if tokenizer not in tokenizers.NAMES:
        raise configs.ConfigError(
            configs.suggest(tokenizer, tokenizers.NAMES, "tokenizer")
        )
    if input_space == "image" and tokenizer not in tokenizers.LINEAR:
        raise configs.ConfigError(
            f"input_space 'image' needs a tokenizer of {tokenizers.LINEAR}, not "
            f"{tokenizer!r}."
        )


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws noise with one key, or with one for each row."""
    if key.ndim == 0:
        return jax.random.normal(key, shape)
    return jax.vmap(lambda row: jax.random.normal(row, shape[1:]))(key)
