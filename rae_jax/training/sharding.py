"""Where arrays live: the device mesh, and the layout of states and batches.

The rule for each array is in `layers.partition`; the compiler inserts the gathers and
reductions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.layers import partition


def make_mesh(
    sizes: Mapping[str, int] | int = -1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a mesh with the axes `data`, `fsdp` and `tensor`.

    Devices of one slice (of one machine, for GPUs) are laid out after their links;
    over several, `data` takes up the slow network between them first.

    Args:
        sizes: As `config.mesh`: {"data": -1, "fsdp": 1, "tensor": 1}, where missing
            axes have size 1 and -1 stands for all devices that are left. A number is
            the size of `data`.
        devices: All of `jax.devices()` if None. For devices that are not here, as
            `jax.experimental.topologies` describes them, enter the mesh by
            `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`, not `jax.set_mesh`.

    Raises:
        ValueError: The sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": sizes} if isinstance(sizes, int) else dict(sizes.items())
    shape = _shape(sizes, len(devices))
    count = math.prod(shape)
    if count < len(devices) and jax.process_count() > 1 and devices == jax.devices():
        raise ValueError(
            f"mesh = {_text(shape)} uses {count} of {len(devices)} devices; the "
            f"{jax.process_count()} processes have to use all of theirs."
        )
    grid = _arrange(shape, devices[:count])
    for row in grid.reshape(-1, shape[-1]):
        if len({device.process_index for device in row}) > 1:
            raise ValueError(
                f"mesh = {_text(shape)}: devices that share a sample (tensor) have to "
                "be of one process, which reads it; use a smaller tensor."
            )
    return Mesh(grid, partition.AXES, axis_types=(AxisType.Auto,) * len(shape))


def _shape(sizes: dict[str, int], available: int) -> tuple[int, ...]:
    unknown = sorted(set(sizes) - set(partition.AXES))
    if unknown:
        raise ValueError(
            f"mesh has no axis {unknown[0]!r}; choose from {list(partition.AXES)}."
        )
    shape = [int(sizes.get(name, 1)) for name in partition.AXES]
    free = [i for i, size in enumerate(shape) if size == -1]
    known = math.prod(size for size in shape if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh = {_text(shape)}: sizes are at least 1, and one of them may be -1 "
            "for all devices that are left."
        )
    if free and available % known == 0:
        shape[free[0]] = available // known
    elif free or known > available:
        raise ValueError(
            f"mesh = {_text(shape)}, but {available} device(s) are there; "
            "use data = -1 for all of them, and sizes that divide their number."
        )
    return tuple(shape)


def _text(shape: Sequence[int]) -> str:
    names = zip(partition.AXES, shape, strict=True)
    return ", ".join(f"{name}: {size}" for name, size in names)


def _arrange(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Returns the devices in the shape of the mesh, neighbours close together."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    over, left = [], len(slices)
    for size in shape:
        over.append(math.gcd(size, left))
        left //= over[-1]
    if len(slices) == 1 or left > 1:
        # Several slices that no axis divides by: in the order of the devices, as
        # with the processes of a CPU cluster.
        return _within(shape, devices)
    inner = tuple(size // part for size, part in zip(shape, over, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inner, over, devices, allow_split_physical_axes=True
    )


def _within(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over the devices, alike for those that share a model."""
    return NamedSharding(mesh, partition.batch_spec(mesh.shape))


def batch_parts(mesh: Mesh) -> int:
    """Returns into how many parts `batch_sharding` splits the rows."""
    return math.prod(mesh.shape.get(name, 1) for name in partition.BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises a ValueError if a batch cannot be split evenly over the devices."""
    rows = batch_parts(mesh)
    if batch_size % (rows * accumulate):
        raise ValueError(
            f"data.batch_size = {batch_size} is not a multiple of {rows * accumulate} "
            f"({rows} devices x {accumulate} accumulation steps)."
        )


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns a sharding for every array of a state or of frozen networks."""

    def rule(path, x):
        names = [_name(key) for key in path]
        if not names or names[-1] not in partition.WEIGHTS:
            return replicated(mesh)
        stacked = partition.STACKED in names
        return NamedSharding(mesh, partition.weight_spec(x.shape, mesh.shape, stacked))

    return jax.tree.map_with_path(rule, tree)


def _name(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", None))


def place(tree: Any, mesh: Mesh) -> Any:
    """Copies host arrays, such as a frozen network's, to where a state's would be."""
    return jax.device_put(tree, state_sharding(tree, mesh))
