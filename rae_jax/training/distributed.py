"""Several processes as one run: how they find each other, wait and hand over arrays.

Process 0 prints, logs and writes; all of them read, compute and save checkpoints.
"""

import io
import itertools
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

SWITCH = "RAE_DISTRIBUTED"
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
SIZES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TIMEOUT = "RAE_BARRIER_SECONDS"
DEFAULT_TIMEOUT = 600
# Tasks of a launcher, as its variables count them.
LAUNCHERS = {"Slurm": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
_HOSTS = "rae_jax/hosts/"
_barriers = itertools.count()


class MissingProcess(ValueError):
    """Not all processes of a run came where they wait for each other."""


def is_main() -> bool:
    """Returns whether this process prints, logs and writes."""
    return jax.process_index() == 0


def wanted(environment: Mapping[str, str] = os.environ) -> str:
    """Returns what says that this process is one of several, or "".

    That is RAE_DISTRIBUTED=1 (0 forbids it), a coordinator's address in
    JAX_COORDINATOR_ADDRESS, or a launcher with several tasks: Slurm's srun, Open MPI's
    mpirun, or a TPU pod that names its hosts.
    """
    asked = environment.get(SWITCH, "").strip().lower()
    if asked in ("0", "false", "no"):
        return ""
    if asked:
        return SWITCH
    if environment.get(COORDINATOR):
        return COORDINATOR
    for name, variable in LAUNCHERS.items():
        if environment.get(variable, "1") not in ("", "0", "1"):
            return name
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return "TPU_WORKER_HOSTNAMES" if "," in hosts else ""


def initialize() -> None:
    """Joins the processes of a run, if `wanted`, before JAX is used.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say who is who; without them JAX asks the TPU pod, Slurm or Open MPI.
    All processes but the first are silent afterwards, apart from errors.

    Raises:
        ValueError: The variables are incomplete, or there is nothing to ask.
        MissingProcess: Some process has not come within RAE_BARRIER_SECONDS.
    """
    reason = wanted()
    if not reason or jax.distributed.is_initialized():
        return
    arguments = _explicit() if os.environ.get(COORDINATOR) else {}
    seconds = timeout()
    try:
        jax.distributed.initialize(initialization_timeout=seconds, **arguments)
    except ValueError as error:
        raise ValueError(
            f"{reason} says that this is one of several processes, but JAX cannot tell "
            f"which ({error}). Set {COORDINATOR}=HOST:PORT, {SIZES[0]} and {SIZES[1]}, "
            f"or {SWITCH}=0 for a process of its own."
        ) from error
    except RuntimeError as error:
        raise MissingProcess(
            f"The processes of the run did not meet within {seconds} s "
            f"({_first_line(error)}). All of them have to be started, and to reach "
            f"process 0 at {arguments.get('coordinator_address', 'its address')}."
        ) from error
    if jax.process_count() > 1:
        _client().key_value_set(_HOSTS + str(jax.process_index()), socket.gethostname())
    if not is_main():
        sys.stdout = io.StringIO()


def _explicit() -> dict[str, Any]:
    values = [os.environ.get(name, "") for name in SIZES]
    if not any(values):
        # Slurm or Open MPI count, as far as they are there.
        return {"coordinator_address": os.environ[COORDINATOR]}
    for name, value in zip(SIZES, values, strict=True):
        if not value.isdigit():
            raise ValueError(f"{name} must be a number beside {COORDINATOR}: {value!r}")
    count, index = map(int, values)
    if index >= count:
        raise ValueError(f"{SIZES[1]} = {index} must be below {SIZES[0]} = {count}.")
    return {
        "coordinator_address": os.environ[COORDINATOR],
        "num_processes": count,
        "process_id": index,
    }


def timeout() -> int:
    """Returns how many seconds processes wait for each other."""
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    if not text.isdigit() or not int(text):
        raise ValueError(f"{TIMEOUT} must be a number of seconds, got {text!r}.")
    return int(text)


def barrier(name: str, seconds: int | None = None) -> None:
    """Waits until all processes are here; all have to come by the same barriers.

    Args:
        name: What they wait for, for the message.
        seconds: How long; RAE_BARRIER_SECONDS, or 600, if None.

    Raises:
        MissingProcess: Names those that have not come.
    """
    if jax.process_count() == 1:
        return
    seconds = timeout() if seconds is None else seconds
    client, place = _client(), f"rae_jax/barrier/{next(_barriers)}"
    client.key_value_set(f"{place}/{jax.process_index()}", name)
    try:
        client.wait_at_barrier(place, seconds * 1000)
    except RuntimeError as error:
        came = {key.rpartition("/")[2] for key, _ in client.key_value_dir_get(place)}
        missing = [i for i in range(jax.process_count()) if str(i) not in came]
        hosts = {
            key.rpartition("/")[2]: host
            for key, host in client.key_value_dir_get(_HOSTS)
        }
        named = ", ".join(f"{i} ({hosts.get(str(i), 'unknown host')})" for i in missing)
        raise MissingProcess(
            f"Of {jax.process_count()} processes, {named or 'one'} did not come to "
            f"{name!r} within {seconds} s: it has stopped or hangs; see its output. "
            f"{TIMEOUT} sets the time ({_first_line(error)})."
        ) from error


def _client() -> Any:
    """Returns the client of JAX's coordination service.

    JAX itself offers no barrier with a time-out and no word on who is missing.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def from_main(array: np.ndarray) -> np.ndarray:
    """Returns what process 0 holds; the others give an array of its shape and type."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def to_host(tree: Any) -> Any:
    """Copies arrays to the host, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def copy(x):
        if isinstance(x, jax.Array) and not (
            x.is_fully_addressable or x.is_fully_replicated
        ):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(copy, tree)
