"""Features of the FID Inception, from the files of its PyTorch ports.

The weights are the TensorFlow graph's of 2015; no package index has them.
"""

from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rae_jax import storage
from rae_jax.convert import critic_names, sources, tables
from rae_jax.evaluation import extractors
from rae_jax.models import inception

NAME = "inception"
URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
)
WHERE = (
    "FID, sFID, Inception Score, precision and recall need the weights of the FID "
    "Inception network (95 MB). Fetch either of these files, which hold the same "
    "network, and give it by --inception FILE:\n  " + "\n  ".join(URLS)
)
HOW_TO_GET = WHERE + (
    "\nWithout them, --efflite0 measures fd_efflite0: the same distance in the "
    "features of a network that a Python package carries. It is not comparable with "
    "FID."
)


def load(path: Path) -> dict[str, Any]:
    """Reads the parameters of `inception.InceptionV3` from a weight file.

    Args:
        path: The file of torch-fidelity or of pytorch-fid, or the same tensors as
            safetensors or .npz.

    Raises:
        FileNotFoundError: There is no such file; says what to fetch.
        ValueError: The file is damaged or holds another network.
    """
    path = storage.path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. {HOW_TO_GET}")
    model = nnx.eval_shape(lambda: inception.InceptionV3(rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes = {".".join(map(str, name)): value.shape for name, value in flat}
    source, table = sources.open_tensors(path), critic_names.inception_table()
    tables.check(table, source, shapes)
    found: dict[tuple[str, ...], np.ndarray] = {}
    for name, array in tables.to_ours(table, source, shapes):
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: the values for {name} are not all finite.")
        found[tuple(name.split("."))] = array
    return flax.traverse_util.unflatten_dict(found)


def make_extractor(
    path: Path, *, batch_size: int = 64, mesh: Mesh | None = None
) -> extractors.Extractor:
    """Returns features "pool" (b, 2048), "spatial" (b, 2023) and "logits" (b, 1008).

    Logits are without the bias, on which Inception Scores are defined.
    """
    params = load(path)
    model = nnx.eval_shape(lambda: inception.InceptionV3(rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)

    def features(params, images):
        model = nnx.merge(graphdef, params)
        found = model(images)
        return {
            extractors.POOL: found.pool,
            extractors.SPATIAL: found.spatial,
            extractors.LOGITS: model.logits(found.pool),
        }

    return extractors.Extractor(
        NAME, features, params, batch_size=batch_size, mesh=mesh
    )
