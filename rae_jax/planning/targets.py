"""Accelerators and how many of them: peak rates, memory, links, topology strings.

Sources, read in November 2026. TPU: the pages "TPU v3" to "TPU v6e" of the Cloud TPU
documentation (docs.cloud.google.com/tpu/docs/v5p and its neighbours) for peak FLOP/s,
HBM bandwidth, ports and network cards; "How to Scale Your Model"
(jax-ml.github.io/scaling-book) for the usable one-way bandwidth of a link; clocks are
peak FLOP/s over the FLOPs per cycle of the matrix units, and reproduce what libtpu's
cost model charges for a large product. HBM is what the compiler says is available to
a program. GPU: NVIDIA's data sheets of the A100 80GB, H100 SXM and H200, dense rates.
"""

import dataclasses
import difflib
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: As in a target, "v5p".
        platform: Compiler, "tpu" or "cuda".
        peak_flops: Dense bfloat16 FLOP/s.
        hbm_bytes: Memory that a program can use.
        hbm_bandwidth: Bytes/s.
        clock: Cycles/s of the compiler's cost model.
        link_bandwidth: Bytes/s that a chip can send to its neighbours, one way, over
            all of its links.
        axes: Axes of the torus, 1 where every chip reaches every other.
        network_bandwidth: Bytes/s that a chip can send beyond its slice or node.
        group: Chips on one host; a GPU target larger than that has several nodes.
        devices: JAX devices on a chip.
        options: Further arguments of the topology.
        ring: Smallest length of a torus axis whose ends are joined.
    """

    name: str
    platform: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    clock: float
    link_bandwidth: float
    axes: int
    network_bandwidth: float
    group: int
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()
    ring: int = 4


def _tpu(name: str, tflops: float, hbm: float, bandwidth: float, ghz: float, **more):
    rates = (tflops * 1e12, hbm * GIB, bandwidth * 1e9, ghz * 1e9)
    return Chip(name, "tpu", *rates, **more)


def _gpu(name: str, tflops: float, hbm: float, bandwidth: float, ghz: float, **more):
    rates = (tflops * 1e12, hbm * GIB, bandwidth * 1e9, ghz * 1e9)
    return Chip(name, "cuda", *rates, axes=1, group=8, **more)


MEGACORE = (("chip_config_name", "megacore"),)
CHIPS = {
    chip.name: chip
    for chip in (
        # Both cores of a v3 chip are devices of their own.
        _tpu(
            "v3", 123, 30.96, 900, 0.94, link_bandwidth=280e9, axes=2,
            network_bandwidth=3e9, group=4, devices=2,
        ),
        _tpu(
            "v4", 275, 30.75, 1228, 1.05, link_bandwidth=270e9, axes=3,
            network_bandwidth=6.25e9, group=4, options=MEGACORE,
        ),
        _tpu(
            "v5e", 197, 15.75, 819, 1.5, link_bandwidth=180e9, axes=2,
            network_bandwidth=3.1e9, group=8, ring=16,
        ),
        _tpu(
            "v5p", 459, 95.74, 2765, 1.75, link_bandwidth=540e9, axes=3,
            network_bandwidth=6.25e9, group=4,
        ),
        _tpu(
            "v6e", 918, 31.25, 1638, 1.75, link_bandwidth=360e9, axes=2,
            network_bandwidth=12.5e9, group=8, ring=16,
        ),
        _gpu(
            "a100", 312, 79.1, 2039, 1.41, link_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        _gpu(
            "h100", 989, 79.1, 3352, 1.98, link_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        _gpu(
            "h200", 989, 139.8, 4800, 1.98, link_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
    )
}  # fmt: skip
# GPUs by the number of their streaming multiprocessors and more, as XLA reads it.
GPU_DETAILS = {
    "a100": dict(name="NVIDIA A100-SXM4-80GB", cores=108, shared=166912, l2=41943040),
    "h100": dict(name="NVIDIA H100 80GB HBM3", cores=132, shared=232448, l2=52428800),
    "h200": dict(name="NVIDIA H200", cores=132, shared=232448, l2=62914560),
}
# Share of a GPU's memory that JAX takes, as launch/env.sh sets it.
GPU_MEMORY_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of chips, joined in a way.

    Attributes:
        text: As it was given.
        chip: Their kind.
        shape: Chips along each axis of the torus of one slice; of a GPU target, the
            chips of one node.
        slices: Slices, or nodes, that the data-centre network joins.
    """

    text: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s of all chips."""
        return self.chip.peak_flops * self.chips


def parse(text: str) -> Target:
    """Reads a target: `v5p:4x4x4`, `v6e:4x4`, `v5e:16x16*2` (slices), `h100:8`.

    Raises:
        ValueError: The kind or the shape is not known; lists what there is.
    """
    match = re.fullmatch(r"(\w+):([0-9]+(?:x[0-9]+)*)(?:\*([0-9]+))?", text.strip())
    name = text.split(":")[0].strip().lower()
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown target {text!r}.{hint} {examples()}")
    chip = CHIPS[name]
    if match is None:
        raise ValueError(f"Target {text!r} names no topology. {examples()}")
    sizes = tuple(int(n) for n in match[2].split("x"))
    slices = int(match[3] or 1)
    if not slices or not all(sizes):
        raise ValueError(f"Target {text!r} has no chips. {examples()}")
    if chip.platform == "cuda":
        return _gpu_target(text, chip, sizes, slices)
    return _tpu_target(text, chip, sizes, slices)


def _gpu_target(text: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Target:
    count = math.prod(sizes) * slices
    if len(sizes) > 1 or slices > 1:
        raise ValueError(
            f"Target {text!r}: give the number of GPUs alone, {chip.name}:{count}; "
            f"more than {chip.group} are nodes of {chip.group}."
        )
    if count > chip.group and count % chip.group:
        raise ValueError(
            f"Target {text!r}: GPUs beyond one node must be a multiple of {chip.group}."
        )
    nodes = max(1, count // chip.group)
    return Target(text, chip, (count // nodes,), nodes)


def _tpu_target(text: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Target:
    if len(sizes) == 1:
        raise ValueError(
            f"Target {text!r}: a TPU slice is given by the chips along each axis of "
            f"its torus, such as {_example(chip)}; {sizes[0]} may count cores."
        )
    if len(sizes) > 3 or (len(sizes) == 3 and chip.axes == 2 and sizes[2] != 1):
        raise ValueError(f"Target {text!r}: a {chip.name} slice has {chip.axes} axes.")
    sizes = sizes[:2] if chip.axes == 2 else (*sizes, 1)[:3]
    return Target(text, chip, sizes, slices)


def _example(chip: Chip) -> str:
    if chip.platform == "cuda":
        return f"{chip.name}:{chip.group}"
    return f"{chip.name}:{'x'.join('4' * chip.axes)}"


def examples() -> str:
    """Returns a sentence that lists the targets there are."""
    return f"Targets are {', '.join(_example(chip) for chip in CHIPS.values())}."


def gpu_description(chip: Chip) -> str:
    """Returns a GPU as XLA's compiler reads it, a text-format `GpuTargetConfig`."""
    details = GPU_DETAILS[chip.name]
    major = 8 if chip.name == "a100" else 9
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {details["shared"] + 1024}
  shared_memory_per_block_optin: {details["shared"]}
  threads_per_core_limit: 2048 core_count: {details["cores"]}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.hbm_bandwidth:.0f} l2_cache_size: {details["l2"]}
  clock_rate_ghz: {chip.clock / 1e9}
  device_memory_size: {chip.hbm_bytes:.0f}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{details["name"]}"
"""
