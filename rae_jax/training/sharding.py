"""Where arrays live: the device mesh and one rule for the whole train state.

The mesh has one axis, "data". It splits the batch and, with `fsdp`, every large
array of the state; the compiler inserts the gathers and reductions.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MIN_SHARDED_SIZE = 2**16


def make_mesh(data: int = -1) -> Mesh:
    """Makes a mesh of `data` devices (-1: all that there are).

    Raises:
        ValueError: If there are fewer devices.
    """
    devices = jax.devices()
    data = len(devices) if data == -1 else data
    if not 1 <= data <= len(devices):
        raise ValueError(
            f"mesh.data = {data}, but {len(devices)} device(s) are there; "
            "use -1 for all of them."
        )
    return Mesh(np.asarray(devices[:data]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over the devices."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises a ValueError if a batch cannot be split evenly over the devices."""
    parts = mesh.shape["data"] * accumulate
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size = {batch_size} is not a multiple of {parts} "
            f"({mesh.shape['data']} devices x {accumulate} accumulation steps)."
        )


def state_sharding(tree: Any, mesh: Mesh, fsdp: bool) -> Any:
    """Returns a sharding for every array of a state, optimiser moments included.

    With `fsdp`, an array of at least 65,536 entries is split along its largest
    dimension that divides evenly, never along the depth of a scanned stack (the
    scan slices that one). Everything else is replicated.
    """
    size = mesh.shape["data"]

    def rule(path, x):
        spec: list[str | None] = [None] * len(x.shape)
        if fsdp and math.prod(x.shape) >= MIN_SHARDED_SIZE:
            first = 1 if "blocks" in jax.tree_util.keystr(path) else 0
            dims = sorted(range(first, len(x.shape)), key=lambda i: -x.shape[i])
            for i in dims:
                if x.shape[i] % size == 0:
                    spec[i] = "data"
                    break
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map_with_path(rule, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """Copies host arrays to every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))
