"""What is kept of the last steps, for the day when a loss is no longer a number."""

import collections
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import storage
from rae_jax.training import distributed

NORMS = "grad_norms"  # A metric that is not a scalar: see `group_norms`.
_STACK = "blocks"


def group_norms(tree: Any) -> jax.Array:
    """Returns the norm of every block and of every other part of parameters, (n,)."""
    sums = _sums(tree)
    return jnp.sqrt(jnp.concatenate([jnp.atleast_1d(sums[name]) for name in sums]))


def group_names(tree: Any) -> list[str]:
    """Returns what the entries of `group_norms` belong to, from shapes alone."""
    names = []
    for name, total in jax.eval_shape(_sums, tree).items():
        depth = total.shape[0] if total.ndim else 0
        names += [f"{name}[{i}]" for i in range(depth)] or [name]
    return names


def _sums(tree: Any) -> dict[str, jax.Array]:
    sums: dict[str, jax.Array] = {}
    for path, x in jax.tree.leaves_with_path(tree):
        keys = [str(getattr(key, "key", key)) for key in path]
        after = keys[keys.index(_STACK) + 1 :] if _STACK in keys else []
        stacked = bool(after) and not after[0].isdigit()  # A list is no stack.
        name = "/".join(keys[: keys.index(_STACK) + 1] if stacked else keys[:1])
        axes = tuple(range(1 if stacked else 0, x.ndim))
        total = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes)
        sums[name] = sums[name] + total if name in sums else total
    return dict(sorted(sums.items()))


class Recorder:
    """Keeps the batches and scalars of the last steps.

    Args:
        params: Shapes of the parameters; None where there are none.
        length: Number of steps.
    """

    def __init__(self, params: Any, length: int):
        self._names = [] if params is None else group_names(params)
        self._steps: collections.deque[dict[str, Any]] = collections.deque(
            maxlen=length
        )

    def add(self, step: int, index: Any, values: dict[str, float]) -> None:
        """Keeps the images (positions in the source) and the scalars of a step."""
        found = [] if index is None else np.asarray(index).tolist()
        self._steps.append({"step": step, "index": found, "metrics": values})

    def write(
        self,
        workdir: Path,
        message: str,
        *,
        norms: Any,
        params: Any,
        checkpoint: int | None,
    ) -> Path:
        """Writes all that is known.

        Args:
            workdir: Folder of the run.
            message: What has happened.
            norms: Gradient norms of the step, see `group_norms`; or None.
            params: Parameters after the step, or None.
            checkpoint: Step of the last good checkpoint.

        Returns:
            The file: `divergence.json`, with a number where there are several
            processes, since each knows its own rows of the batches.
        """
        content: dict[str, Any] = {
            "message": message,
            "last_good_checkpoint": checkpoint,
            "steps": list(self._steps),
        }
        if norms is not None:
            content["grad_norms"] = self._named(norms)
        if params is not None:
            content["param_norms"] = self._named(jax.jit(group_norms)(params))
        number = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = storage.path(workdir) / f"divergence{number}.json"
        text = json.dumps(_readable(content), indent=2, allow_nan=False)
        storage.write_atomically(path, text.encode())
        return path

    def _named(self, norms: Any) -> dict[str, float]:
        values = distributed.to_host(norms).tolist()
        return dict(zip(self._names, values, strict=True))


def _readable(x: Any) -> Any:
    """Names what JSON has no number for."""
    if isinstance(x, dict):
        return {k: _readable(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_readable(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
