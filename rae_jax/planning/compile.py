"""Compiles the work of a config for a target with the target's own compiler.

The compilers of TPUs and GPUs run on any machine. They are loaded into the process
that calls `compiled`, which must not use an accelerator of its own: `planning.process`
starts one.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.planning import links, targets, works
from rae_jax.training import sharding

# Set before JAX is imported: the compiler for a chip that is not here, beside others.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # Its entries are for what is here.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
}
# What the compilers are told, as launch/env.sh tells them where a run is started.
OPTIONS: dict[str, dict[str, bool]] = {
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    },
    "cuda": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
    },
}
# And on one kind of chip: the vector memory that an operation may use, in KiB.
CHIP_OPTIONS: dict[str, dict[str, int]] = {
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": 65536}
}
# Without a GPU at hand nothing can be timed.
_UNTIMED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class MissingCompiler(ValueError):
    """The compiler of a target is not installed."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program with what the compiler says of it.

    Attributes:
        work: What was compiled.
        links: The devices it was compiled for.
        mesh: How they are arranged: sizes by axis.
        text: The program after scheduling; empty if it does not fit.
        argument_bytes: Arguments on one device.
        temporary_bytes: What it needs beside them.
        seconds: Time that tracing and compiling took.
        shortage: What the compiler says if a device has too little memory.
    """

    work: works.Work
    links: links.Links
    mesh: dict[str, int]
    text: str
    argument_bytes: float
    temporary_bytes: float
    seconds: float
    shortage: str = ""


def options(chip: targets.Chip) -> dict[str, Any]:
    """Returns what the compiler for a chip is told."""
    return OPTIONS[chip.platform] | CHIP_OPTIONS.get(chip.name, {})


def check_compiler(target: targets.Target) -> None:
    """Raises a MissingCompiler that says what to install."""
    if target.chip.platform == "tpu":
        if not _installed("libtpu") and "TPU_LIBRARY_PATH" not in os.environ:
            raise MissingCompiler(
                f"Compiling for {target.text} needs Google's TPU compiler, which runs "
                'on any x86 Linux machine: pip install "rae_jax[plan]", or libtpu.'
            )
        return
    if not _installed("jax_cuda12_plugin") and not _installed("jax_cuda13_plugin"):
        version = importlib.metadata.version("jaxlib")
        raise MissingCompiler(
            f"Compiling for {target.text} needs XLA's GPU compiler, which runs without "
            'a GPU or its driver: pip install "rae_jax[plan]", or '
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} "
            "nvidia-cuda-nvcc-cu12."
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def topology(target: targets.Target) -> Any:
    """Returns the devices of a target as JAX describes them.

    Raises:
        MissingCompiler: See `check_compiler`.
        ValueError: The compiler knows no such slice.
    """
    check_compiler(target)
    chip = target.chip
    try:
        if chip.platform == "tpu":
            shape = "x".join(map(str, target.shape))
            arguments: dict[str, Any] = dict(chip.options)
            if target.slices > 1:
                arguments["num_slices"] = target.slices
            name = f"{chip.name}:{shape}"
            found = topologies.get_topology_desc(name, "tpu", **arguments)
        else:
            found = topologies.get_topology_desc(
                chip.name,
                "cuda",
                target_config=targets.gpu_description(chip),
                topology=f"1x{target.slices}x{target.shape[0]}",
            )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"The compiler knows no {target.text}: {str(error).splitlines()[0]}"
        ) from error
    return found.devices


def compiled(config: ConfigDict, target: targets.Target, what: str) -> Compiled:
    """Compiles a config's work for a target.

    Args:
        config: Experiment; `mesh` counts the target's devices.
        target: Where it would run.
        what: One of `works.WHATS`.

    Raises:
        ValueError: The config cannot be laid out on the target, or the compiler is
            missing or refuses.
    """
    start = time.monotonic()
    devices = list(topology(target))
    mesh = sharding.make_mesh(config.mesh, devices)
    work = works.make(config, what, mesh)
    # Devices that are not here cannot be entered by `jax.set_mesh`.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(
            work.function,
            donate_argnums=0 if work.donate else (),
            out_shardings=work.results,
        ).lower(*work.args)
        done, message = _compile(program, target)
    if done is None:
        held = works.device_bytes(work.args)
        needed = (held, max(0.0, needed_bytes(message) - held))
    else:
        needed = _memory(done)
    return Compiled(
        work=work,
        links=links.Links(target, _places(mesh, target)),
        mesh=dict(mesh.shape),
        text=done.as_text() if done else "",
        argument_bytes=needed[0],
        temporary_bytes=needed[1],
        seconds=time.monotonic() - start,
        shortage=message,
    )


def _compile(
    program: jax.stages.Lowered, target: targets.Target
) -> tuple[jax.stages.Compiled | None, str]:
    """Returns the compiled program, or what the compiler says of too little memory."""
    given = options(target.chip)
    if target.chip.platform == "cuda":
        given |= _UNTIMED
    try:
        return program.compile(compiler_options=given), ""
    except jax.errors.JaxRuntimeError as error:
        return None, shortage(error)


def _memory(done: jax.stages.Compiled) -> tuple[float, float]:
    """Returns the bytes of the arguments and of all else on one device."""
    memory = done.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    other = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return float(memory.argument_size_in_bytes), float(other + max(results, 0))


def _places(mesh: Mesh, target: targets.Target) -> list[links.Place]:
    def place(device: Any) -> links.Place:
        if target.chip.platform == "cuda":
            return device.process_index, (device.id,)
        return getattr(device, "slice_index", 0) or 0, tuple(device.coords)

    return [place(device) for device in np.asarray(mesh.devices).flat]


def shortage(error: Exception) -> str:
    """Returns what the compiler says of too little memory.

    Raises:
        ValueError: It refuses the program for another reason.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        raise ValueError(f"The compiler refuses the program: {text[:2000]}") from error
    return text.splitlines()[0]


def needed_bytes(message: str) -> float:
    """Returns the largest size that a message names before what is available."""
    sizes = re.findall(r"([\d.]+)([KMGT])(?![\w.])", message)
    return max((float(n) * _SIZES[unit] for n, unit in sizes), default=0.0)
