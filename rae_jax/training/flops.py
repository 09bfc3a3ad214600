"""Model FLOPs of a function, and the peak that a device could reach."""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from rae_jax.layers import sums

# Dense bfloat16 peak per chip in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Counts the FLOPs of all matrix products and convolutions of a function.

    Loop bodies count as often as they run, which XLA's own cost analysis does
    not do. Rematerialised parts count again: trace a function without
    rematerialisation for model FLOPs. The function is traced as for one CPU, whatever
    mesh is in use, so that attention counts alike with and without a kernel.

    Args:
        function: Any traceable function.
        *args: Arrays or shapes (`jax.ShapeDtypeStruct`).
    """
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.sharding.use_abstract_mesh(_without_kernels()):
        return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _without_kernels() -> AbstractMesh:
    """Returns the mesh in use, or one of a device, as if its devices were CPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = ((1,), ("data",)) if mesh.empty else (mesh.axis_sizes, mesh.axis_names)
    types = (AxisType.Auto,) if mesh.empty else mesh.axis_types
    cpu = AbstractDevice("cpu", num_cores=None, platform="cpu")
    return AbstractMesh(*sizes, axis_types=types, abstract_device=cpu)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == sums.sum_rows.__name__:
            continue  # A sum, as far as the model is concerned.
        if eqn.primitive.name == "dot_general":
            contracted, _ = eqn.params["dimension_numbers"][0]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif eqn.primitive.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            depth = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
            total += 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeats * sum(_count(inner) for inner in _inner_jaxprs(eqn))
    return total


def _inner_jaxprs(eqn: Any) -> list[Any]:
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


@cache
def peak_flops(device: jax.Device) -> float:
    """Returns the peak FLOP/s of a device.

    Known accelerators by their data sheet; any other device by timing float32
    matrix products on it, so that utilisation means "share of what a large
    product reaches here".
    """
    kind = device.device_kind
    known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
    if known:
        return PEAK_TFLOPS[max(known, key=len)] * 1e12
    size = 1024
    best = math.inf
    with jax.set_mesh(Mesh([device], ("data",))):  # Whatever mesh the caller is in.
        x = jnp.ones((size, size))
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
