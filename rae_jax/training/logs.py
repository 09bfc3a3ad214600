"""Process 0's record of a run: JSONL always, TensorBoard, and a progress bar."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rae_jax import storage
from rae_jax.training import spool

METRICS_NAME = "metrics.jsonl"
SKIPS_NAME = "skips_in_a_row"
# Counts since the first step, beginnings of their names: the newest is logged.
COUNTS = ("grad_spikes", "loss_spikes", "skipped_steps", SKIPS_NAME)


def note(text: str) -> None:
    """Says something to whoever watches process 0."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Says what should be looked at; every process does."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)


class MetricsLog:
    """Appends scalars to `metrics.jsonl` and TensorBoard.

    A resumed run first drops the lines beyond the step that it resumes from, so
    the file never holds a step twice.

    Args:
        workdir: Folder of the run.
        start_step: Step that the run resumes from.
        tensorboard: Whether to write TensorBoard events too.
    """

    def __init__(self, workdir: Path, start_step: int, *, tensorboard: bool = True):
        self._main = jax.process_index() == 0
        self._writer = None
        if not self._main:
            return
        kept = [r for r in read_metrics(workdir) if r["step"] <= start_step]
        lines = "".join(json.dumps(r) + "\n" for r in kept)
        self._spool = spool.Spool(storage.path(workdir))
        path = self._spool.folder / METRICS_NAME
        storage.write_atomically(path, lines.encode())
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = self._spool.folder / "tensorboard"
            # The suffix tells files that begin in the same second apart.
            self._writer = SummaryWriter(
                str(folder),
                purge_step=start_step + 1,
                filename_suffix=f".{start_step}",
            )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one line of scalars."""
        if not self._main:
            return
        record: dict[str, Any] = {"step": step}
        record |= {k: float(v) for k, v in scalars.items()}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, float(value), step)
        self._spool.grown()

    def sync(self) -> None:
        """Brings what is written where the run's other files are."""
        if self._main:
            self._complain(self._spool.sync())

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._writer is not None:
            self._writer.close()
        if self._main:
            self._file.close()
            self._complain(self._spool.close())

    def _complain(self, problem: str) -> None:
        if problem:
            warn(f"The log is incomplete: {problem}")


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Reads the scalars of a run; a line cut short by a kill is passed over."""
    path = storage.path(workdir) / METRICS_NAME
    records = []
    text = storage.read_bytes(path).decode(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_scores(workdir: Path, prefix: str) -> dict[str, float]:
    """Returns the newest value of every scalar whose name begins with `prefix`."""
    found: dict[str, float] = {}
    for record in read_metrics(workdir):
        found |= {k: v for k, v in record.items() if k.startswith(prefix)}
    return found


class Meter:
    """Averages step metrics and measures throughput between two log lines."""

    def __init__(self, batch_size: int, flops_per_step: float, peak_flops: float):
        self._batch_size = batch_size
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._count = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts a new interval, leaving out what came between (evaluation)."""
        self._start = time.perf_counter()
        self._timed = 0

    def get_state(self) -> dict[str, Any]:
        """Returns what `summary` will average, for a checkpoint."""
        # Copies: the checkpoint is written while the next steps go on.
        sums, counts = dict(self._sums), dict(self._counts)
        return {"sums": sums, "count": self._count, "counts": counts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues an interval that a checkpoint cut in two."""
        self._sums, self._count = dict(state["sums"]), state["count"]
        self._counts = dict(state.get("counts", {}))

    def add(self, metrics: dict[str, float]) -> None:
        """Counts one finished step; means leave out one that is not finite."""
        self._timed += 1
        self._counts = {k: v for k, v in metrics.items() if k.startswith(COUNTS)}
        if not all(map(math.isfinite, metrics.values())):
            return
        for name, value in metrics.items():
            if name not in self._counts:
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def summary(self) -> dict[str, float]:
        """Returns the means since the last call, images per second and MFU."""
        means = {k: v / self._count for k, v in self._sums.items()} | self._counts
        self._sums, self._count = {}, 0
        elapsed = time.perf_counter() - self._start
        if self._timed and elapsed > 0:
            steps_per_second = self._timed / elapsed
            means["images_per_second"] = steps_per_second * self._batch_size
            if self._flops_per_step:
                rate = steps_per_second * self._flops_per_step
                means["mfu"] = rate / self._peak_flops
        self.restart_clock()
        return means


def process_start() -> float:
    """Returns when this process was started, as `time.time()`; now if unknown."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        age = uptime - float(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - age


class StartUp:
    """Seconds from the command to the first step, and what they went into.

    Args:
        started: When the command was given, as `time.time()`.
    """

    def __init__(self, started: float):
        self._started = started
        self._times = {"loading": time.time() - started}
        self._last = time.time()
        self._logged = False

    def ready(self) -> None:
        """Notes that the state is there."""
        self._mark("state")

    def stepped(self) -> None:
        """Notes that the first step is done."""
        self._mark("first_step")

    def take(self) -> dict[str, float]:
        """Returns the seconds by name for the log, once."""
        if self._logged or "first_step" not in self._times:
            return {}
        self._logged = True
        total = sum(self._times.values())
        return {
            "seconds_to_first_step": total,
            "seconds_of_first_step": self._times["first_step"],
        }

    def describe(self) -> str:
        """Returns the same as a sentence."""
        cache = jax.config.jax_compilation_cache_dir
        where = f"compiled programs in {cache}" if cache else "no compilation cache"
        times = self._times
        return (
            f"first step after {sum(times.values()):.1f} s: {times['loading']:.1f} s "
            f"loading, {times['state']:.1f} s for the state, "
            f"{times['first_step']:.1f} s compiling and running it ({where})"
        )

    def _mark(self, name: str) -> None:
        now = time.time()
        self._times[name], self._last = now - self._last, now


def check_finite(step: int, metrics: dict[str, float], max_skips: int = 0) -> None:
    """Stops a run whose loss or gradient is no longer a number.

    A step that a guard has left out may be one, unless it is one of too many.

    Args:
        step: Step of the metrics.
        metrics: Scalars by name.
        max_skips: Steps that may be left out in a row.

    Raises:
        FloatingPointError: Names the step and all metrics of it.
    """
    skips = max((v for k, v in metrics.items() if k.startswith(SKIPS_NAME)), default=0)
    if skips > max_skips:
        raise FloatingPointError(
            f"Step {step}: the guard has left out {skips:.0f} steps in a row, more "
            f"than guard.max_skips = {max_skips}. The run stops; checkpoints hold the "
            "parameters from before. Lower optimizer.peak_lr, set optimizer.clip_norm, "
            "or raise guard.spike_factor if such gradients are usual here."
        )
    bad = [k for k, v in metrics.items() if not math.isfinite(v)]
    if bad and not skips:
        values = ", ".join(f"{k} = {v:.4g}" for k, v in metrics.items())
        raise FloatingPointError(
            f"Step {step}: {', '.join(bad)} is not finite ({values}). The run stops; "
            "the last checkpoint is from before. Lower optimizer.peak_lr, set "
            "optimizer.clip_norm, or use dtype=float32."
        )


def make_progress(console: Console | None = None) -> Progress:
    """Makes a progress bar with the time left."""
    return Progress(
        TextColumn("[bold]{task.description:<18}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:<16}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True, quiet=jax.process_index() != 0),
    )
