"""The network of MoCo v3 (arXiv:2104.02057): encoder, projector and predictor."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rae_jax.layers import linear
from rae_jax.models import pretext

FAMILY = "mocov3"
BATCH_NORM_EPS = 1e-5


class MoCoV3(nnx.Module):
    """Views of images to vectors, and those to the vectors of other views.

    The momentum encoder is a second set of this network's parameters. Initialised as
    in the official code. The patch embedding stays as it was drawn: training it makes
    large ViTs unstable (section 4.2).

    Args:
        image_size: Image height and width, in pixels.
        patch_size: Height and width of a patch.
        hidden_size: Token width of the encoder.
        depth: Number of its blocks.
        num_heads: Its attention heads.
        intermediate_size: Inner width of its MLPs.
        head_hidden_size: Inner width of projector and predictor.
        out_features: Width of the vectors that are compared.
        dtype: Type of the products; parameters, tokens and norms are float32.
        remat: See `stack.Stack`.
        rngs: Randomness of the initial values.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        intermediate_size: int,
        head_hidden_size: int = 4096,
        out_features: int = 256,
        dtype: DTypeLike = "float32",
        remat: str = "full",
        rngs: nnx.Rngs,
    ):
        self.encoder = pretext.make_encoder(
            FAMILY,
            cls_std=1e-6,
            rows_first=True,
            qkv_parts=3,
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            intermediate_size=intermediate_size,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )
        inner, out = head_hidden_size, out_features
        self.projector = Head((hidden_size, inner, inner, out), dtype=dtype, rngs=rngs)
        self.predictor = Head((out, inner, out), dtype=dtype, rngs=rngs)

    def project(self, views: jax.Array) -> jax.Array:
        """Maps normalised views (b, v, h, w, 3) to vectors (b, v, out_features).

        Batch norms see each view alone, with all images of the batch.
        """
        b, v = views.shape[:2]
        images = views.reshape(b * v, *views.shape[2:])  # Views of an image stay near.
        tokens = self.encoder.patch_embed(images).astype(jnp.float32)
        tokens = jax.lax.stop_gradient(tokens)
        tokens = tokens + pretext.fixed_positions(self.encoder)[:, 1:]
        features = pretext.encode(self.encoder, tokens)[:, 0]
        return self.projector(features.reshape(b, v, -1))

    def __call__(self, views: jax.Array) -> jax.Array:
        """Maps normalised views (b, v, h, w, 3) to queries (b, v, out_features)."""
        return self.predictor(self.project(views))


class Head(nnx.Module):
    """Linear maps without bias, a batch norm after each, ReLU between.

    The last batch norm has no affine part.
    """

    def __init__(self, widths: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs):
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.linears = nnx.List(
            linear.linear(*pair, use_bias=False, dtype=dtype, rngs=rngs)
            for pair in pairs
        )
        self.norms = nnx.List(
            BatchNorm(width, affine=i < len(pairs))
            for i, (_, width) in enumerate(pairs, 1)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, v, widths[0]) to (b, v, widths[-1]) float32."""
        last = len(self.linears) - 1
        for i, (apply, normalize) in enumerate(
            zip(self.linears, self.norms, strict=True)
        ):
            x = normalize(apply(x))
            x = x if i == last else jax.nn.relu(x)
        return x


class BatchNorm(nnx.Module):
    """Normalisation over the images of the batch, in float32.

    In a jitted step a batch that is split over devices is one batch. There are no
    running means: features are never computed outside of a batch.
    """

    def __init__(self, dim: int, *, affine: bool = True):
        self.scale = nnx.Param(jnp.ones(dim)) if affine else None
        self.bias = nnx.Param(jnp.zeros(dim)) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, v, d) of any float type to (b, v, d) float32."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=0, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=0, keepdims=True)
        x = x * jax.lax.rsqrt(variance + BATCH_NORM_EPS)
        if self.scale is None or self.bias is None:
            return x
        return x * self.scale[...][None, None, :] + self.bias[...][None, None, :]
