"""What a compiled program says of a run: memory, time, utilisation and cost."""

from typing import Any

from ml_collections import ConfigDict

from rae_jax.planning import compile as compiling
from rae_jax.planning import costs, targets

COMPILER = "compiler"
ROOFLINE = "roofline"


def report(
    done: compiling.Compiled, config: ConfigDict, target: targets.Target, what: str
) -> dict[str, Any]:
    """Returns all figures as JSON can hold them.

    Bytes and cycles are those of one device, which is a chip, or on v3 half of one.
    FLOPs are those of all chips. What needs a program that fits is None without one.
    """
    available = target.chip.hbm_bytes / target.chip.devices
    if target.chip.platform == "cuda":
        available *= targets.GPU_MEMORY_SHARE
    peak = done.argument_bytes + done.temporary_bytes
    fits = not done.shortage and peak <= available
    found: dict[str, Any] = {
        "target": target.text,
        "chips": target.chips,
        "what": what,
        "mesh": done.mesh,
        "remat": config.get("model", {}).get("remat", "") if what == "train" else "",
        "batch_size": done.work.batch_size,
        "fits": fits,
        "shortage": done.shortage,
        "hbm_bytes_available": available,
        "hbm_bytes_state": done.work.held_bytes,
        "hbm_bytes_arguments": done.argument_bytes,
        "hbm_bytes_activations": done.temporary_bytes,
        "hbm_bytes_peak": peak,
        "flops_per_step": done.work.model_flops,
        "steps": done.work.executions,
        "compile_seconds": done.seconds,
        "compiler_options": compiling.options(target.chip),
    }
    cost = costs.count(done.text, done.links) if done.text else None
    return found | _speed(done, target, cost)


def _speed(
    done: compiling.Compiled, target: targets.Target, cost: costs.Costs | None
) -> dict[str, Any]:
    names = (
        "basis cycles_per_step seconds_per_step compute_seconds exposed_seconds "
        "collective_seconds predicted_mfu compute_mfu executed_flops_per_step "
        "kernel_flops_per_step hbm_traffic_per_step collective_bytes_per_step "
        "collective_bytes_by_kind images_per_second hours chip_hours top notes"
    )
    if cost is None:
        return dict.fromkeys(names.split())
    seconds = cost.seconds + cost.exposed
    hours = seconds * done.work.executions / 3600
    rate = done.work.model_flops / target.peak_flops
    tpu = target.chip.platform == "tpu"
    return {
        "basis": COMPILER if tpu else ROOFLINE,
        "cycles_per_step": cost.seconds * target.chip.clock,
        "seconds_per_step": seconds,
        "compute_seconds": cost.seconds,
        "exposed_seconds": cost.exposed,
        "collective_seconds": cost.network,
        "predicted_mfu": rate / seconds,
        "compute_mfu": rate / cost.seconds,
        "executed_flops_per_step": cost.flops * target.devices,
        "kernel_flops_per_step": cost.kernel_flops * target.devices,
        "hbm_traffic_per_step": cost.hbm_bytes,
        "collective_bytes_per_step": sum(cost.collective_bytes.values()),
        "collective_bytes_by_kind": dict(cost.collective_bytes),
        "images_per_second": done.work.batch_size / seconds,
        "hours": hours,
        "chip_hours": hours * target.chips,
        "top": [[line, share] for line, share in costs.top_lines(cost)],
        "notes": _notes(cost, tpu),
    }


def _notes(cost: costs.Costs, tpu: bool) -> list[str]:
    """Returns what a reader must know to trust the figures as far as they go."""
    notes = []
    if tpu:
        notes.append(
            "Cycles are the compiler's estimate of everything but collectives, whose "
            "bytes over the bandwidth of their links are added where nothing else runs "
            "meanwhile."
        )
    else:
        notes.append(
            "GPU programs carry no estimate: each operation counts as the longer of "
            "its FLOPs at the peak rate and its bytes at full bandwidth. Real steps "
            "are slower; read the time as a lower bound."
        )
    if cost.kernel_flops:
        notes.append(
            f"{cost.kernel_flops / cost.flops:.0%} of the FLOPs are in custom kernels, "
            "counted at half the peak rate."
        )
    if cost.unknown:
        names = ", ".join(sorted(cost.unknown))
        notes.append(f"Kernels without known FLOPs, counted by their bytes: {names}.")
    return notes
