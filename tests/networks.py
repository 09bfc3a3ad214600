"""Networks with random weights, files of them, and their comparison."""

import jax
import numpy as np

from rae_jax.convert import sources, torch_files
from rae_jax.models import pretrained

DECODER = dict(
    in_channels=64,
    num_patches=16,
    patch_size=4,
    hidden_size=32,
    depth=1,
    num_heads=2,
    intermediate_size=64,
)
# What diffusers can build: heads of 64 features, a table for 518 pixels.
ENCODER = dict(
    name="dinov2_with_registers",
    image_size=56,
    patch_size=14,
    hidden_size=64,
    depth=1,
    num_heads=1,
    intermediate_size=256,
    table_size=518,
)

encode = jax.jit(lambda model, images: model.encode(images))
decode = jax.jit(lambda model, z: model.decode(z))
call = jax.jit(lambda model, *inputs: model(*inputs))


def drawn(cls, **arguments):
    """Returns a network whose weights are U(0.5, 1.5) / 10, statistics U(0.5, 1.5)."""
    network = pretrained.Skeleton(cls, arguments)
    rng = np.random.default_rng(0)

    def value(name, shape):
        draw = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return draw if name.startswith("latent") else draw * rng.choice([-0.1, 0.1])

    items = ((name, value(name, shape)) for name, shape in network.shapes.items())
    return network.filled(items, (), "random")


def network(name, arguments):
    """Returns an argument that is a network, as records have it."""
    return {"class": name, "arguments": arguments}


def write_pt(path, arrays, **values):
    """Writes arrays and plain values as torch would; returns the path."""
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    torch_files.write_pt(path, arrays.items(), specs, values)
    return path


def assert_same_file(actual, desired):
    """Same names, types, shapes and bits."""
    actual, desired = sources.open_tensors(actual), sources.open_tensors(desired)
    assert set(actual.shapes) == set(desired.shapes)
    for name in desired.shapes:
        a, b = actual.read(name), desired.read(name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name
