"""Choices of mesh, rematerialisation and batch for a target, the fastest first."""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from rae_jax.layers import stack
from rae_jax.planning import targets

MESHES = 4  # Sizes of `fsdp` that are tried.
Report = dict[str, Any]
Plan = Callable[[ConfigDict], Report]


def search(
    config: ConfigDict, target: targets.Target, plan: Plan
) -> Iterator[tuple[ConfigDict, Report]]:
    """Yields choices with their plans, as they become known.

    One thing at a time, each with the best of those before: the mesh, then the
    rematerialisation, then half and twice the batch. A choice that cannot be laid out
    is passed over, unless it is the config's own.

    Args:
        config: Where the search starts.
        target: The machine.
        plan: Plans a config.
    """
    best, report = config, plan(config)
    yield best, report
    for kind in (_meshes, _remats, _batches):
        for changed in kind(best, target):
            try:
                found = plan(changed)
            except ValueError:
                continue
            yield changed, found
            if rank(found) < rank(report):
                best, report = changed, found


def rank(report: Report) -> tuple[bool, float]:
    """Sorts what fits first, then by images per second."""
    return not report["fits"], -(report["images_per_second"] or 0.0)


def _changed(config: ConfigDict, **changes: Any) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update(changes)
    return config


def _meshes(config: ConfigDict, target: targets.Target) -> Iterator[ConfigDict]:
    """Yields other sizes of `fsdp`: none, and those that keep gathers close by."""
    inside = target.devices // target.slices
    sizes = [n for n in (1, 4, 8, 16, 32, 64, 128, 256) if inside % n == 0]
    now = dict(config.mesh)
    for size in sizes[: MESHES + 1]:
        mesh = now | {"data": -1, "fsdp": size}
        if size != now.get("fsdp", 1):
            yield _changed(config, mesh=mesh)


def _remats(config: ConfigDict, target: targets.Target) -> Iterator[ConfigDict]:
    if "model" not in config or "remat" not in config.model:
        return
    for remat in (*stack.REMAT_POLICIES, "none"):
        if remat != config.model.remat:
            yield _changed(config, model={"remat": remat})


def _batches(config: ConfigDict, target: targets.Target) -> Iterator[ConfigDict]:
    for size in (2 * config.data.batch_size, config.data.batch_size // 2):
        if size:
            yield _changed(config, data={"batch_size": size})
