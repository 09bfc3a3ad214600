"""Linear autoencoders of image patches, plain or variational (arXiv:2401.14404)."""

import jax
import jax.numpy as jnp
from flax import nnx

from rae_jax.layers import linear, patches
from rae_jax.models import pretrained

_LOG_VARIANCES = (-30.0, 20.0)  # Clipped to these, as in latent diffusion.


class PatchAutoencoder(pretrained.Pretrained, nnx.Module):
    """One linear map of each patch to its latent, and one back.

    Both have a bias, which does what subtracting the mean patch does for PCA. If it is
    variational, a second linear map gives the logarithms of the posterior's variances.

    Args:
        patch_size: Pixels per patch and side.
        latent_dim: Values of a latent.
        variational: Whether latents are Gaussian given the patch.
        rngs: Randomness of the initial values.

    Raises:
        ValueError: A latent would have more dimensions than a patch.
    """

    def __init__(
        self, patch_size: int, latent_dim: int, variational: bool, *, rngs: nnx.Rngs
    ):
        dim = 3 * patch_size**2
        if not 1 <= latent_dim <= dim:
            raise ValueError(
                f"latent_dim {latent_dim} is not within 1 and the {dim} values of a "
                "patch."
            )
        self.patch_size, self.latent_dim = patch_size, latent_dim
        options = dict(init="xavier", rngs=rngs)
        self.encoder = linear.linear(dim, latent_dim, **options)
        self.log_variance = (
            linear.linear(dim, latent_dim, **options) if variational else None
        )
        self.decoder = linear.linear(latent_dim, dim, **options)

    def gaussian(self, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Maps images (b, h, w, 3) in [-1, 1] to means and log variances of latents.

        Both are (b, n, latent_dim); there are no variances unless it is variational.
        """
        x = patches.patchify(images, self.patch_size)
        mean = self.encoder(x)
        if self.log_variance is None:
            return mean, None
        return mean, jnp.clip(self.log_variance(x), *_LOG_VARIANCES)

    def images(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to images (b, h, w, 3) in [-1, 1]."""
        return patches.unpatchify(self.decoder(z), self.patch_size)
