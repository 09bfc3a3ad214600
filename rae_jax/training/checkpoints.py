"""Checkpoints of {state, data position}, and parameters for those who come after.

A workdir holds `config.json` and `checkpoints/STEP/`. Orbax writes a step under a
temporary name and renames it when it is complete, so a killed run leaves either
the old newest step or the new one.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from rae_jax import config as configs

CONFIG_NAME = "config.json"
FOLDER = "checkpoints"

logging.getLogger("absl").setLevel(logging.ERROR)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or does not fit, and what to do."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        workdir: Folder of the run.
        keep: Number of newest checkpoints to keep.
    """

    def __init__(self, workdir: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(folder(workdir), options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_state: dict[str, Any]) -> None:
        """Starts to write a checkpoint; training may go on meanwhile."""
        if step == self.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint into the shapes and shardings of `abstract`.

        Raises:
            CheckpointError: If the checkpoint holds another model or is damaged.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            raise _unreadable(self._manager.directory / str(step), error) from error
        return restored.state, restored.data

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def folder(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints."""
    return Path(workdir).absolute() / FOLDER


def finished_step(workdir: Path) -> int | None:
    """Returns the newest checkpointed step of a workdir, or None."""
    if not folder(workdir).is_dir():
        return None
    with ocp.CheckpointManager(folder(workdir)) as manager:
        return manager.latest_step()


def load_params(workdir: Path, path: tuple[str, ...] = ("ema_params",)) -> Any:
    """Reads one part of the newest checkpoint as a plain dict of NumPy arrays.

    Args:
        workdir: Folder of a run.
        path: Where the part lies in the state, such as ("params",).

    Raises:
        CheckpointError: If there is no checkpoint or no such part, or it is damaged.
    """
    step = finished_step(workdir)
    if step is None:
        raise CheckpointError(
            f"{str(workdir)!r} holds no checkpoint. Train it first: "
            f"rae-jax train --config ... --workdir {workdir}"
        )
    try:
        part = _read_part(workdir, step, path)
    except CheckpointError:
        raise
    except Exception as error:
        raise _unreadable(folder(workdir) / str(step), error) from error
    for name in path:
        part = part[name]
    return part


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().partition("\n")[0][:300]
    return CheckpointError(
        f"The checkpoint {str(path)!r} cannot be read: {reason}\n"
        "If it is damaged, delete this folder, and the run goes on from the checkpoint "
        "before it. If it holds another model, use the config that it was made with."
    )


def _read_part(workdir: Path, step: int, path: tuple[str, ...]) -> Any:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = ocp.PyTreeCheckpointHandler()
    registry.add("state", ocp.args.PyTreeRestore, handler)
    with ocp.CheckpointManager(folder(workdir), handler_registry=registry) as manager:
        tree = manager.item_metadata(step).state.tree
        target = _abstract_part(tree, path, workdir)
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target
        )
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=restore_args, partial_restore=True
        )
        return manager.restore(step, args=ocp.args.Composite(state=args)).state


def _abstract_part(tree: Any, path: tuple[str, ...], workdir: Path) -> Any:
    for name in path:
        if name not in tree:
            raise CheckpointError(
                f"The checkpoint in {str(workdir)!r} has no part {name!r}; "
                f"it has {', '.join(tree)}."
            )
        tree = tree[name]

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    part = jax.tree.map(abstract, tree, is_leaf=lambda x: hasattr(x, "shape"))
    for name in reversed(path):
        part = {name: part}
    return part


def check_config(workdir: Path, config: ConfigDict, may_change: set[str]) -> None:
    """Checks that a resumed run has the config that it was started with.

    A run that ended before its first checkpoint has nothing to resume: any config
    may take its place.

    Args:
        workdir: Folder of the run.
        config: The run's config.
        may_change: Keys, or beginnings of keys, that a resumed run may change.

    Raises:
        ConfigError: Lists what changed otherwise.
    """
    path = Path(workdir) / CONFIG_NAME
    if path.is_file() and finished_step(workdir) is not None:
        changes = configs.differences(configs.read_config(path), config)
        refused = [c for c in changes if not c.startswith(tuple(may_change))]
        if refused:
            lines = "\n  ".join(refused)
            raise configs.ConfigError(
                f"{workdir} holds a run with another config:\n  {lines}\n"
                "Undo the change or start in another --workdir."
            )


def store_config(workdir: Path, config: ConfigDict, may_change: set[str]) -> None:
    """Stores the config of a run, after `check_config`."""
    check_config(workdir, config, may_change)
    if jax.process_index() == 0:
        configs.save_config(config, Path(workdir) / CONFIG_NAME)
