"""Networks whose features stand for images when sets of them are compared."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rae_jax.training import sharding

POOL = "pool"  # What Frechet distances, precision and recall are made of.
SPATIAL = "spatial"
LOGITS = "logits"


class Extractor:
    """A feature network on the devices of a mesh.

    The features of an image depend neither on its batch nor on the devices, to
    float32 rounding: products are in full float32 whatever the device's default.

    Args:
        name: What distances in these features are called.
        function: (params, uint8 images (b, h, w, 3)) -> features (b, d) by name,
            "pool" among them; traced once per image size.
        params: Its parameters.
        batch_size: Images at a time, raised to a multiple of the devices.
        mesh: Devices; all there are if None.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any, jax.Array], Mapping[str, jax.Array]],
        params: Any,
        *,
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        mesh = sharding.make_mesh(-1) if mesh is None else mesh
        self.name, self.mesh = name, mesh
        self.batch_size = math.ceil(batch_size / mesh.size) * mesh.size
        self._params = sharding.place(params, mesh)

        @jax.jit
        def features(params, images):
            with jax.default_matmul_precision("highest"):
                return dict(function(params, images))

        self._features = features

    def __call__(self, images: jax.Array | np.ndarray) -> dict[str, jax.Array]:
        """Returns features (b, d) by name of uint8 images (b, h, w, 3).

        Args:
            images: A batch on the mesh, or on the host: then b is at most
                `batch_size`, and the batch is filled up, so that one program serves
                all. Float images are refused: scores are defined on 8 bits.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                "Features are of uint8 images (b, h, w, 3), not "
                f"{images.dtype} {images.shape}."
            )
        if isinstance(images, jax.Array):
            return self._features(self._params, images)
        count = len(images)
        copies = np.repeat(images[-1:], self.batch_size - count, axis=0)
        rows = sharding.batch_sharding(self.mesh)
        placed = jax.device_put(np.concatenate([images, copies]), rows)
        found = self._features(self._params, placed)
        return {name: values[:count] for name, values in found.items()}
