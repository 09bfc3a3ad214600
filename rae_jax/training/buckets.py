"""What Orbax must be told to keep checkpoints in buckets.

It knows gs:// by itself: arrays go through tensorstore's driver, and since folders
cannot be renamed there, a last file says that a checkpoint is complete. For s3://
version 0.12 has only the driver, so the places where it tells the two apart are
extended here; a version that knows s3:// is left alone.
"""

import functools
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from rae_jax import storage

_S3 = "s3://"
_COMMITTED = "commit_success.txt"


def temporary_path_class(workdir: str | os.PathLike[str]) -> type | None:
    """Returns how a checkpoint becomes complete; None for Orbax's choice."""
    is_bucket = storage.is_bucket(workdir)
    return ocp.path.atomicity.CommitFileTemporaryPath if is_bucket else None


def is_committed(folder: Path) -> bool:
    """Returns whether the folder of a checkpoint is complete."""
    return not storage.is_bucket(folder) or (folder / _COMMITTED).exists()


def prepare(workdir: Path) -> None:
    """Makes Orbax able to read and write checkpoints in a workdir.

    Raises:
        ValueError: The installed version cannot be taught s3://.
    """
    if os.fspath(workdir).startswith(_S3):
        _teach_s3()


@functools.cache
def _teach_s3() -> None:
    if _knows_s3():
        return
    try:
        uses_driver = tensorstore_utils._use_gcs_driver
        normalize = tensorstore_utils._normalize_path
        key_value_store = gcs_utils.get_kvstore_for_gcs
    except AttributeError:
        uses_driver = None
    if uses_driver is not None:
        tensorstore_utils._use_gcs_driver = lambda path: (
            path.startswith(_S3) or uses_driver(path)
        )
        tensorstore_utils._normalize_path = lambda path: (
            path.rstrip("/") if path.startswith(_S3) else normalize(path)
        )
        gcs_utils.get_kvstore_for_gcs = lambda path: (
            s3_store(path) if path.startswith(_S3) else key_value_store(path)
        )
    if not _knows_s3():
        raise ValueError(
            f"orbax-checkpoint {ocp.__version__} does not write to s3:// and cannot be "
            "taught to: install orbax-checkpoint==0.12.8, or mount the bucket and give "
            "a path in the mounted folder."
        )


def _knows_s3() -> bool:
    try:
        spec = tensorstore_utils.build_kvstore_tspec(f"{_S3}bucket/x", use_ocdbt=True)
    except (ValueError, AttributeError, TypeError):
        return False
    base = spec.get("base")
    return isinstance(base, dict) and base.get("driver") == "s3"


def s3_store(address: str) -> dict[str, Any]:
    """Returns what tensorstore calls an s3:// address.

    `AWS_ENDPOINT_URL`, for stores of other makers, and `AWS_REGION` count as for the
    tools of Amazon; tensorstore itself does not read the first.
    """
    bucket, _, key = address.removeprefix(_S3).partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Else it complains of every profile that it does not find.
        spec["aws_credentials"] = {"type": "environment"}
    if endpoint:
        # Without a region tensorstore would look for the bucket at Amazon.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    return spec
