"""Small encoders for tests: from the golden folders, or filled from numpy."""

import functools
from pathlib import Path

import flax.traverse_util
import golden_map
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rae_jax.convert import sources
from rae_jax.models import encoders, pretrained, rae, vit_encoder

GOLDENS = {"dinov2": 56, "mae": 32, "siglip2": 32}  # Input size by file.
TINY = dict(
    image_size=32,
    patch_size=8,
    hidden_size=16,
    depth=3,
    num_heads=2,
    intermediate_size=32,
)
encode = jax.jit(lambda encoder, images: rae.encode(encoder, images))
run = jax.jit(lambda encoder, images: encoder(images))


@functools.partial(jax.jit, static_argnums=2)
def block_features(encoder, images, indices):
    return encoder.block_features(images, indices)


def hf_folder(golden: str) -> Path:
    return golden_map.FOLDER / f"hf_{golden}"


@functools.cache
def load(golden: str, image_size: int, normalize: bool = True):
    folder = hf_folder(golden)
    return vit_encoder.ViTEncoder.from_pretrained(
        folder, image_size=image_size, normalize=normalize
    )


def make(name: str, **changes) -> vit_encoder.ViTEncoder:
    """Filled from numpy: compiling random initialisers takes most of the time."""
    sizes = TINY | changes
    model = nnx.eval_shape(
        lambda: encoders.make_encoder(name, rngs=nnx.Rngs(0), **sizes)
    )
    graphdef, params = nnx.split(model, nnx.Param)
    flat = flax.traverse_util.flatten_dict(nnx.to_pure_dict(params))
    rng = np.random.default_rng(1)
    for path, leaf in flat.items():
        flat[path] = jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)
    if name == "dinov3":
        bias = ("blocks", "block", "attn", "qkv", "bias")
        flat[bias] = flat[bias].at[:, 16:32].set(0)
    return nnx.merge(graphdef, flax.traverse_util.unflatten_dict(flat))


def parameters(model) -> dict[str, np.ndarray]:
    source, shapes = pretrained.parameters_of(model)
    return {name: source.read(name) for name in shapes}


def stored(folder: Path) -> dict[str, np.ndarray]:
    source = sources.open_tensors(folder)
    return {name: source.read(name) for name in source.shapes}


def images(h: int, w: int, b: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((b, h, w, 3)), "f4")
