"""Encoders that runs of MAE and MoCo v3 have trained, as those of their families."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.convert import encoder_names
from rae_jax.models import mae, mocov3, pretrained
from rae_jax.training import checkpoints, state

FAMILIES = {"mae": mae.FAMILY, "mocov3": mocov3.FAMILY}  # By trainer.


def is_run(path: Path) -> bool:
    """Returns whether a folder is the workdir of a run that trains such an encoder."""
    return pretrained.read_config(path).get("trainer") in FAMILIES


def arguments(run: ConfigDict) -> dict[str, Any]:
    """Returns the constructor's arguments of the encoder that a run trains."""
    sizes = {name: run.model[name] for name in encoder_names.SIZES}
    name, image_size = FAMILIES[run.trainer], run.data.image_size
    return {"name": name, "image_size": image_size, "table_size": image_size} | sizes


def load(
    workdir: Path, name: str, sizes: ConfigDict, ema: bool = False
) -> state.Params:
    """Reads the encoder of a run for `config.encoder`.

    Args:
        workdir: Of the run.
        name: Family that the config asks for.
        sizes: Constructor arguments that it asks for.
        ema: Whether the average of the parameters is read: for MoCo v3 the momentum
            encoder. Published files have what was trained itself.

    Raises:
        ConfigError: The run is of another family or has other sizes.
        CheckpointError: The run has no checkpoint.
    """
    path = storage.path(workdir) / checkpoints.CONFIG_NAME
    stored = arguments(configs.read_config(path))
    wrong = encoder_names.differences({"name": name} | sizes.to_dict(), stored)
    if wrong:
        raise configs.ConfigError(
            f"config.encoder does not fit the run in {workdir}: {'; '.join(wrong)}."
        )
    part = "ema_params" if ema else "params"
    params = checkpoints.load_params(workdir, (part, "encoder"))
    if sizes.get("normalize", True):  # Then the last norm has no parameters.
        params = {key: value for key, value in params.items() if key != "norm"}
    return params
