"""The only training loop: resume, step, log, evaluate, save."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.data import loader
from rae_jax.training import (
    checkpoints,
    flops,
    interrupts,
    logs,
    programs,
    sharding,
)

# What a resumed run may change without becoming another run.
MAY_CHANGE = {"num_steps", "every", "keep", "mesh", "fsdp", "data.num_workers"}
MAY_CHANGE |= {"guard.max_skips", "evaluation", "sampling"}


def run(
    program: programs.Program,
    config: ConfigDict,
    workdir: Path,
    *,
    title: str = "train",
) -> Any:
    """Trains to the last step, from the newest checkpoint if there is one.

    Args:
        program: The run.
        config: Needs seed, keep, fsdp, mesh and every.{log, checkpoint, evaluate}.
        workdir: Folder for config, checkpoints, logs and results.
        title: Label of the progress bar.

    Returns:
        The final state.

    Raises:
        FloatingPointError: If a loss or gradient is not finite.
        Interrupted: After a SIGINT or SIGTERM and a last checkpoint.
    """
    workdir = Path(workdir)
    checkpoints.check_config(workdir, config, MAY_CHANGE)
    mesh = sharding.make_mesh(config.mesh.data)
    with jax.set_mesh(mesh):
        return _Run(program, config, workdir, mesh, title).train()


def abstract_state(design: programs.Design, config: ConfigDict, mesh: Mesh) -> Any:
    """Returns shapes and shardings of a run's state."""
    shapes = jax.eval_shape(design.init, jax.random.key(config.seed))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.state_sharding(shapes, mesh, config.fsdp),
    )


class _Run:
    """One call of `run`: holds what its parts share."""

    def __init__(self, program, config, workdir, mesh, title):
        self.program, self.config, self.workdir = program, config, workdir
        self.mesh, self.title = mesh, title
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.key = jax.random.key(config.seed)
        self.max_skips = config.guard.max_skips if "guard" in config else 0
        self.abstract = abstract_state(program.design, config, mesh)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        peak = flops.peak_flops(mesh.devices.flat[0]) * mesh.size
        self.meter = logs.Meter(program.design.batch_size, program.flops_per_step, peak)

    def train(self) -> Any:
        self.batches = self.program.batches()  # If this fails, nothing is stored.
        checkpoints.store_config(self.workdir, self.config, MAY_CHANGE)
        self.checkpoints = checkpoints.Checkpoints(self.workdir, keep=self.config.keep)
        try:
            start, state = self._begin()
            self.log = logs.MetricsLog(self.workdir, start)
            try:
                state = self._steps(start, state)
            finally:
                self.log.close()
        finally:
            self.batches.close()
            self.checkpoints.close()
        if self.program.finish is not None:
            self.program.finish(state, self.program.frozen, self.workdir)
        return state

    def _begin(self) -> tuple[int, Any]:
        step = self.checkpoints.latest_step()
        if step is not None:
            state, data_state = self.checkpoints.restore(step, self.abstract)
            self.batches.set_state(data_state["batches"])
            self.meter.set_state(data_state["meter"])
            return step, state
        init = jax.jit(self.program.design.init, out_shardings=self.shardings)
        return 0, init(self.key)

    def _steps(self, start: int, state: Any) -> Any:
        program, total = self.program, self.program.design.num_steps
        step_fn = jax.jit(
            program.design.step, donate_argnums=0, out_shardings=(self.shardings, None)
        )
        rows = sharding.batch_sharding(self.mesh)
        with interrupts.StopRequest() as stop, logs.make_progress() as progress:
            self.progress = progress
            self.bar = progress.add_task(
                self.title, total=total, completed=start, note="compiling"
            )
            for step in range(start + 1, total + 1):
                batch = loader.to_global(next(self.batches), rows)
                state, metrics = step_fn(state, program.frozen, batch, self.key)
                self._settle()  # The step before; this one runs meanwhile.
                self.pending = (step, metrics)
                if step == start + 1:
                    self._settle()
                    self.meter.restart_clock()  # Leaves out the compilation.
                stopped = self._after_step(step, state, stop)
                progress.update(self.bar, completed=step)
                if stopped:
                    raise interrupts.Interrupted(
                        f"Stopped at step {step} of {total}; the same command "
                        "continues from here."
                    )
        return state

    def _after_step(self, step: int, state: Any, stop: interrupts.StopRequest) -> bool:
        """Logs, evaluates and saves what is due; returns whether to stop."""
        if self._due(step, "log"):
            self._settle()
            self._write(step)
        if self._due(step, "evaluate") and self.program.evaluate is not None:
            self._settle()
            scores = self.program.evaluate(state, self.program.frozen, self.workdir)
            self.log.write(step, scores)
            self.meter.restart_clock()
        stopping = stop.requested  # Read once: whoever stops has saved.
        # Last, so that a run killed before this repeats what it did not save.
        if self._due(step, "checkpoint") or stopping:
            self._settle()
            position = {
                "batches": self.batches.get_state(),
                "meter": self.meter.get_state(),
            }
            self.checkpoints.save(step, state, position)
        return stopping

    def _due(self, step: int, name: str) -> bool:
        every = self.config.every[name]
        return every > 0 and (
            step % every == 0 or step == self.program.design.num_steps
        )

    def _settle(self) -> None:
        """Waits for the pending step and stops the run if it is not finite."""
        if self.pending is not None:
            step, metrics = self.pending
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            logs.check_finite(step, values, self.max_skips)
            self.meter.add(values)
            self.pending = None

    def _write(self, step: int) -> None:
        scalars = self.meter.summary()
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
