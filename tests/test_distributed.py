"""Several processes as one: found, joined, missed, and equal to a single one."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import process_run
import pytest

from rae_jax import copies, storage
from rae_jax.training import distributed, logs

ROOT = Path(__file__).parent.parent
DEVICES = 8


def run_together(count: int, *words: str, seconds: int = 300) -> list[str]:
    """Runs a command as `count` processes on loopback; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        distributed.TIMEOUT: str(seconds),
    }
    with contextlib.ExitStack() as stack:
        outputs = [
            stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)
        ]
        running = [
            subprocess.Popen(
                [sys.executable, *words],
                env=shared | {"JAX_PROCESS_ID": str(index)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for index, output in enumerate(outputs)
        ]
        end = time.monotonic() + seconds
        try:
            codes = [None]
            # The others would wait for one that has failed.
            while None in codes and not any(codes) and time.monotonic() < end:
                time.sleep(0.05)
                codes = [process.poll() for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        found = [output.seek(0) or output.read() for output in outputs]
    # Those that were ended because of another say nothing of the reason.
    for code, text in sorted(zip(codes, found, strict=True), key=lambda x: not x[0]):
        assert code == 0, text
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes with four devices each did and printed."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_together(2, str(ROOT / "tests" / "process_run.py"), str(folder))


def test_two_processes_train_and_resume_as_one(two, tmp_path):
    """Metrics and parameters to float32 rounding; one line per step."""
    folder, _ = two
    process_run.train(tmp_path, process_run.STEPS)
    params = process_run.train(tmp_path, process_run.MORE)
    with np.load(folder / "params.npz") as found:
        assert set(found) == set(params)
        for name, value in params.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7)
    ours, theirs = logs.read_metrics(tmp_path), logs.read_metrics(folder)
    assert [r["step"] for r in theirs] == list(range(1, process_run.MORE + 1))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-6)


def test_two_processes_share_a_bucket(bucket, two):
    """Each writes its shards there and reads them again, as on a common disk."""
    workdir = storage.path(bucket) / "two"
    run_together(2, str(ROOT / "tests" / "process_run.py"), str(workdir))
    with (
        np.load(copies.local(workdir / "params.npz")) as found,
        np.load(two[0] / "params.npz") as wanted,
    ):
        assert set(found) == set(wanted)
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
    steps = [record["step"] for record in logs.read_metrics(workdir)]
    assert steps == list(range(1, process_run.MORE + 1))


def test_only_process_0_prints(two):
    _, (first, second) = two
    assert "only from process 0" in first and "train 4/4" in first
    assert "only from" not in second and "train" not in second


def test_missing_process_is_named(two):
    folder, _ = two
    text = (folder / "missing").read_text()
    assert f"1 ({socket.gethostname()}) did not come to 'the meeting'" in text
    assert "0 (" not in text and "within 1 s" in text


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, ""),
        ({"RAE_DISTRIBUTED": "1"}, "RAE_DISTRIBUTED"),
        ({"RAE_DISTRIBUTED": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, ""),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "Slurm"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ],
)
def test_other_processes_are_looked_for_only_when_announced(variables, reason):
    assert distributed.wanted(variables) == reason


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(JAX_NUM_PROCESSES="2"), "JAX_PROCESS_ID must be a number"),
        (dict(JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0"), "JAX_NUM_PROCESSES.*two"),
        (dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="2"), "= 2 must be below"),
        (
            dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0", RAE_BARRIER_SECONDS="0"),
            "RAE_BARRIER_SECONDS must be",
        ),
    ],
)
def test_incomplete_variables_are_named(monkeypatch, variables, message):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


def test_one_process_alone_does_not_wait():
    distributed.barrier("nobody", 0)
    assert distributed.is_main()
    assert (distributed.from_main(np.arange(3)) == np.arange(3)).all()


@pytest.mark.slow
def test_commands_of_two_processes_equal_those_of_one(tmp_path):
    """Trained for two steps, resumed for two more, evaluated: scores 1e-5 rel."""
    scores = {}
    for count in (1, 2):
        workdir = tmp_path / str(count)
        for steps in (2, 4):
            words = ("train", "--config", str(ROOT / "configs" / "ldae.py:smoke"))
            words += ("--workdir", str(workdir), f"--config.num_steps={steps}")
            words += ("--config.mesh.fsdp=2", "--config.every.log=1")
            # Below it, AdamW divides rounding by its own size.
            words += ("--config.optimizer.eps=1e-3",)
            words += ("--config.every.evaluate=2", "--config.every.checkpoint=2")
            run_together(count, "-m", "rae_jax", *words)
        run_together(count, "-m", "rae_jax", "evaluate", str(workdir))
        assert (workdir / "denoising.png").is_file()
        final = json.loads((workdir / "evaluation.json").read_text())
        scores[count] = [*logs.read_metrics(workdir), final]
    for a, b in zip(scores[1], scores[2], strict=True):
        names = set(a) & {"step", "loss", "grad_norm", "denoised_psnr"}
        assert names
        for name in names:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
