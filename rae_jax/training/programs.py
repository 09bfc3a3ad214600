"""What the loop needs to know of a run."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from rae_jax.training import flops


class Batches(Protocol):
    """Host batches whose position can be stored and restored."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Design:
    """What a config computes, by shapes alone: no file is read, nothing allocated.

    Attributes:
        init: key -> state.
        step: (state, frozen, batch, key) -> (state, metrics).
        frozen: Shapes of the arrays that the step reads and never changes.
        batch: Shapes of a global batch.
        num_steps: Length of the run.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[Any, Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    num_steps: int

    @property
    def batch_size(self) -> int:
        """Rows of the global batch."""
        return next(iter(self.batch.values())).shape[0]

    def abstract_step(self) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
        """Traces init and step; returns the shapes of the state and the metrics."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(self.init, key)
        return jax.eval_shape(self.step, state, self.frozen, self.batch, key)

    def step_flops(self) -> float:
        """Counts the FLOPs of matrix products and convolutions in one step."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(self.init, key)
        return flops.count_flops(self.step, state, self.frozen, self.batch, key)


@dataclasses.dataclass(frozen=True)
class Program:
    """A design with its data and weights: all that the loop needs.

    Attributes:
        design: See `Design`.
        frozen: The arrays of `design.frozen`, on the devices of the mesh.
        batches: Makes the iterator of host batches.
        flops_per_step: Model FLOPs of one step, without recomputation.
        evaluate: (state, frozen, workdir) -> scalars to log, or None.
        finish: (state, frozen, workdir) -> None; writes results after the last step.
        begin: New state -> the state of the first step, such as with weights from
            files; not called when a run goes on.
    """

    design: Design
    frozen: Any
    batches: Callable[[], Batches]
    flops_per_step: float = 0.0
    evaluate: Callable[[Any, Any, Path], dict[str, float]] | None = None
    finish: Callable[[Any, Any, Path], None] | None = None
    begin: Callable[[Any], Any] | None = None
