"""Eight simulated devices, full float32 products, and no silent broadcasting."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folder of a trained chain of runs, see `chain`; tests at most evaluate it."""
    import chain

    return chain.train(tmp_path_factory.mktemp("chain"))
