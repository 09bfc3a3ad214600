"""A trained RAE: what a `rae_decoder` workdir holds, ready to encode and decode."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.convert import published
from rae_jax.evaluation import reconstruction
from rae_jax.models import pretrained, rae
from rae_jax.trainers import frozen, inputs, rae_decoder, weights
from rae_jax.training import checkpoints, distributed, state

OWN = "own"
LOSS = {"perceptual": "vgg"}  # Of the noise curves of an autoencoder without a run.


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Encoder and decoder as static parts and plain parameters.

    Attributes:
        config: Config of the run; of converted weights what is known of it.
        encoder_def: Static part of the encoder.
        decoder_def: Static part of the decoder.
        params: {"encoder", "decoder"}, an argument of every jitted function.
    """

    config: ConfigDict
    encoder_def: nnx.GraphDef
    decoder_def: nnx.GraphDef
    params: state.Params

    def encode(self, params: state.Params, images: jax.Array) -> jax.Array:
        """Maps images (b, h, w, 3) in [0, 1] to raw latents."""
        return rae.encode(nnx.merge(self.encoder_def, params["encoder"]), images)

    def decode(self, params: state.Params, z: jax.Array) -> jax.Array:
        """Maps raw latents to images (b, h, w, 3), not clipped."""
        encoder = nnx.merge(self.encoder_def, params["encoder"])
        return rae.decode(nnx.merge(self.decoder_def, params["decoder"]), z, encoder)


def load(workdir: Path) -> Autoencoder:
    """Loads the EMA decoder of a run and the encoder that it was trained for.

    Raises:
        ConfigError: If the folder holds no decoder run.
        CheckpointError: If the run has no checkpoint.
    """
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    if config.trainer != "rae_decoder":
        raise configs.ConfigError(
            f"{workdir} holds a run of {config.trainer!r}, not of 'rae_decoder'."
        )
    params = {
        "encoder": frozen.load_encoder(config.encoder, workdir),
        "decoder": checkpoints.load_params(workdir),
    }
    return Autoencoder(
        config,
        frozen.encoder(config.encoder)[0],
        state.abstract_model(rae_decoder.make_model(config)),
        params,
    )


def find(source: str, workdir: Path, config: ConfigDict | None = None) -> Autoencoder:
    """Loads what a config names as its decoder.

    Args:
        source: Workdir of a decoder run, or a file or folder of a whole autoencoder
            in any layout, relative to `workdir`; or a name of `convert.published`; or
            "own", the decoder that the latents of `config.encoder` come with.
        workdir: Folder of the run whose config it is.
        config: That config, for "own".

    Raises:
        ConfigError, CheckpointError: See `load`; or the encoder has no own decoder.
        FileNotFoundError, ValueError: See `weights.load_autoencoder`.
    """
    if source == OWN and config is not None:
        return load_own(config, workdir)
    path = frozen.resolve(source, workdir)
    if is_converted(source, path):
        source = str(path) if path.exists() else source
        return from_model(weights.load_autoencoder(source))
    return load(path)


def load_own(config: ConfigDict, workdir: Path) -> Autoencoder:
    """Loads encoder and decoder of a run whose latents come with both.

    Raises:
        ConfigError: They do not.
    """
    encoder, decoder = frozen.load_pair(config.encoder, workdir)
    known = ConfigDict({"data": config.data.to_dict(), "loss": LOSS})
    known.encoder = config.encoder.copy_and_resolve_references()
    return _of_networks(known, encoder, decoder)


def is_converted(source: str, path: Path) -> bool:
    """Returns whether a name or its path is an autoencoder outside of a run."""
    if path.exists():
        settings = pretrained.read_config(path)
        return path.is_file() or bool(settings and "trainer" not in settings)
    names = published.AUTOENCODERS.keys() | published.DIFFUSERS.keys()
    return source in names | published.KL.keys()


def from_model(model: rae.RAE) -> Autoencoder:
    """Takes encoder and decoder out of an autoencoder, whose statistics stay behind."""
    sizes = ("patch_size", "hidden_size")
    config = ConfigDict()
    config.data = blocks.data(image_size=image_size(model), batch_size=32)
    config.encoder = dict(sizes={name: getattr(model.encoder, name) for name in sizes})
    config.encoder.sizes.image_size = model.encoder.input_size
    config.loss = LOSS
    return _of_networks(config, model.encoder, model.decoder)


def _of_networks(
    config: ConfigDict, encoder: nnx.Module, decoder: nnx.Module
) -> Autoencoder:
    params = {
        "encoder": state.param_dict(encoder),
        "decoder": state.param_dict(decoder),
    }
    return Autoencoder(config, nnx.graphdef(encoder), nnx.graphdef(decoder), params)


def make_reconstruct(loaded: Autoencoder) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the map of uint8 images (b, h, w, 3) through encoder and decoder."""
    function = rae_decoder.make_reconstruct(loaded.config)
    params = jax.device_put(loaded.params)

    def reconstruct(images):
        recon = function(params["decoder"], params["encoder"], images)
        return distributed.to_host(reconstruction.to_uint8(recon))

    return reconstruct


def image_size(model: rae.RAE) -> int:
    """Returns the height and width of the images that an autoencoder makes."""
    return model.decoder.grid * model.decoder.patch_size


def make_converted_reconstruct(model: rae.RAE) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the map of uint8 images (b, h, w, 3) through an autoencoder."""
    graphdef, params = nnx.graphdef(model), state.param_dict(model)

    @jax.jit
    def through(params, images):
        model = nnx.merge(graphdef, params)
        z = model.encode(inputs.to_float(images))
        return reconstruction.to_uint8(model.decode(z))

    return lambda images: distributed.to_host(through(params, images))
