"""Random weights and images that every framework can make from names alone.

They stand in for weights that are too large to keep: each tensor has a generator of
its own, seeded by its name, so order does not matter.
"""

import zlib

import numpy as np


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the tensor of a PyTorch state dict; activations keep their size.

    Statistics of batch norms are told by their name, biases and scales by their one
    axis, kernels (o, i, ...) by their several axes, and a counter by having none.
    """
    if not shape:
        return np.zeros((), np.int64)
    values = _generator(name).standard_normal(shape, np.float32)
    if name.endswith("running_var"):
        return (1.0 + 0.2 * np.tanh(values)).astype(np.float32)
    if len(shape) == 1:
        centre = 1.0 if name.endswith("weight") else 0.0
        return (centre + 0.1 * values).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return values * np.float32(np.sqrt(2.0 / fan_in))


def image(height: int, width: int) -> np.ndarray:
    """Returns a uint8 image (1, height, width, 3) of noise over a slope."""
    noise = _generator(f"{height}x{width}").uniform(0, 128, (1, height, width, 3))
    slope = np.linspace(0, 127, width)[None, None, :, None]
    return (noise + slope).astype(np.uint8)
