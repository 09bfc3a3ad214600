"""Where a run's files are, and those that its config names."""

from pathlib import Path

from rae_jax import config as configs
from rae_jax import storage

TOKENIZER_NAME = "tokenizer.npz"  # Components of a patch PCA.
TOKENIZER_FOLDER = "tokenizer"  # All others.


def folders(workdir: Path) -> list[Path]:
    """Returns the folders where a run's files may lie.

    The best state of a run, a workdir within its own, has the files of the run.
    """
    workdir = storage.path(workdir)
    return [workdir, workdir.parent] if workdir.name == configs.BEST else [workdir]


def resolve(path: str, workdir: Path) -> Path:
    """Finds a file or folder that a config names.

    A relative path counts from the run's workdir, so that runs that lie side by side
    can be moved together; failing that, from the current folder. The best state of a
    run, a workdir within its own, has the paths of the run.
    """
    places = [storage.join(folder, path) for folder in folders(workdir)]
    return next((place for place in places if place.exists()), storage.path(path))
