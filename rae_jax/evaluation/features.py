"""Frechet distances in the feature space of networks that are at hand.

`fd_efflite0` uses EfficientNet-Lite0, an ImageNet classifier from a Python package,
`fd_NAME_mean` and `fd_NAME_cls` an encoder of this project, and `fd_dinov2` is the
FD-DINOv2 of the literature (arXiv:2306.04675). None is the FID, whose network is in
`inception_features`.
"""

import os

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rae_jax import config as configs
from rae_jax.evaluation import extractors
from rae_jax.layers import resize
from rae_jax.models import efficientnet, metrics_nets, vit_encoder

EFFLITE0 = "fd_efflite0"
FD_DINOV2 = "fd_dinov2"
MEAN, CLASS = "mean", "cls"
TOKENS = (MEAN, CLASS)
# Sizes of the encoder that FD-DINOv2 is defined with, a ViT-L/14 without registers.
_FD_DINOV2_SIZES = dict(name="dinov2", input_size=224, patch_size=14, hidden_size=1024)
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
    source: str | os.PathLike,
    *,
    token: str = MEAN,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> extractors.Extractor:
    """Returns one token per image of a pretrained encoder, "pool" (b, d).

    Images are resized to the encoder's size as Pillow does it (bicubic with
    antialiasing, rounded to 8 bits) and normalised; tokens are those after its last
    norm, with its affine part. Distances are called fd_NAME_mean or fd_NAME_cls, such
    as fd_dinov2_mean. With the class token of a DINOv2 ViT-L/14 without registers at
    224 pixels (facebook/dinov2-large) they are FD-DINOv2 and called fd_dinov2.

    Args:
        source: What `ViTEncoder.from_pretrained` loads: a hub id, folder or file.
        token: "mean" of the patch tokens, or "cls" for the class token.
        batch_size: Images at a time.
        mesh: Devices; all there are if None.

    Raises:
        ConfigError: There is no such token.
    """
    if token not in TOKENS:
        raise configs.ConfigError(configs.suggest(token, TOKENS, "encoder token"))
    encoder = vit_encoder.ViTEncoder.from_pretrained(
        source, normalize=False, dtype="float32"
    )
    if token == CLASS and encoder.cls_token is None:
        raise configs.ConfigError(
            f"{source}: encoders of the family {encoder.name!r} have no class token; "
            f"choose the encoder token {MEAN!r}."
        )
    graphdef, params = nnx.split(encoder, nnx.Param)

    def features(params, images):
        encoder = nnx.merge(graphdef, params)
        x = resize_pillow(images, encoder.input_size) / 255.0
        mean, std = (
            jnp.asarray(values, jnp.float32)[None, None, None, :]
            for values in (encoder.image_mean, encoder.image_std)
        )
        x = (x - mean) / std
        if token == CLASS:
            return {extractors.POOL: encoder.class_token(x)}
        return {extractors.POOL: jnp.mean(encoder(x), axis=1)}

    return extractors.Extractor(
        distance_name(encoder, token),
        features,
        params,
        batch_size=batch_size,
        mesh=mesh,
    )


def distance_name(encoder: vit_encoder.ViTEncoder, token: str) -> str:
    """Returns what distances in an encoder's token are called."""
    found = {name: getattr(encoder, name) for name in _FD_DINOV2_SIZES}
    if token == CLASS and found == _FD_DINOV2_SIZES:
        return FD_DINOV2
    return f"fd_{encoder.name}_{token}"


def resize_pillow(images: jax.Array, size: int) -> jax.Array:
    """Resizes uint8 images (b, h, w, 3) to (b, size, size, 3), levels as float32.

    Pillow's bicubic filter: along rows, then columns, each rounded to 8 bits.
    """
    x = images.astype(jnp.float32)
    for height, width in ((images.shape[1], size), (size, size)):
        if x.shape[1:3] != (height, width):
            x = resize.resize_bicubic_antialias(x, height, width)
            x = jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)
    return x
