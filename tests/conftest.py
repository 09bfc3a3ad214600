"""Eight simulated devices, full float32 products, and no silent broadcasting.

Most of the time goes into compiling. So the compiler takes its quick ways, LLVM
optimises only for the tests that are marked, and the processes of a session share what
they compiled. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles all as for a user;
JAX_COMPILATION_CACHE_DIR names a folder for programs that outlive the session.
"""

import contextlib
import fcntl
import functools
import gc
import os
import shutil
import tempfile

# In the environment, where pytest-xdist's workers and the programs under test look.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
OPTIMISE_LITTLE = "jax_disable_most_optimizations"
OPTIMISED_MARKERS = {"parity", "optimised"}
# A third of the compile time is left. XLA aborts over a flag that it does not know.
QUICK_FLAG = "--xla_cpu_use_fusion_emitters=false"
FLAGS = os.environ.get("XLA_FLAGS", "")
if QUICK and QUICK_FLAG not in FLAGS and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{FLAGS} {QUICK_FLAG}"


def pytest_configure(config):
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # Workers inherit it.
        folder = tempfile.mkdtemp(prefix="rae_jax_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


def pytest_collection_finish():
    """Lets tracing go on with fewer and shorter searches for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)  # Before the fixtures of the test.
def pytest_runtest_setup(item):
    little = not OPTIMISED_MARKERS & {marker.name for marker in item.iter_markers()}
    if QUICK and jax.config.read(OPTIMISE_LITTLE) != little:
        jax.config.update(OPTIMISE_LITTLE, little)
        jax.clear_caches()  # What the test before has compiled is not for this one.


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folder of a trained chain of runs, see `chain`; tests at most evaluate it."""
    import chain

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # Common to all workers.
    folder = base / "chain"
    with (base / "chain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # The first trains, the others wait for it.
        if not folder.exists():
            chain.train(base / "chain.part").rename(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of `toy_run`, three steps, all checkpoints kept: folder and final state."""
    import toy_run

    workdir = tmp_path_factory.mktemp("trained")
    return workdir, toy_run.train(workdir)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def loaded_once():
    """Equal commands share networks and programs; on one device, which is faster."""
    from rae_jax.trainers import generation
    from rae_jax.training import sharding

    load, mesh = functools.cache(generation.load_converted), sharding.make_mesh(1)

    def load_converted(*sources, **options):
        return load(*map(str, sources), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_converted", load_converted)
        patch.setattr(sharding, "make_mesh", lambda *args, **options: mesh)
        yield


@pytest.fixture(scope="session")
def bucket_server():
    """Starts the server of a kind of bucket once; returns its users' variables."""
    import buckets

    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(buckets.server(kind)))


@pytest.fixture
def make_bucket(bucket_server, monkeypatch, tmp_path):
    """Makes an empty bucket of a kind, "gs" or "s3", and returns its address."""
    import buckets

    def make(kind):
        for name, value in bucket_server(kind).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RAE_CACHE", str(tmp_path / "cache"))
        return buckets.make(kind)

    return make


@pytest.fixture(params=["gs", "s3"])
def bucket(request, make_bucket):
    """The address of an empty bucket of each kind."""
    return make_bucket(request.param)
