"""Frechet distances in the feature space of networks that are at hand.

`fd_efflite0` uses EfficientNet-Lite0, an ImageNet classifier from a Python package,
and `fd_NAME_mean` an encoder of this project. Neither is the FID, whose network is in
`inception_features`.
"""

import os

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rae_jax.evaluation import extractors
from rae_jax.layers import resize
from rae_jax.models import efficientnet, metrics_nets, vit_encoder

EFFLITE0 = "fd_efflite0"
INPUT_SIZE = 128


def make_efflite0(
    batch_size: int = 64, *, input_size: int = INPUT_SIZE, mesh: Mesh | None = None
) -> extractors.Extractor:
    """Returns pooled EfficientNet-Lite0 features, "pool" (b, 1280).

    Args:
        batch_size: Images at a time.
        input_size: Side in pixels that the network sees; smaller is faster, and
            distances are comparable only at one size.
        mesh: Devices; all there are if None.

    Raises:
        ModuleNotFoundError: The package with the weights is not installed.
    """
    params = metrics_nets.load_efficientnet_lite0()
    model = nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)

    def features(params, images):
        images = images.astype(jnp.float32) / 255.0
        model = nnx.merge(graphdef, params)
        return {extractors.POOL: model.features(images, input_size)}

    return extractors.Extractor(
        EFFLITE0, features, params, batch_size=batch_size, mesh=mesh
    )


def make_encoder(
    source: str | os.PathLike, *, batch_size: int = 64, mesh: Mesh | None = None
) -> extractors.Extractor:
    """Returns the mean patch token of a pretrained encoder, "pool" (b, d).

    Images are resized to the encoder's size (bicubic with antialiasing) and
    normalised; tokens are those after its last norm, with its affine part. Distances
    are called fd_NAME_mean, such as fd_dinov2_mean. FD-DINOv2 of the literature uses
    the class token of a ViT-L/14 instead, which the encoders here do not return, so
    values must not be compared with it.

    Args:
        source: What `ViTEncoder.from_pretrained` loads: a hub id, folder or file.
        batch_size: Images at a time.
        mesh: Devices; all there are if None.
    """
    encoder = vit_encoder.ViTEncoder.from_pretrained(
        source, normalize=False, dtype="float32"
    )
    graphdef, params = nnx.split(encoder, nnx.Param)
    size = encoder.input_size

    def features(params, images):
        x = images.astype(jnp.float32) / 255.0
        if x.shape[1:3] != (size, size):
            x = resize.resize_bicubic_antialias(x, size, size)
            x = jnp.clip(x, 0.0, 1.0)  # Cubic weights overshoot.
        encoder = nnx.merge(graphdef, params)
        mean, std = (
            jnp.asarray(values, jnp.float32)[None, None, None, :]
            for values in (encoder.image_mean, encoder.image_std)
        )
        return {extractors.POOL: jnp.mean(encoder((x - mean) / std), axis=1)}

    return extractors.Extractor(
        f"fd_{encoder.name}_mean", features, params, batch_size=batch_size, mesh=mesh
    )
