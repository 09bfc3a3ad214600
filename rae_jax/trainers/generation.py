"""A trained DiT-DH with its statistics and decoder, ready to make images.

Of a run with what its config names, or of converted and published weights.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.diffusion import guidance, samplers, schedules
from rae_jax.evaluation import generate
from rae_jax.evaluation import reconstruction as scores
from rae_jax.models import dit, dit_dh
from rae_jax.trainers import autoencoder, frozen, latent_diffusion, weights
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


def load(workdir: Path, decoder: str = "", **sampling: Any) -> Generator:
    """Loads the EMA network of a diffusion run and what its config names.

    Args:
        workdir: Folder of a `latent_diffusion` run.
        decoder: Workdir of a decoder run; that of the config if empty.
        **sampling: Values in place of those in `config.sampling`.

    Raises:
        ConfigError: If the folder holds no such run, or no decoder is known.
    """
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if config.trainer != "latent_diffusion":
        raise configs.ConfigError(
            f"{workdir} holds a run of {config.trainer!r}, not of 'latent_diffusion'."
        )
    config.sampling.update(sampling)
    decoder = decoder or config.decoder
    if decoder == "none":
        raise configs.ConfigError(
            "The run names no decoder; give the workdir of one by --decoder."
        )
    mesh = sharding.make_mesh(-1)
    loaded = autoencoder.find(decoder, workdir)
    params = {
        "dit": checkpoints.load_params(workdir),
        "stats": frozen.load_stats(config.latent_stats, config.encoder.sizes, workdir),
        "decoder": loaded.params,
    }
    return Generator(config, sharding.place(params, mesh), loaded, mesh)


@dataclasses.dataclass(frozen=True)
class ConvertedGenerator:
    """Networks of any origin as a chain from noise to image, on a mesh.

    Attributes:
        graphs: Static parts: "model", "autoencoder" and, for autoguidance, "guide".
        params: Their parameters.
        latent_shape: Shape (h, w, c) of a latent.
        num_classes: Number of classes; this label means none.
        times: Decreasing grid of times.
        interval: Times at which guidance acts.
        mesh: Devices that share the batch.
    """

    graphs: dict[str, nnx.GraphDef]
    params: dict[str, state.Params]
    latent_shape: tuple[int, int, int]
    num_classes: int
    times: np.ndarray
    interval: guidance.Interval
    mesh: jax.sharding.Mesh

    def images(
        self, labels: np.ndarray, *, scale: float, seed: int, batch_size: int
    ) -> Iterator[np.ndarray]:
        """Yields uint8 images (b, h, w, 3) of the labels, in order.

        Args:
            labels: Classes (n,).
            scale: Of autoguidance if there is a guide, else of classifier-free
                guidance; 1 for none.
            seed: With the index of a sample, determines its noise.
            batch_size: Samples at a time; it does not change the images.
        """
        compiled = jax.jit(partial(self._sample, scale, seed))
        rows = sharding.batch_sharding(self.mesh)
        yield from generate.generate(
            partial(compiled, self.params), labels, batch_size, rows
        )

    def _sample(self, scale, seed, params, index, labels):
        networks = {n: nnx.merge(g, params[n]) for n, g in self.graphs.items()}
        velocity, guide = networks["model"], networks.get("guide")
        if guide is not None:
            velocity = guidance.autoguidance(velocity, guide, scale, self.interval)
        else:
            velocity = guidance.classifier_free(
                velocity, scale, self.num_classes, self.interval
            )
        eps = generate.sample_noise(seed, index, self.latent_shape)
        z = samplers.sample_euler(velocity, eps, labels, self.times)
        return scores.to_uint8(networks["autoencoder"].decode(z))


def load_converted(
    model: str,
    autoencoder: str,
    *,
    guide: str | None = None,
    latent_stats: str | None = None,
    num_points: int = 50,
    final_zero: bool = False,
    guidance_interval: guidance.Interval = (0.0, 1.0),
    dtype: str = "float32",
) -> ConvertedGenerator:
    """Loads networks from files, the hub or runs; defaults are the official ones.

    Args:
        model: Diffusion transformer; see `weights.open_source`.
        autoencoder: Autoencoder of its latents; likewise.
        guide: Weaker diffusion transformer of the same latents, for autoguidance.
        latent_stats: File of statistics in place of the autoencoder's.
        num_points: See `samplers.euler_times`; times are shifted by the latents'
            dimension.
        final_zero: Likewise.
        guidance_interval: Times at which guidance acts.
        dtype: Type of the products.

    Raises:
        ValueError: The networks are for other latents or classes.
    """
    options = dict(dtype=dtype, remat="none")
    networks = {
        "autoencoder": weights.load_autoencoder(autoencoder, latent_stats, **options)
    }
    shape = tuple(networks["autoencoder"].latent_mean.shape)
    classes = {}
    for name, source in {"model": model, "guide": guide}.items():
        if source is not None:
            networks[name] = _load_diffusion(source, shape, options)
            classes[name] = networks[name].num_classes
    if len(set(classes.values())) > 1:
        raise ValueError(
            f"{model} has {classes['model']} classes and {guide} {classes['guide']}."
        )
    shift = schedules.dimension_shift(math.prod(shape))
    mesh = sharding.make_mesh(-1)
    params = {name: state.param_dict(network) for name, network in networks.items()}
    return ConvertedGenerator(
        {name: nnx.graphdef(network) for name, network in networks.items()},
        sharding.place(params, mesh),
        shape,
        classes["model"],
        samplers.euler_times(num_points, shift, final_zero=final_zero),
        guidance_interval,
        mesh,
    )


def _load_diffusion(
    source: str, shape: tuple[int, int, int], options: dict[str, str]
) -> dit.DiT | dit_dh.DiTDH:
    """Loads a diffusion transformer for latents of a shape (h, w, c)."""
    opened = weights.open_source(source)
    if opened.kind not in latent_diffusion.NETWORKS:
        raise ValueError(
            f"{source} holds weights of the kind {opened.kind}, not of a diffusion "
            "transformer."
        )
    size, channels = (opened.arguments[k] for k in ("input_size", "in_channels"))
    if (size, size, channels) != shape:
        raise ValueError(
            f"{source} is for latents {(size, size, channels)}; those of the "
            f"autoencoder are {shape}."
        )
    return weights.load(opened, **options)
