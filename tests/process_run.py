"""One of several processes that train `toy_run` together; see `test_distributed`.

Usage: process_run.py WORKDIR, with the variables of `distributed.initialize`.
"""

import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import toy_run

from rae_jax import storage
from rae_jax.layers import partition
from rae_jax.training import distributed, loop

STEPS, MORE = 2, 4
MESH = dict(data=-1, fsdp=2, tensor=1)


class Rows(toy_run.Batches):
    """This process's rows of the batches."""

    def __next__(self):
        share = toy_run.ROWS // jax.process_count()
        start = share * jax.process_index()
        return {k: x[start : start + share] for k, x in super().__next__().items()}


def train(workdir: Path, num_steps: int) -> dict[str, np.ndarray]:
    """Trains or goes on; returns the parameters, by name."""
    config = toy_run.config(num_steps=num_steps, mesh=MESH)
    program = toy_run.program(config)
    program = program.__class__(
        **{**vars(program), "batches": Rows}  # Every process has its own.
    )
    with mock.patch.object(partition, "MIN_SHARDED_SIZE", 2**4):
        state = loop.run(program, config, workdir)
    kernel = state.params["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp")
    return distributed.to_host(state.params)


def main(workdir: Path) -> None:
    """Trains, goes on from the checkpoint, and lets process 1 miss a meeting."""
    distributed.initialize()
    train(workdir, STEPS)
    params = train(workdir, MORE)
    print("only from process 0")
    if distributed.is_main():
        with storage.writing(workdir / "params.npz") as file:
            np.savez(file, **params)
        try:
            distributed.barrier("the meeting", 1)
        except distributed.MissingProcess as error:
            (workdir / "missing").write_text(str(error))
    else:
        next(distributed._barriers)
    distributed.barrier("the end")


if __name__ == "__main__":
    main(storage.path(sys.argv[1]))
