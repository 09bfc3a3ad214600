"""The whole chain from noise to image, whatever its networks come from."""

import dataclasses
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rae_jax.diffusion import grids
from rae_jax.evaluation import generate, reconstruction
from rae_jax.trainers import sampling
from rae_jax.training import distributed, sharding, state

Decode = Callable[[Mapping[str, state.Params], jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Chain:
    """A diffusion transformer and a decoder on the devices of a mesh.

    Attributes:
        plan: How samples are drawn.
        graphs: Static parts of "dit" and, for autoguidance, of "guide".
        decode: Maps (params, normalised latents (b, h, w, c)) to images (b, H, W, 3),
            not clipped.
        params: Parameters of those networks, and what `decode` needs.
        stats: Mean and variance (h, w, c) that undo the normalisation, as
            `rae.denormalize` has them.
        mesh: Devices that share the batch.
        compiled: Programs, shared with copies that have other parameters.
    """

    plan: sampling.Plan
    graphs: Mapping[str, nnx.GraphDef]
    decode: Decode
    params: dict[str, state.Params]
    stats: Mapping[str, np.ndarray]
    mesh: jax.sharding.Mesh
    compiled: dict[Hashable, Callable[..., Any]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def num_classes(self) -> int:
        """Number of classes that the network was built for."""
        return self.plan.null_label

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (h, w, c) of a latent."""
        return tuple(self.stats["mean"].shape)

    def images(
        self, labels: np.ndarray, *, scale: float, seed: int, batch_size: int
    ) -> Iterator[np.ndarray]:
        """Yields uint8 images (b, h, w, 3) of the labels, in order; see `batches`."""
        options = dict(scale=scale, seed=seed, batch_size=batch_size)
        for drawn in self.batches(labels, **options):
            yield drawn.images

    def batches(
        self,
        labels: np.ndarray,
        *,
        scale: float,
        seed: int,
        batch_size: int,
        index: np.ndarray | None = None,
        latents: bool = False,
    ) -> Iterator[generate.Drawn]:
        """Yields samples of the labels, batch by batch.

        Args:
            labels: Classes (n,) of all samples.
            scale: Guidance scale; 1 for none.
            seed: With the index of a sample, determines its noise.
            batch_size: Samples at a time; it does not change the images.
            index: Which samples to make, in this order; all if None.
            latents: Whether to return their latents, too.

        Raises:
            FloatingPointError: A sample is not finite.
        """
        draw, decode = self.draw(scale), self._decode()

        def sample(index, y):
            with jax.set_mesh(self.mesh):  # Else a TPU has no kernel for attention.
                z = draw(self.params, seed, index, y).x
                images, finite = decode(self.params, z)
            return generate.Drawn(index, images, z if latents else None, finite)

        rows = sharding.batch_sharding(self.mesh)
        yield from generate.draw(sample, labels, batch_size, rows, index)

    def states(
        self, labels: np.ndarray, keep: tuple[int, ...], *, scale: float, seed: int
    ) -> np.ndarray:
        """Returns decoded states (len(keep), n, h, w, 3) on the way from noise.

        They are not clipped; `keep` has indices into the times of the plan.
        """
        draw = self.draw(scale, keep)
        index = np.arange(len(labels), dtype=np.int32)
        states = draw(self.params, seed, index, labels.astype(np.int32)).states
        decode = jax.jit(self.decode)
        return np.stack([distributed.to_host(decode(self.params, z)) for z in states])

    def draw(
        self, scale: float, keep: tuple[int, ...] = ()
    ) -> Callable[..., grids.Sampled]:
        """Returns the compiled sampler, whose latents are normalised.

        Args:
            scale: Guidance scale; 1 for none.
            keep: Indices into the times of the plan of the states to record.

        Returns:
            A function (params, seed, index (b,), labels (b,)) of which `seed` is
            static.
        """

        def run(params, seed, index, labels):
            networks = {n: nnx.merge(g, params[n]) for n, g in self.graphs.items()}
            shape = self.latent_shape
            return self.plan.draw(networks, scale, shape, seed, index, labels, keep)

        key = (self.plan, scale, keep)
        return self.compiled.setdefault(key, jax.jit(run, static_argnums=1))

    def _decode(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Returns (params, z) -> uint8 images and which samples are finite (b,)."""

        def run(params, z):
            images = self.decode(params, z)
            finite = [jnp.isfinite(x).all(axis=(1, 2, 3)) for x in (z, images)]
            return reconstruction.to_uint8(images), finite[0] & finite[1]

        return self.compiled.setdefault(self.decode, jax.jit(run))

    def describe(self) -> dict[str, Any]:
        """Returns what changes samples, beside scale, seed and labels.

        Networks are told apart by a checksum of their parameters.
        """
        checksums = {name: _checksum(tree) for name, tree in self.params.items()}
        return {"sampler": self.plan.describe(), "weights": checksums}


def _checksum(tree: state.Params) -> str:
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = zlib.crc32(jax.tree_util.keystr(path).encode(), value)
        value = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8), value)
    return f"{value:08x}"
