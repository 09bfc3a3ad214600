"""Which axis of the mesh splits which dimension of which array, decided in one place.

The mesh has three axes. `data` holds replicas of the weights, `fsdp` splits batch and
weights, `tensor` splits heads and the inner width of MLPs. Weights lie split along
their first dimension; where one is used it is cast to the type of the products and
gathered, and its gradient goes back by reduce-scatter in that type.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
WEIGHT_AXES = ("fsdp", "tensor")
WEIGHTS = ("kernel", "table")
MIN_SHARDED_SIZE = 2**16
GATHERED = "weight"  # Name of results that `stack.Stack` may keep.
STACKED = "block"  # Below this name, `stack.Stack` holds (depth, ...).


def axis_sizes() -> dict[str, int]:
    """Returns the axes of the mesh in use that the compiler handles, with sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name in AXES and kind == AxisType.Auto
    }


def device() -> Any:
    """Returns a device, or its description, that the program in hand is made for.

    It has a `platform` and a `device_kind`; where a mesh is in use, it is of that mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found = None if mesh.empty else mesh.abstract_device
    return jax.devices()[0] if found is None else found


def batch_spec(sizes: Mapping[str, int]) -> P:
    """Returns how the leading axis of batches and activations is split."""
    return P(tuple(name for name in BATCH_AXES if name in sizes) or None)


def weight_spec(
    shape: Sequence[int], sizes: Mapping[str, int], stacked: bool = False
) -> P:
    """Returns how a stored weight, its average or its moments are split.

    Of at least 65,536 entries, it is split along its first dimension that divides
    evenly by `fsdp` and `tensor`, or else by `fsdp`: parts of whole rows are what the
    compiler gathers best. The depth of a stack is no dimension of a weight. Vectors
    and kernels of two-dimensional convolutions stay whole.

    Args:
        shape: Of an array whose name is one of `WEIGHTS`; all others stay whole.
        sizes: Sizes of the mesh's axes.
        stacked: Whether the first dimension is the depth of a stack.
    """
    none, shape = ((None,), shape[1:]) if stacked else ((), shape)
    if len(shape) not in (2, 3) or math.prod(shape) < MIN_SHARDED_SIZE:
        return P()
    for axes in (WEIGHT_AXES, WEIGHT_AXES[:1]):
        axes = tuple(a for a in axes if sizes.get(a, 1) > 1)
        parts = math.prod(sizes[a] for a in axes)
        for i, size in enumerate(shape):
            if axes and size % parts == 0:
                split = axes if len(axes) > 1 else axes[0]
                return P(*none, *(None,) * i, split)
    return P()


def pin_batch(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of x split over the batch axes, the others whole.

    Without it the partitioner may split activations over features, which costs
    collectives in every block. Without a mesh, or with one whose size does not divide
    the batch, x is returned as it is.
    """
    return _pin(x, ())


def pin_features(x: jax.Array, unit: int = 1) -> jax.Array:
    """Like `pin_batch`, with the features split over `tensor` in runs of `unit`."""
    if not splits_features(x.shape[-1], unit):
        return x
    return _pin(x, (None,) * (x.ndim - 2) + ("tensor",))


def splits_features(size: int, unit: int = 1) -> bool:
    """Returns whether features in runs of `unit` are shared out over `tensor`."""
    tensor = axis_sizes().get("tensor", 1)
    return tensor > 1 and size % (unit * tensor) == 0


def gather(
    weight: jax.Array,
    dtype: DTypeLike,
    *,
    shape: Sequence[int] | None = None,
    used: P | None = None,
) -> jax.Array:
    """Returns a stored weight in `dtype`, whole or as `used`, ready for a product.

    Args:
        weight: Split as `weight_spec` says, without the depth of its stack.
        dtype: What is sent: the cast comes first, forwards and backwards.
        shape: If given, the weight is reshaped before it is gathered.
        used: How devices hold the result.
    """
    shape = tuple(weight.shape if shape is None else shape)
    sizes = axis_sizes()
    stored, used = weight_spec(weight.shape, sizes), used or P()
    if stored == P() and used == P():
        return weight.astype(dtype).reshape(shape)
    plan = _Plan(stored, used, weight.shape, shape, weight.dtype, jnp.dtype(dtype))
    return ad_checkpoint.checkpoint_name(_gather(weight, plan), GATHERED)


class _Plan(NamedTuple):
    stored: P
    used: P
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    stored_dtype: jnp.dtype
    dtype: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, plan: _Plan) -> jax.Array:
    weight = jax.lax.with_sharding_constraint(weight.astype(plan.dtype), plan.stored)
    return jax.lax.with_sharding_constraint(weight.reshape(plan.shape), plan.used)


def _gather_forward(weight, plan):
    return _gather(weight, plan), None


def _gather_backward(plan, _, gradient):
    # The transpose of `_gather` would first make the gradient whole.
    gradient = gradient.reshape(plan.stored_shape)
    gradient = jax.lax.with_sharding_constraint(gradient, plan.stored)
    return (gradient.astype(plan.stored_dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _pin(x: jax.Array, rest: tuple[str | None, ...]) -> jax.Array:
    sizes = axis_sizes()
    rows = batch_spec(sizes)
    count = math.prod(sizes.get(name, 1) for name in BATCH_AXES)
    if rows == P(None) or x.shape[0] % count:
        return x
    return jax.lax.with_sharding_constraint(x, P(*rows, *rest))
