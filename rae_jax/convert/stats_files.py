"""Latent statistics: the official `stat.pt` and our `latent_stats.npz`.

The official file holds (c, h, w), ours (h, w, c). An official mean of None stands for
zero; ours has zeros then and the entry `mean_is_none`, so that the way back is exact.
"""

import os
from typing import NamedTuple

import numpy as np

from rae_jax import storage
from rae_jax.convert import sources, torch_files

OFFICIAL_NAME = "stat.pt"
OWN_NAME = "latent_stats.npz"
_MEAN_IS_NONE = "mean_is_none"


class LatentStats(NamedTuple):
    """Moments of latents (h, w, c) float32; a mean of None counts as zero."""

    mean: np.ndarray | None
    var: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns `mean` and `var`, as the trainers use them."""
        mean = np.zeros_like(self.var) if self.mean is None else self.mean
        return {"mean": mean, "var": self.var}


def read_stats(path: str | os.PathLike) -> LatentStats:
    """Reads a file in either layout, or a folder that holds one.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is of another kind.
    """
    path = storage.path(path)
    if path.is_dir():
        names = [n for n in (OWN_NAME, OFFICIAL_NAME) if (path / n).is_file()]
        if not names:
            raise FileNotFoundError(f"{path} holds no {OWN_NAME} or {OFFICIAL_NAME}.")
        path = path / names[0]
    source = sources.open_tensors(path)
    known = {"mean", "var", _MEAN_IS_NONE}
    unexpected = [name for name in source.shapes if name not in known]
    if "var" not in source.shapes or unexpected:
        raise ValueError(
            f"{path} is no file of latent statistics: it holds "
            f"{', '.join(source.shapes) or 'no tensor'} instead of mean and var."
        )
    is_own = _MEAN_IS_NONE in source.shapes or path.suffix == ".npz"
    has_mean = "mean" in source.shapes
    if _MEAN_IS_NONE in source.shapes:
        has_mean = not source.read(_MEAN_IS_NONE)
    mean = _channels_last(source, "mean", is_own) if has_mean else None
    var = _channels_last(source, "var", is_own)
    if mean is not None and mean.shape != var.shape:
        raise ValueError(f"{path}: mean is {mean.shape} and var {var.shape}.")
    return LatentStats(mean, var)


def write_stats(path: str | os.PathLike, stats: LatentStats) -> None:
    """Writes a file, in our layout if it ends in .npz, else in the official one."""
    path = storage.path(path)
    if path.suffix == ".npz":
        flag = {_MEAN_IS_NONE: np.bool_(True)} if stats.mean is None else {}
        with storage.writing(path) as file:
            np.savez(file, **stats.arrays(), **flag)
        return
    arrays = {k: v for k, v in stats._asdict().items() if v is not None}
    arrays = {
        name: np.ascontiguousarray(np.moveaxis(array, -1, 0), np.float32)
        for name, array in arrays.items()
    }
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    values = {"mean": None} if stats.mean is None else {}
    with storage.writing(path) as file:
        torch_files.write_pt(file, arrays.items(), specs, values)


def _channels_last(source: sources.TensorSource, name: str, is_own: bool) -> np.ndarray:
    array = source.read(name).astype(np.float32)
    if array.ndim != 3 or not np.isfinite(array).all():
        raise ValueError(
            f"{source.origin}: {name} of shape {array.shape} is not a finite array "
            "with three axes."
        )
    return array if is_own else np.ascontiguousarray(np.moveaxis(array, 0, -1))
