"""What a resumed run may change: its config is compared with the stored one."""

from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.training import checkpoints, logs

# Keys or blocks that do not make it another run.
MAY_CHANGE = ("num_steps", "every", "keep", "mesh", "fsdp", "data.num_workers")
MAY_CHANGE += ("model.remat",)
MAY_CHANGE += ("guard.max_skips", "evaluation", "sampling", "watchdog", "row", "tier")


def check(
    workdir: Path, config: ConfigDict, allowed: Sequence[str] = ()
) -> dict[str, str]:
    """Checks that a resumed run has the config that it was started with.

    A key that the stored config lacks is one that a newer version has added: its
    value is taken from the new config, whose defaults mean what was done before.
    A run that ended before its first checkpoint has nothing to resume: any config may
    take its place.

    Args:
        workdir: Folder of the run.
        config: The run's config.
        allowed: Keys, or blocks of them, that may change beside `MAY_CHANGE`.

    Returns:
        What has changed and may, as lines by key.

    Raises:
        ConfigError: Lists what changed otherwise, or names an unknown key.
    """
    known = configs.flatten(config)
    for key in allowed:
        if not any(_within(name, key) for name in known):
            raise configs.ConfigError(configs.suggest(key, list(known), "config key"))
    path = storage.path(workdir) / checkpoints.CONFIG_NAME
    if not path.is_file() or checkpoints.finished_step(workdir) is None:
        return {}
    old = configs.read_config(path)
    stored = configs.flatten(old)
    changes = configs.changes(old, config)
    may = (*MAY_CHANGE, *allowed)
    refused = [
        key
        for key in changes
        if key in stored and not any(_within(key, name) for name in may)
    ]
    if refused:
        lines = "\n  ".join(changes[key] for key in refused)
        raise configs.ConfigError(
            f"{workdir} holds a run with another config:\n  {lines}\n"
            "Undo the change, start in another --workdir, or go on with it: "
            f"--allow-change {' '.join(refused)}"
        )
    return changes


def store(workdir: Path, config: ConfigDict, allowed: Sequence[str] = ()) -> None:
    """Stores the config of a run, after `check`, and reports what has changed."""
    changes = check(workdir, config, allowed)
    if changes:
        lines = "\n  ".join(changes.values())
        logs.note(f"The run goes on with a changed config:\n  {lines}")
    if jax.process_index() == 0:
        configs.save_config(config, storage.path(workdir) / checkpoints.CONFIG_NAME)


def same(stored: ConfigDict, config: ConfigDict) -> bool:
    """Returns whether a finished run has this config, but for keys added since."""
    known = configs.flatten(stored)
    return not any(key in known for key in configs.changes(stored, config))


def _within(key: str, block: str) -> bool:
    return key == block or key.startswith(f"{block}.")
