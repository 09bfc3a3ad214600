"""The denoising transformer of l-DAE and the encoder that it leaves behind.

One isotropic ViT; its first blocks are the encoder, the rest the decoder
(arXiv:2401.14404 section 3).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import conditioning, linear, norm, patches, positions, stack
from rae_jax.models import dit_parts, pretrained


class LDAE(nnx.Module):
    """Tokens at noise level t to clean tokens, by one stack of blocks.

    Args:
        grid: Tokens per side.
        in_features: Values per input token.
        out_features: Values per output token; 0 leaves the output layer out, for
            an encoder.
        hidden_size: Width.
        depth: Number of blocks.
        num_heads: Attention heads.
        condition_divisor: The time condition is hidden_size / condition_divisor wide
            (4 in the paper).
        dtype: Type of the matrix products.
        remat: See `layers.stack.Stack`.
        rngs: Randomness of the initial values.
    """

    def __init__(
        self,
        *,
        grid: int,
        in_features: int,
        out_features: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        condition_divisor: int = 4,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        self.grid, self.hidden_size = grid, hidden_size
        c_size = hidden_size // condition_divisor
        self.embed = linear.linear(
            in_features, hidden_size, dtype=dtype, init="xavier", rngs=rngs
        )
        self.t_embedder = conditioning.SinusoidalTimeEmbedding(
            c_size, c_size, rngs=rngs
        )

        plain = dict(cond_size=c_size, use_rmsnorm=False, dtype=dtype)
        make_block = partial(
            dit_parts.DiTBlock,
            hidden_size,
            num_heads,
            mlp_ratio=mlp_ratio,
            use_swiglu=False,
            init="xavier",
            **plain,
        )
        self.blocks = stack.Stack(make_block, depth, remat=remat, rngs=rngs)
        self.final_layer = (
            dit_parts.FinalLayer(hidden_size, out_features, rngs=rngs, **plain)
            if out_features
            else None
        )

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Maps tokens (b, n, in_features) and step indices (b,) to predictions.

        Returns:
            (b, n, out_features) float32; zero at initialisation.
        """
        c = self.t_embedder(t)
        return self.final_layer(self.blocks(self._embed(x), c), c)

    def features(self, x: jax.Array, t: jax.Array, depth: int) -> jax.Array:
        """Returns the tokens (b, n, hidden_size) after the first `depth` blocks."""
        return self.blocks(self._embed(x), self.t_embedder(t), stop=depth)

    def block_features(
        self, x: jax.Array, t: jax.Array, indices: Sequence[int]
    ) -> list[jax.Array]:
        """Returns the tokens (b, n, hidden_size) after each block of `indices`.

        Raises:
            ValueError: If the indices do not increase or there is no such block.
        """
        indices, depth = list(indices), self.blocks.depth
        if indices != sorted(set(indices)) or not set(indices) <= set(range(depth)):
            raise ValueError(
                f"Blocks must increase and lie in 0..{depth - 1}, got {indices}."
            )
        x, c, start, found = self._embed(x), self.t_embedder(t), 0, []
        for index in indices:
            x = self.blocks(x, c, start=start, stop=index + 1)
            found.append(x)
            start = index + 1
        return found

    def _embed(self, x: jax.Array) -> jax.Array:
        table = jnp.asarray(positions.sincos_2d(self.hidden_size, self.grid))
        return self.embed(x).astype(jnp.float32) + table[None]


class LDAEEncoder(pretrained.Pretrained, nnx.Module):
    """The encoder half of an l-DAE at one fixed noise level, as RAE's encoder.

    Images first pass through the patch PCA: where the pre-training added noise in
    the leading components alone, the patch embedding never learned to read the
    others. The output norm has no affine part, as in all encoders of RAE.

    Attributes:
        input_size: Image height and width that it takes.
        patch_size: Pixels per token side.
        hidden_size: Features per token.
        image_mean: Channel means that normalise an image in [0, 1].
        image_std: Channel deviations that normalise an image in [0, 1].
    """

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
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.input_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.time_index = hidden_size, time_index
        patch_dim = 3 * patch_size**2
        self.net = LDAE(
            grid=image_size // patch_size,
            in_features=patch_dim,
            out_features=0,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            dtype=dtype,
            rngs=rngs,
        )
        self.depth = depth
        self.pca_mean = nnx.Param(jnp.zeros(patch_dim))
        self.pca_basis = nnx.Param(jnp.eye(latent_dim, patch_dim))
        self.norm = norm.LayerNorm(hidden_size, eps=1e-6, affine=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size)."""
        return self.norm(self.raw_features(images))

    def raw_features(self, images: jax.Array) -> jax.Array:
        """Returns the tokens before the output norm, which the linear probe pools."""
        return self.net.features(*self._inputs(images), self.depth)

    def block_features(
        self, images: jax.Array, indices: Sequence[int]
    ) -> list[jax.Array]:
        """Returns the tokens (b, n, hidden_size) after some blocks, before the norm.

        Args:
            images: Normalised images (b, h, w, 3).
            indices: Blocks counted from 0, increasing.

        Raises:
            ValueError: If the indices do not increase or there is no such block.
        """
        return self.net.block_features(*self._inputs(images), indices)

    def _inputs(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns projected patches (b, n, p) and the noise level (b,) for the net."""
        mean, basis = self.pca_mean[None, None, :], self.pca_basis[...]
        tokens = patches.patchify(images, self.patch_size)
        tokens = ((tokens - mean) @ basis.T) @ basis + mean
        return tokens, jnp.full(images.shape[:1], self.time_index)


def encoder_params(params: dict, basis: jax.Array, mean: jax.Array, depth: int) -> dict:
    """Cuts the parameters of an `LDAEEncoder` out of those of a trained `LDAE`.

    Args:
        params: Plain parameters of the LDAE.
        basis: Leading components (latent_dim, p) of the patch PCA.
        mean: Mean patch (p,).
        depth: Number of blocks that are the encoder.
    """
    blocks = jax.tree.map(lambda p: p[:depth], params["blocks"])
    net = {k: params[k] for k in ("embed", "t_embedder")} | {"blocks": blocks}
    return {"net": net, "pca_basis": basis, "pca_mean": mean}
