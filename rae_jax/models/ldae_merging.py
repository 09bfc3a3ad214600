"""An l-DAE encoder at a fixed noise level, written as a plain ViT.

The modulation of a block depends on the level alone, so it is part of the weights
around it: (1 + scale, shift) is the affine part of a LayerNorm, a gate scales the
output map of its branch. A tokenizer that maps patches is part of the patch embedding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rae_jax import config as configs
from rae_jax.convert import tables
from rae_jax.layers import conditioning, positions
from rae_jax.models import tokenizers

FAMILY = "ijepa"  # Of `encoder_names.FAMILIES`: a ViT without a class token.
_BLOCK = "net.blocks.block"
_SAME = ("attn.qkv.kernel", "attn.qkv.bias", "mlp.fc1.kernel", "mlp.fc1.bias")

Arguments = dict[str, Any]
Arrays = dict[str, np.ndarray]


def merge(
    arguments: Mapping[str, Any], source: tables.Source
) -> tuple[Arguments, Arrays]:
    """Returns a `ViTEncoder`'s arguments and parameters, equal to an `LDAEEncoder`.

    What is multiplied here is multiplied in float64.

    Args:
        arguments: All constructor arguments of the `LDAEEncoder`.
        source: Its parameters.

    Raises:
        ConfigError: The tokenizer is a convolutional network.
    """
    check(arguments)

    def read(name: str) -> np.ndarray:
        return source.read(name).astype(np.float64)

    arrays = _patch_embedding(arguments, read)
    table = positions.sincos_2d(
        arguments["hidden_size"], arguments["image_size"] // arguments["patch_size"]
    )
    arrays["pos_embed"] = table[None]
    arrays |= {f"blocks.block.{k}": v for k, v in _blocks(arguments, read).items()}
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    return vit_arguments(arguments), arrays


def check(arguments: Mapping[str, Any]) -> None:
    """Raises a ConfigError where an `LDAEEncoder` is no plain ViT at any level."""
    if arguments["tokenizer"] not in tokenizers.PATCHWISE:
        raise configs.ConfigError(
            f"The tokenizer {arguments['tokenizer']!r} is a convolutional network, "
            "which no plain ViT contains: such an encoder is probed as it is, in our "
            "own layout."
        )


def vit_arguments(arguments: Mapping[str, Any]) -> Arguments:
    """Returns the arguments of the plain ViT from all those of an `LDAEEncoder`."""
    kept = ("image_size", "patch_size", "hidden_size", "depth", "num_heads")
    kept += ("dtype", "remat")
    half = (0.5, 0.5, 0.5)
    width = int(arguments["hidden_size"] * arguments["mlp_ratio"])
    return {name: arguments[name] for name in kept} | dict(
        name=FAMILY,
        intermediate_size=width,
        activation="gelu_tanh",
        layer_norm_eps=1e-6,
        image_mean=half,
        image_std=half,
    )


def _patch_embedding(arguments: Mapping[str, Any], read: Any) -> Arrays:
    """Composes tokenizer, projection and embedding into one map of patches."""
    maps = [("net.embed.kernel", "net.embed.bias")]
    in_image = arguments["input_space"] == "image"
    if in_image and arguments["clean"] == "projected":
        maps = [("decode.kernel", "decode.bias"), *maps]
    if not in_image or arguments["clean"] == "projected":
        maps = [("encode.map.kernel", "encode.map.bias"), *maps]
    kernel, bias = map(read, maps[0])
    for names in maps[1:]:
        after, shift = map(read, names)
        kernel, bias = kernel @ after, bias @ after + shift
    return {"patch_embed.proj.kernel": kernel, "patch_embed.proj.bias": bias}


def _blocks(arguments: Mapping[str, Any], read: Any) -> Arrays:
    """Returns the stacked blocks' parameters, those of the modulation merged."""
    c = _condition(arguments, read)
    kernel = read(f"{_BLOCK}.modulation.kernel")
    modulation = np.einsum("c,lcd->ld", c / (1 + np.exp(-c)), kernel)
    modulation += read(f"{_BLOCK}.modulation.bias")
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6, axis=1)
    merged = {name: read(f"{_BLOCK}.{name}") for name in _SAME}
    merged |= {"norm1.scale": 1 + scale1, "norm1.bias": shift1}
    merged |= {"norm2.scale": 1 + scale2, "norm2.bias": shift2}
    for name, gate in (("attn.proj", gate1), ("mlp.fc2", gate2)):
        merged[f"{name}.kernel"] = read(f"{_BLOCK}.{name}.kernel") * gate[:, None, :]
        merged[f"{name}.bias"] = read(f"{_BLOCK}.{name}.bias") * gate
    return merged


def _condition(arguments: Mapping[str, Any], read: Any) -> np.ndarray:
    """Returns the condition (c,) of the fixed level, and of no class."""
    width = arguments["hidden_size"] // arguments["condition_divisor"]

    def make() -> nnx.Module:
        return conditioning.SinusoidalTimeEmbedding(width, width, rngs=nnx.Rngs(0))

    names = [(layer, part) for layer in ("fc1", "fc2") for part in ("kernel", "bias")]
    params: dict[str, dict] = {"fc1": {}, "fc2": {}}
    for layer, part in names:
        value = read(f"net.t_embedder.{layer}.{part}")
        params[layer][part] = jnp.asarray(value, jnp.float32)
    embed = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)
    is_single = arguments["schedule"] == "single_sigma"
    t = jnp.full(1, 0 if is_single else arguments["time_index"])
    with jax.default_matmul_precision("highest"):
        c = np.asarray(embed(t)[0], np.float64)
    if arguments["num_classes"]:
        c = c + read("net.y_embedder.table")[arguments["num_classes"]]
    return c
