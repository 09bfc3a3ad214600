"""Patch tokenizers of l-DAE: the latent space in which its noise is added."""

from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

NORMS = ("global", "per_channel", "none")


@flax.struct.dataclass
class PatchPCA:
    """Principal components of image patches, arXiv:2401.14404 section 4.2.

    Attributes:
        mean: Mean patch (p,), p = patch_size^2 * 3, of pixels in [-1, 1].
        basis: All components (p, p), one per row, by falling variance.
        scale: What latents are divided by, (latent_dim,).
        latent_dim: Number of components that make the latent.
    """

    mean: jax.Array
    basis: jax.Array
    scale: jax.Array
    latent_dim: int = flax.struct.field(pytree_node=False)

    def encode(self, patches: jax.Array) -> jax.Array:
        """Maps patches (b, n, p) to latents (b, n, latent_dim)."""
        z = (patches - _row(self.mean)) @ self.basis[: self.latent_dim].T
        return z / _row(self.scale)

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps latents (b, n, latent_dim) to patches (b, n, p)."""
        patches = (z * _row(self.scale)) @ self.basis[: self.latent_dim]
        return patches + _row(self.mean)

    def components(self, residual: jax.Array) -> jax.Array:
        """Expresses differences of patches (b, n, p) in the full basis."""
        return residual @ self.basis.T


def _row(values: jax.Array) -> jax.Array:
    return values[None, None, :]


class PatchMoments:
    """Streaming mean and covariance of patches in float64."""

    def __init__(self, dim: int):
        self.count = 0
        self._sum = np.zeros(dim)
        self._products = np.zeros((dim, dim))

    def add(self, patches: np.ndarray) -> None:
        """Adds patches (n, p) of pixels in [-1, 1]."""
        patches = patches.astype(np.float64)
        self.count += len(patches)
        self._sum += patches.sum(axis=0)
        self._products += patches.T @ patches

    def components(self) -> dict[str, np.ndarray]:
        """Returns mean, basis and variances, with fixed signs, by falling variance.

        Raises:
            ValueError: If fewer patches than dimensions were added.
        """
        dim = len(self._sum)
        if self.count <= dim:
            raise ValueError(
                f"{self.count} patches cannot determine {dim} components; "
                "raise tokenizer.num_images."
            )
        mean = self._sum / self.count
        covariance = self._products / self.count - np.outer(mean, mean)
        variances, vectors = np.linalg.eigh(covariance)
        basis = vectors[:, ::-1].T
        # An eigenvector's sign is arbitrary; make its largest entry positive.
        largest = basis[np.arange(dim), np.abs(basis).argmax(axis=1)]
        basis = basis * np.sign(largest)[:, None]
        return {
            "mean": mean,
            "basis": basis,
            "variances": np.maximum(variances[::-1], 0.0),
        }


def make_pca(
    components: dict[str, np.ndarray], latent_dim: int, norm: str = "global"
) -> PatchPCA:
    """Builds the tokenizer from fitted components.

    Args:
        components: As from `PatchMoments.components` or `load_components`.
        latent_dim: Number of components to keep.
        norm: "global" divides latents by one scalar so that all entries jointly
            have variance 1, "per_channel" whitens them, "none" leaves them.

    Raises:
        ValueError: For an unknown norm or more latent dimensions than pixels.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown latent norm {norm!r}; choose from {NORMS}.")
    if not 1 <= latent_dim <= len(components["mean"]):
        raise ValueError(
            f"latent_dim {latent_dim} is not within 1 and the "
            f"{len(components['mean'])} values of a patch."
        )
    kept = components["variances"][:latent_dim]
    scale = np.ones(latent_dim)
    if norm == "global":
        scale = np.full(latent_dim, np.sqrt(kept.mean()))
    elif norm == "per_channel":
        scale = np.sqrt(np.maximum(kept, 1e-12))
    arrays = (components["mean"], components["basis"], scale)
    return PatchPCA(*(jnp.asarray(a, jnp.float32) for a in arrays), latent_dim)


def save_components(path: Path, components: dict[str, np.ndarray]) -> None:
    """Writes fitted components as .npz, atomically."""
    partial = path.with_name(f".{path.stem}.partial.npz")
    np.savez(partial, **components)
    partial.replace(path)


def load_components(path: Path) -> dict[str, np.ndarray]:
    """Reads what `save_components` wrote."""
    with np.load(path) as data:
        return {name: data[name] for name in ("mean", "basis", "variances")}
