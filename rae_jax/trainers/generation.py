"""A trained DiT-DH with its statistics and decoder, ready to make images."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.evaluation import generate
from rae_jax.evaluation import reconstruction as scores
from rae_jax.trainers import autoencoder, frozen, latent_diffusion
from rae_jax.training import checkpoints, sharding, state


@dataclasses.dataclass(frozen=True)
class Generator:
    """Parameters of the whole chain from noise to image, on the devices of a mesh.

    Attributes:
        config: Config of the diffusion run.
        params: {"dit", "stats", "decoder"}.
        decoder: The autoencoder whose decoder is used.
        mesh: Devices that share the batch.
        compiled: Samplers by guidance scale, shared with `untrained`.
    """

    config: ConfigDict
    params: dict[str, state.Params]
    decoder: autoencoder.Autoencoder
    mesh: jax.sharding.Mesh
    compiled: dict[float, Callable[..., jax.Array]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def num_classes(self) -> int:
        """Number of classes that the network was built for."""
        return self.config.model.num_classes

    def untrained(self) -> "Generator":
        """Returns the same chain with a freshly initialised network."""
        make = latent_diffusion.make_model(self.config)
        params = jax.jit(
            lambda: state.param_dict(make(rngs=nnx.Rngs(self.config.seed)))
        )()
        placed = sharding.place(params, self.mesh)
        return dataclasses.replace(self, params=self.params | {"dit": placed})

    def images(
        self, labels: np.ndarray, *, scale: float, seed: int, batch_size: int
    ) -> Iterator[np.ndarray]:
        """Yields uint8 images (b, h, w, 3) of the labels, in order.

        Args:
            labels: Classes (n,).
            scale: Classifier-free guidance scale; 1 for none.
            seed: With the index of a sample, determines its noise.
            batch_size: Samples at a time; it does not change the images.
        """
        if scale not in self.compiled:
            self.compiled[scale] = latent_diffusion.make_generate(
                self.config, self.decoder, scale
            )

        def sample(index, y):
            p = self.params
            images = self.compiled[scale](
                p["dit"], p["stats"], p["decoder"], seed, index, y
            )
            return scores.to_uint8(images)

        rows = sharding.batch_sharding(self.mesh)
        yield from generate.generate(sample, labels, batch_size, rows)

    def states(
        self, labels: np.ndarray, keep: tuple[int, ...], *, scale: float, seed: int
    ) -> np.ndarray:
        """Returns decoded states (len(keep), n, h, w, 3) on the way from noise."""
        sample = latent_diffusion.make_sample(self.config, scale, keep)
        index = np.arange(len(labels), dtype=np.int32)
        p = self.params
        _, states = sample(p["dit"], p["stats"], seed, index, labels.astype(np.int32))
        decode = jax.jit(self.decoder.decode)
        return np.stack([np.asarray(decode(p["decoder"], z)) for z in states])


def load(workdir: Path, decoder: str = "") -> Generator:
    """Loads the EMA network of a diffusion run and what its config names.

    Args:
        workdir: Folder of a `latent_diffusion` run.
        decoder: Workdir of a decoder run; that of the config if empty.

    Raises:
        ConfigError: If the folder holds no such run, or no decoder is known.
    """
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if config.trainer != "latent_diffusion":
        raise configs.ConfigError(
            f"{workdir} holds a run of {config.trainer!r}, not of 'latent_diffusion'."
        )
    decoder = decoder or config.decoder
    if decoder == "none":
        raise configs.ConfigError(
            "The run names no decoder; give the workdir of one by --decoder."
        )
    mesh = sharding.make_mesh(-1)
    loaded = autoencoder.load(frozen.resolve(decoder, workdir))
    params = {
        "dit": checkpoints.load_params(workdir),
        "stats": frozen.load_stats(config.latent_stats, config.encoder.sizes, workdir),
        "decoder": loaded.params,
    }
    return Generator(config, sharding.place(params, mesh), loaded, mesh)
