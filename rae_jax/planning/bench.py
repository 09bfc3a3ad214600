"""Measures a config's training step, and its input, on the devices at hand."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.data import loader
from rae_jax.trainers import inputs, registry
from rae_jax.training import flops, loop, programs, sharding

NUM_CLASSES = 1000  # Of random labels, where the config names no number.
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        steps: Steps that are timed.
        warmup: Steps before them.
        synthetic: Random arrays in place of the config's data, whose rate is then not
            measured.
        profile: Folder of a trace of the timed steps, or None.
    """

    steps: int = 20
    warmup: int = 3
    synthetic: bool = False
    profile: Path | None = None


def measure(config: ConfigDict, options: Options, tell: Tell) -> dict[str, Any]:
    """Runs the step of a config and returns what it took, as JSON can hold it.

    No weights are read: frozen networks are random, which changes no time. Parts of
    the step that begin later, such as a critic, run from the first step on.

    Args:
        config: Experiment.
        options: How to measure.
        tell: Called with what is done next.

    Raises:
        ValueError: The data is missing, or the config does not fit the devices.
    """
    if options.steps < 1 or options.warmup < 0:
        raise ValueError("--steps must be at least 1 and --warmup not negative.")
    config = from_the_start(config)
    mesh = sharding.make_mesh(config.mesh)
    accumulate = config.optimizer.accumulate if "optimizer" in config else 1
    sharding.check_batch_size(config.data.batch_size, mesh, accumulate)
    design = registry.design(config)
    batches = _batches(config, design, options)
    with jax.set_mesh(mesh):
        bench = _Bench(config, design, mesh, tell)
        found = bench.compile(next(batches))
        found |= bench.steps(options)
        if not options.synthetic:
            found |= _input_rate(batches, design.batch_size, options.steps, tell)
            found |= bench.overlapped(batches, options.steps)
    return found | bench.rates(found) | memory()


def from_the_start(config: ConfigDict) -> ConfigDict:
    """Returns a config whose step has all of its parts from the first step on."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if "gan" in config:
            config.gan.critic_start = config.gan.start = 0
        if "loss" in config and "perceptual_start" in config.loss:
            config.loss.perceptual_start = 0
    return config


def _batches(
    config: ConfigDict, design: programs.Design, options: Options
) -> Iterator[dict[str, np.ndarray]]:
    if options.synthetic:
        return _random_batches(config, design)
    try:
        return inputs.train_batches(config.data, config.seed)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}\nTo measure without data, add --synthetic: random arrays take "
            "the place of batches."
        ) from error


def _random_batches(
    config: ConfigDict, design: programs.Design
) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    classes = config.model.get("num_classes", NUM_CLASSES) if "model" in config else 2
    classes = classes or 2  # A network that is not told the class.
    batch = {}
    for name, shape in design.batch.items():
        rows = (shape.shape[0] // jax.process_count(), *shape.shape[1:])
        if np.issubdtype(shape.dtype, np.integer):
            high = 256 if shape.dtype == np.uint8 else classes
            batch[name] = rng.integers(0, high, rows).astype(shape.dtype)
        else:
            batch[name] = rng.standard_normal(rows, np.float32).astype(shape.dtype)
    while True:
        yield batch


class _Bench:
    """A compiled step with its state."""

    def __init__(
        self, config: ConfigDict, design: programs.Design, mesh: Mesh, tell: Tell
    ):
        self.design, self.mesh, self.tell = design, mesh, tell
        self.key = jax.random.key(config.seed)
        self.abstract = loop.abstract_state(design, config, mesh)
        self.rows = sharding.batch_sharding(mesh)
        self.flops = registry.model_flops(config)

    def compile(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Initialises and compiles; the first batch stays on the devices."""
        self.tell("initialising")
        start = time.perf_counter()
        placed = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.state = jax.jit(self.design.init, out_shardings=placed)(self.key)
        self.frozen = sharding.place(_random(self.design.frozen), self.mesh)
        jax.block_until_ready((self.state, self.frozen))
        initialised = time.perf_counter()
        self.tell("compiling")
        self.batch = loader.to_global(batch, self.rows)
        args = (self.state, self.frozen, self.batch, self.key)
        jitted = jax.jit(
            self.design.step, donate_argnums=0, out_shardings=(placed, None)
        )
        self.run = jitted.lower(*args).compile()
        return {
            "init_seconds": initialised - start,
            "compile_seconds": time.perf_counter() - initialised,
        }

    def steps(self, options: Options) -> dict[str, Any]:
        """Times steps on one batch, each to its end."""
        self.tell(f"timing {options.steps} steps")
        for _ in range(options.warmup):
            self._step(self.batch)
        folder = options.profile
        trace = jax.profiler.trace(str(folder)) if folder else nullcontext()
        with trace:
            times = [self._step(self.batch) for _ in range(options.steps)]
        return {
            "step_seconds": {
                "min": min(times),
                "median": statistics.median(times),
                "p90": float(np.quantile(times, 0.9)),
                "mean": statistics.fmean(times),
            }
        }

    def _step(self, batch: dict[str, jax.Array]) -> float:
        start = time.perf_counter()
        self.state, metrics = self.run(self.state, self.frozen, batch, self.key)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def overlapped(
        self, batches: Iterator[dict[str, np.ndarray]], steps: int
    ) -> dict[str, Any]:
        """Times steps as the training loop runs them, input included."""
        self.tell(f"timing {steps} steps with their input")
        before = None
        start = time.perf_counter()
        for _ in range(steps):
            batch = loader.to_global(next(batches), self.rows)
            self.state, metrics = self.run(self.state, self.frozen, batch, self.key)
            jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready((self.state, before))
        seconds = (time.perf_counter() - start) / steps
        batches.close()
        return {
            "overlapped_step_seconds": seconds,
            "overlapped_images_per_second": self.design.batch_size / seconds,
        }

    def rates(self, found: dict[str, Any]) -> dict[str, Any]:
        """Returns what follows from the times."""
        device = self.mesh.devices.flat[0]
        peak = flops.peak_flops(device)
        median = found["step_seconds"]["median"]
        stall = found.get("overlapped_step_seconds", median) - median
        return {
            "device": device.device_kind,
            "devices": self.mesh.size,
            "mesh": dict(self.mesh.shape),
            "batch_size": self.design.batch_size,
            "flops_per_step": self.flops,
            "peak_flops": peak * self.mesh.size,
            "mfu": self.flops / (median * peak * self.mesh.size),
            "images_per_second": self.design.batch_size / median,
            "stall_seconds": max(stall, 0.0),
        }


def _random(tree: Any) -> Any:
    """Returns small positive weights of given shapes, on the host."""
    rng = np.random.default_rng(0)

    def values(x):
        numbers = rng.random(x.shape, np.float32) * 0.04 + 0.01
        return numbers.astype(x.dtype)

    return jax.tree.map(values, tree)


def _input_rate(
    batches: Iterator[dict[str, np.ndarray]], size: int, count: int, tell: Tell
) -> dict[str, Any]:
    tell(f"timing {count} batches alone")
    next(batches)  # Threads and workers are up; what they have ready counts little.
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return {"input_images_per_second": size * count / (time.perf_counter() - start)}


def memory() -> dict[str, Any]:
    """Returns the most memory that was held so far, on the host and on one device."""
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    host = [resource.getrusage(kind).ru_maxrss * unit for kind in kinds]
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "host_memory_bytes": host[0],
        "worker_memory_bytes": host[1],
        "device_memory_bytes": stats.get("peak_bytes_in_use"),
    }
