"""Checkpoints of {state, data position}, and parameters for those who come after.

A workdir holds `config.json` and `checkpoints/STEP/`. Orbax writes a step under a
temporary name and renames it when it is complete, or in a bucket says so by a last
file, so a killed run leaves either the old newest step or the new one. Checksums of all
arrays lie beside them; a checkpoint that does not agree with its own is passed over.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rae_jax import storage
from rae_jax.training import buckets, distributed, integrity, logs

CONFIG_NAME = "config.json"
FOLDER = "checkpoints"
DAMAGED = "damaged"

logging.getLogger("absl").setLevel(logging.ERROR)
# What fails is reported once, by us, not again for each of its parts.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or does not fit, and what to do."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        workdir: Folder of the run.
        keep: Number of newest checkpoints to keep; None for one who only reads.
    """

    def __init__(self, workdir: Path, *, keep: int | None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=keep is not None,
            read_only=keep is None,
            temporary_path_class=buckets.temporary_path_class(workdir),
        )
        self._reads_only, self._failed = keep is None, False
        self._folder = folder(workdir)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts to write a checkpoint; training may go on meanwhile.

        Raises:
            CheckpointError: This one, or the one before, cannot be written.
        """
        if step == self.latest_step():
            return
        content = {"position": position, "arrays": integrity.of_arrays(state)}
        data = content | {"checksum": integrity.of_json(content)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
        )
        self._writing(lambda: self._manager.save(step, args=args, force=True))

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of later steps."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def check(self) -> None:
        """Raises a CheckpointError if what was started to be written has failed."""
        self._writing(self._manager.check_for_errors)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            CheckpointError: It cannot be written.
        """
        self._writing(self._manager.wait_until_finished)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint into the shapes and shardings of `abstract`.

        Returns:
            The state, and the position that it was saved with.

        Raises:
            CheckpointError: If the checkpoint holds another model or is damaged.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        path = self._folder / str(step)
        try:
            found = self._manager.restore(step, args=args)
        except Exception as error:
            raise _unreadable(path, _reason(error)) from error
        data = found.data
        if "arrays" not in data:  # Of a version that kept no checksums.
            return found.state, data
        stored = {key: data[key] for key in ("position", "arrays") if key in data}
        if data.get("checksum") != integrity.of_json(stored):
            raise _unreadable(path, "its data position has changed since it was saved")
        _check_sums(path, data["arrays"], integrity.of_arrays(found.state))
        return found.state, data["position"]

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole; None if there are none at all.

        Newer ones that are not are named in a warning, and moved to `damaged/` unless
        this one only reads.

        Raises:
            CheckpointError: There are checkpoints, but none can be read.
        """

        def restore(step):
            if jax.process_count() > 1:  # Half a collective read would never end.
                _agree(self._folder / str(step), lambda: self._verify_share(step))
            return self.restore(step, abstract)

        found, failed = _newest(_steps(self._folder), restore)
        if found is None:
            return None
        if failed and not self._reads_only:
            self._set_aside(failed)
        step, (state, position) = found
        return step, state, position

    def close(self) -> None:
        """Waits until everything is written, and ends."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._failed:
                self._remove_parts()

    def _writing(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            self._failed = True
            self._remove_parts()
            left = self._manager.latest_step()
            kept = "There is no older one" if left is None else f"Step {left} is intact"
            raise CheckpointError(
                f"A checkpoint cannot be written to {str(self._folder)!r}: "
                f"{_reason(error)}\n{kept}. Make room or mend the disk; the same "
                "command goes on from there."
            ) from error

    def _remove_parts(self) -> None:
        """Gives back the space of what could not be written to its end."""
        if jax.process_index() == 0:
            for part in _unfinished(self._folder):
                storage.remove_tree(part)

    def _verify_share(self, step: int) -> None:
        """Reads the arrays that fall to this process, one at a time."""
        path = self._folder / str(step)
        try:
            stored = (
                ocp.JsonCheckpointHandler().restore(path / "data").get("arrays", {})
            )
            tree = _metadata(path)
            found = integrity.names(jax.tree.map(lambda x: 0, tree, is_leaf=_is_array))
            for i in range(jax.process_index(), len(found), jax.process_count()):
                array = _read_leaf(path, tree, i)
                if found[i] in stored:
                    _check_sums(path, stored, {found[i]: integrity.of_host(array)})
        except CheckpointError:
            raise
        except Exception as error:
            raise _unreadable(path, _reason(error)) from error

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves checkpoints out of the way, since their steps will come again."""
        if jax.process_index() == 0:
            target = self._folder.parent / DAMAGED
            for step in steps:
                storage.move_tree(self._folder / str(step), target / str(step))
        distributed.barrier("moving damaged checkpoints")
        self._manager.reload()


def folder(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints."""
    workdir = storage.absolute(workdir)
    buckets.prepare(workdir)
    return workdir / FOLDER


def finished_step(workdir: Path) -> int | None:
    """Returns the newest checkpointed step of a workdir, or None."""
    steps = _steps(folder(workdir))
    return steps[-1] if steps else None


def load_params(workdir: Path, path: tuple[str, ...] = ("ema_params",)) -> Any:
    """Reads one part of the newest whole checkpoint as a dict of NumPy arrays.

    Args:
        workdir: Folder of a run.
        path: Where the part lies in the state, such as ("params",).

    Raises:
        CheckpointError: If there is no checkpoint or no such part, or all are damaged.
    """
    steps = _steps(folder(workdir))
    if not steps:
        raise CheckpointError(
            f"{str(workdir)!r} holds no checkpoint. Train it first: "
            f"rae-jax train --config ... --workdir {workdir}"
        )
    found, _ = _newest(steps, lambda step: _load(folder(workdir) / str(step), path))
    return found[1]


def _steps(root: Path) -> list[int]:
    found = storage.names_in(root)[0] if root.is_dir() else []
    steps = sorted(int(name) for name in found if name.isdigit())
    return [step for step in steps if buckets.is_committed(root / str(step))]


def _unfinished(root: Path) -> list[Path]:
    """Returns what was begun to be written and is not complete."""
    found = [root / name for name in storage.names_in(root)[0]]
    temporary = [path for path in found if ".orbax-checkpoint-tmp" in path.name]
    return temporary + [path for path in found if not buckets.is_committed(path)]


def _newest(
    steps: Sequence[int], read: Callable[[int], Any]
) -> tuple[tuple[int, Any] | None, list[int]]:
    """Reads the last step that can be; returns it and those that cannot.

    Raises:
        CheckpointError: That of the newest, if none can be read.
    """
    failed: dict[int, CheckpointError] = {}
    for step in reversed(steps):
        try:
            found = read(step)
        except Missing:
            raise
        except CheckpointError as error:
            failed[step] = error
            continue
        for error in failed.values():
            logs.warn(f"{error}\nThe one of step {step} is used instead.")
        return (step, found), list(failed)
    if failed:
        raise failed[max(failed)]
    return None, []


def _agree(path: Path, check: Callable[[], None]) -> None:
    """Runs a check in all processes and raises in all if it fails in one."""
    failure = None
    try:
        check()
    except CheckpointError as error:
        failure = error
    failures = multihost_utils.process_allgather(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failures.any():
        where = ", ".join(map(str, np.flatnonzero(failures)))
        raise CheckpointError(
            f"The checkpoint {str(path)!r} cannot be read by process {where}."
        )


class Missing(CheckpointError):
    """A part that a checkpoint does not have, rather than damage."""


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {str(path)!r} cannot be read: {reason}\n"
        "It is damaged, or holds another model than this config's."
    )


def _reason(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) < 400 else f"{line[:200]} ... {line[-200:]}"


def _check_sums(path: Path, stored: dict[str, int], found: dict[str, int]) -> None:
    wrong = integrity.damaged(stored, found)
    if wrong:
        raise _unreadable(
            path,
            f"{len(wrong)} of {len(found)} arrays have changed since they were saved, "
            f"such as {wrong[0]}",
        )


def _load(path: Path, part: tuple[str, ...]) -> Any:
    try:
        tree = _metadata(path)
        found = _read_part(path, tree, part)
        data = ocp.JsonCheckpointHandler().restore(path / "data")
        stored = data.get("arrays", {})
    except CheckpointError:
        raise
    except Exception as error:
        raise _unreadable(path, _reason(error)) from error
    named = {k: v for k, v in _named(found).items() if k in stored}
    _check_sums(path, stored, {k: integrity.of_host(v) for k, v in named.items()})
    for key in part:
        found = found[key]
    return found


def _named(tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(integrity.names(tree), jax.tree.leaves(tree), strict=True))


def _metadata(path: Path) -> Any:
    """Returns the shapes of a checkpoint's state as a plain tree."""
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape")


def _read_part(path: Path, tree: Any, part: tuple[str, ...]) -> Any:
    """Reads one part of a state; the result is nested as the state is."""
    for key in part:
        if key not in tree:
            raise Missing(
                f"The checkpoint {str(path)!r} has no part {key!r}; "
                f"it has {', '.join(tree)}."
            )
        tree = tree[key]
    target = jax.tree.map(_abstract, tree, is_leaf=_is_array)
    for key in reversed(part):
        target = {key: target}
    return _read(path, target, partial_restore=True)


def _read_leaf(path: Path, tree: Any, index: int) -> np.ndarray:
    """Reads one array of a state, by its place among the leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_array)
    wanted = [ocp.PLACEHOLDER] * len(leaves)
    wanted[index] = _abstract(leaves[index])
    return jax.tree.leaves(_read(path, structure.unflatten(wanted)))[index]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _read(path: Path, target: Any, **options: Any) -> Any:
    restore_args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target
    )
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, **options)
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)
