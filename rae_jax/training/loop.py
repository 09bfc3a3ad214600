"""The only training loop: resume, step, log, evaluate, save."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import storage
from rae_jax.data import loader
from rae_jax.training import (
    best,
    checkpoints,
    divergence,
    flops,
    interrupts,
    logs,
    programs,
    resuming,
    sharding,
    watchdog,
)

# A key of the position in a checkpoint: the evaluation of its step is still to come.
_OWED = "owes_evaluation"


def run(
    program: programs.Program,
    config: ConfigDict,
    workdir: Path,
    *,
    title: str = "train",
    allow_change: Sequence[str] = (),
    started: float | None = None,
) -> Any:
    """Trains to the last step, from the newest checkpoint if there is one.

    Args:
        program: The run.
        config: Needs seed, keep, mesh and every.{log, checkpoint, evaluate}.
        workdir: Folder for config, checkpoints, logs and results.
        title: Label of the progress bar.
        allow_change: Keys of the config that may change when the run is resumed.
        started: When the command was given, as `time.time()`; now if None.

    Returns:
        The final state.

    Raises:
        ConfigError: If the run has begun with another config.
        CheckpointError: If no checkpoint can be read, or one cannot be written.
        FloatingPointError: If a loss or gradient is not finite; what is known of it
            is in `divergence.json`.
        Interrupted: After a SIGINT or SIGTERM and a last checkpoint.
    """
    workdir = storage.path(workdir)
    resuming.check(workdir, config, allow_change)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = _Run(program, config, workdir, mesh, title)
        run.started = time.time() if started is None else started
        return run.train(allow_change)


def abstract_state(design: programs.Design, config: ConfigDict, mesh: Mesh) -> Any:
    """Returns shapes and shardings of a run's state."""
    shapes = jax.eval_shape(design.init, jax.random.key(config.seed))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.state_sharding(shapes, mesh),
    )


class _Run:
    """One call of `run`: holds what its parts share."""

    def __init__(self, program, config, workdir, mesh, title):
        self.program, self.config, self.workdir = program, config, workdir
        self.mesh, self.title = mesh, title
        # Step, metrics and images of the step that is being computed.
        self.pending: tuple[int, dict[str, jax.Array], Any] | None = None
        self.key = jax.random.key(config.seed)
        self.max_skips = config.guard.max_skips if "guard" in config else 0
        self.abstract = abstract_state(program.design, config, mesh)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        peak = flops.peak_flops(mesh.devices.flat[0]) * mesh.size
        self.meter = logs.Meter(program.design.batch_size, program.flops_per_step, peak)
        params = getattr(self.abstract, "params", None)
        self.recorder = divergence.Recorder(params, self.max_skips + 2)
        self.owes_evaluation = False

    def train(self, allow_change: Sequence[str]) -> Any:
        program, config = self.program, self.config
        self.batches = program.batches()  # If this fails, nothing is stored.
        resuming.store(self.workdir, config, allow_change)
        self.checkpoints = checkpoints.Checkpoints(self.workdir, keep=config.keep)
        metric = _block(config, "evaluation", "best", "")
        self.best = best.Best(self.workdir, config, metric)
        self.watchdog = watchdog.Watchdog(config.get("watchdog") or 0, self.workdir)
        with self.watchdog:
            try:
                start, state = self._begin()
                self.log = logs.MetricsLog(self.workdir, start)
                try:
                    state = self._steps(start, state)
                finally:
                    self.log.close()
            finally:
                self.batches.close()
                with self.watchdog.longer("the last checkpoint"):
                    self.checkpoints.close()
                self.best.close()
        if program.finish is not None:
            program.finish(state, program.frozen, self.workdir)
        return state

    def _begin(self) -> tuple[int, Any]:
        self.startup = logs.StartUp(self.started)
        found = self.checkpoints.restore_newest(self.abstract)
        if found is None:
            init = jax.jit(self.program.design.init, out_shardings=self.shardings)
            state = init(self.key)
            if self.program.begin is not None:
                state = self.program.begin(state)
            self.startup.ready()
            return 0, state
        step, state, position = found
        before = position.get("batch_size", self.program.design.batch_size)
        self.batches.set_state(self._moved(position["batches"], before))
        self.meter.set_state(position["meter"])
        self.owes_evaluation = position.get(_OWED, False)
        self.startup.ready()
        return step, state

    def _moved(self, position: dict[str, Any], before: int) -> dict[str, Any]:
        """Translates a number of batches into one of batches of another size."""
        now = self.program.design.batch_size
        return {
            k: v * before // now if before != now else v for k, v in position.items()
        }

    def _position(self) -> dict[str, Any]:
        return {
            "batches": self.batches.get_state(),
            "batch_size": self.program.design.batch_size,
            "meter": self.meter.get_state(),
            _OWED: self.owes_evaluation,
        }

    def _steps(self, start: int, state: Any) -> Any:
        program, total = self.program, self.program.design.num_steps
        step_fn = jax.jit(
            program.design.step, donate_argnums=0, out_shardings=(self.shardings, None)
        )
        rows = sharding.batch_sharding(self.mesh)
        with interrupts.StopRequest() as stop, logs.make_progress() as progress:
            self.progress, self.stop = progress, stop
            self.bar = progress.add_task(
                self.title, total=total, completed=start, note="compiling"
            )
            if self.owes_evaluation:
                self._evaluate(start, state)
            for step in range(start + 1, total + 1):
                batch = next(self.batches)
                device_batch = loader.to_global(batch, rows)
                state, metrics = step_fn(state, program.frozen, device_batch, self.key)
                self.state = state
                self._settle()  # The step before; this one runs meanwhile.
                self.pending = (step, metrics, batch.get("index"))
                if step == start + 1:
                    self._settle()
                    self._first_step()
                stopped = self._after_step(step, state)
                self.watchdog.step(step)
                progress.update(self.bar, completed=step)
                if stopped:
                    raise interrupts.Interrupted(
                        f"Stopped at step {step} of {total}; the same command "
                        "continues from here.",
                        stop.exit_status,
                    )
        return state

    def _first_step(self) -> None:
        self.stop.listen()
        self.startup.stepped()
        if not self.progress.console.is_terminal:
            self.progress.console.print(self.startup.describe(), soft_wrap=True)
        self.meter.restart_clock()  # Leaves out the compilation.

    def _after_step(self, step: int, state: Any) -> bool:
        """Logs, evaluates and saves what is due; returns whether to stop."""
        self.checkpoints.check()
        if self._due(step, "log"):
            self._settle()
            self._write(step)
        stopping = self.stop.agreed(step)
        if self._due(step, "evaluate") and self.program.evaluate is not None:
            self._settle()
            self.owes_evaluation = True
            if not stopping:
                self._evaluate(step, state)
                # Read once after the last wait: whoever stops has saved.
                stopping = bool(self.stop.requested) and jax.process_count() == 1
        # Last, so that a run killed before this repeats what it did not save.
        if self._due(step, "checkpoint") or stopping:
            self._settle()
            with self.watchdog.longer("the checkpoint"):
                self.log.sync()
                self.checkpoints.save(step, state, self._position())
        return stopping

    def _evaluate(self, step: int, state: Any) -> None:
        """Evaluates, unless a termination comes; then it is for the next process."""
        try:
            with self.watchdog.longer("the evaluation"), self.stop.abandoning():
                scores = self.program.evaluate(state, self.program.frozen, self.workdir)
        except interrupts.Abandoned:
            return
        self.owes_evaluation = False
        self.log.write(step, scores)
        with self.watchdog.longer("the best checkpoint"):
            self.best.offer(step, state, scores, self._position())
        self.meter.restart_clock()

    def _due(self, step: int, name: str) -> bool:
        every = self.config.every[name]
        return every > 0 and (
            step % every == 0 or step == self.program.design.num_steps
        )

    def _settle(self) -> None:
        """Waits for the pending step and stops the run if it is not finite."""
        if self.pending is None:
            return
        step, metrics, index = self.pending
        norms = metrics.pop(divergence.NORMS, None)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.recorder.add(step, index, values)
        try:
            logs.check_finite(step, values, self.max_skips)
        except FloatingPointError as error:
            raise self._diverged(error, norms) from None
        self.meter.add(values)
        self.pending = None

    def _diverged(self, error: FloatingPointError, norms: Any) -> FloatingPointError:
        self.checkpoints.wait()
        path = self.recorder.write(
            self.workdir,
            str(error),
            norms=norms,
            params=getattr(self.state, "params", None),
            checkpoint=self.checkpoints.latest_step(),
        )
        return FloatingPointError(f"{error} What is known of it: {path}")

    def _write(self, step: int) -> None:
        scalars = self.meter.summary() | self.startup.take()
        self.log.write(step, scalars)
        loss = scalars.get("loss")
        note = "" if loss is None else f"loss {loss:.4f}"
        self.progress.update(self.bar, note=note)
        if not self.progress.console.is_terminal:
            # A log file shows no bar: one line per interval instead.
            speed = scalars.get("images_per_second", 0.0)
            left = self.progress.tasks[self.bar].time_remaining or 0.0
            self.progress.console.print(
                f"{self.title} {step}/{self.program.design.num_steps} {note} "
                f"{speed:.0f} images/s, {left:.0f} s left"
            )


def _block(config: ConfigDict, block: str, key: str, default: Any) -> Any:
    """Returns a value that only some configs have."""
    return (config.get(block) or {}).get(key, default)
