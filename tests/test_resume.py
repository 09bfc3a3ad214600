"""Runs that are killed, interrupted, changed or damaged, as real processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run

from rae_jax import config as configs
from rae_jax import main, storage
from rae_jax.training import checkpoints, interrupts, logs, loop

ROOT = Path(__file__).parent.parent
STEPS = 40
SCALARS = ("step", "loss", "mse", "grad_norm", "lr")


class Trainer:
    """Starts `rae-jax train` on the smoke l-DAE; all share compiled programs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def words(self, workdir: Path, *overrides: str) -> list[str]:
        values = {
            "num_steps": STEPS,
            "model.depth": 2,
            "encoder_depth": 1,
            "every.log": 2,
            "every.checkpoint": 3,
            "every.evaluate": 0,
        }
        words = ["train", "--workdir", str(workdir)]
        words += ["--config", f"{ROOT / 'configs' / 'ldae.py'}:smoke"]
        words += [f"--config.{key}={value}" for key, value in values.items()]
        return [*words, *overrides]

    def start(self, workdir: Path, *overrides: str) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            # Of their own, since a killed one may leave a half-written program.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "rae_jax", *self.words(workdir, *overrides)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, workdir: Path, *overrides: str) -> tuple[int, str]:
        process = self.start(workdir, *overrides)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def undisturbed(trainer):
    """Workdir of a run from the first to the last step."""
    workdir = trainer.folder / "undisturbed"
    status, output = trainer.finish(workdir)
    assert status == 0, output
    return workdir


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Waits until a condition holds or the process has ended; says if it runs."""
    while process.poll() is None and not condition():
        time.sleep(0.002)
    return process.poll() is None


def last_step(workdir: Path) -> int:
    records = logs.read_metrics(workdir)
    return int(records[-1]["step"]) if records else 0


def is_saving(workdir: Path) -> bool:
    root = checkpoints.folder(workdir)
    return bool(checkpoints._unfinished(root)) if root.is_dir() else False


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Every bit of the state, and every logged value but for the speed."""
    for part in ("step", "params", "ema_params", "opt_state"):
        state, expected = (
            checkpoints.load_params(w, (part,)) for w in (workdir, undisturbed)
        )
        jax.tree.map(np.testing.assert_array_equal, state, expected)
    records, expected = logs.read_metrics(workdir), logs.read_metrics(undisturbed)
    assert [r["step"] for r in records] == list(range(2, STEPS + 1, 2))
    for a, b in zip(records, expected, strict=True):
        assert {k: a[k] for k in SCALARS} == {k: b[k] for k in SCALARS}


MANY = [pytest.mark.slow, pytest.mark.timeout(1_800)]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=MANY)])
def test_killed_run_ends_as_if_undisturbed(trainer, undisturbed, tmp_path, kills):
    """SIGKILL at random moments, every other time within a checkpoint write."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    workdir = tmp_path / "run"
    for kill in range(kills):
        process = trainer.start(workdir)
        furthest = STEPS - 6 if kills == 3 else 2 + (STEPS - 6) * kill // kills
        target = min(last_step(workdir) + rng.randint(1, 10), furthest)
        running = wait_for(process, lambda t=target: last_step(workdir) >= t)
        if kill % 2:
            running = wait_for(process, lambda: is_saving(workdir))
            time.sleep(rng.uniform(0, 0.02) if kill % 4 == 3 else 0)
        else:
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert running and process.returncode == -signal.SIGKILL, output
        print(f"killed at step {last_step(workdir)}, saving: {is_saving(workdir)}")
    status, output = trainer.finish(workdir)
    assert status == 0, output
    assert_same_run(workdir, undisturbed)
    assert not is_saving(workdir)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_killed_run_in_a_bucket_ends_as_if_undisturbed(trainer, undisturbed, bucket):
    """SIGKILL at eight moments, some of them within a checkpoint write."""
    rng, workdir = random.Random(0), storage.path(bucket) / "run"
    interrupted = 0
    for kill in range(8):
        process = trainer.start(workdir)
        target = min((checkpoints.finished_step(workdir) or 0) + 3, STEPS - 6)
        running = wait_for(
            process, lambda t=target: (checkpoints.finished_step(workdir) or 0) >= t
        )
        if kill % 2:
            running = wait_for(process, lambda: is_saving(workdir))
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert running and process.returncode == -signal.SIGKILL, output
        interrupted += is_saving(workdir)
        print(f"killed at step {checkpoints.finished_step(workdir)}")
    assert interrupted, "no kill has met a write"
    status, output = trainer.finish(workdir)
    assert status == 0, output
    assert_same_run(workdir, undisturbed)
    assert not is_saving(workdir)


def test_preempted_run_saves_and_continues(trainer, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = trainer.start(workdir, "--config.every.checkpoint=0")
    assert wait_for(process, lambda: last_step(workdir) >= 4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == interrupts.EXIT_PREEMPTED, output
    assert "once more stops at once" in output
    step = checkpoints.finished_step(workdir)
    assert 4 <= step < STEPS
    assert f"Stopped at step {step} of {STEPS}; the same command continues" in output
    assert "Traceback" not in output
    status, output = trainer.finish(workdir)
    assert status == 0, output
    assert_same_run(workdir, undisturbed)


def test_changed_config_is_refused_with_a_diff(trainer, undisturbed, capsys):
    before = (undisturbed / checkpoints.CONFIG_NAME).read_bytes()
    overrides = "--config.optimizer.peak_lr=0.5", "--config.tokenizer.latent_dim=4"
    assert main.main(trainer.words(undisturbed, *overrides)) == 1
    output = capsys.readouterr().err
    assert "holds a run with another config:\n  optimizer.peak_lr: 0.0008 -> 0.5\n" in (
        output
    )
    assert "\n  tokenizer.latent_dim: 8 -> 4\n" in output
    assert "--allow-change optimizer.peak_lr tokenizer.latent_dim\n" in output
    assert "Traceback" not in output
    assert (undisturbed / checkpoints.CONFIG_NAME).read_bytes() == before


# The same loop on a run that compiles in a moment.


def test_run_may_become_longer(tmp_path):
    short, long = toy_run.config(num_steps=3), toy_run.config(num_steps=6)
    loop.run(toy_run.program(short), short, tmp_path / "a")
    loop.run(toy_run.program(long), long, tmp_path / "a")
    final = loop.run(toy_run.program(long), long, tmp_path / "a")  # Nothing to do.
    straight = loop.run(toy_run.program(long), long, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, final, straight)
    assert configs.read_config(tmp_path / "a" / "config.json").num_steps == 6
    assert [r["step"] for r in logs.read_metrics(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_within_an_evaluation_loses_nothing(tmp_path, number):
    calls = []

    def evaluate(state, frozen, workdir):
        calls.append(int(state.step))
        if calls == [1, 2]:
            os.kill(os.getpid(), number)
        return {}

    config = toy_run.config(every=dict(log=3, checkpoint=0, evaluate=1))
    program = toy_run.program(config, evaluate=evaluate)
    with pytest.raises(interrupts.Interrupted, match="Stopped at step 2") as caught:
        loop.run(program, config, tmp_path / "a")
    assert caught.value.exit_status == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    assert checkpoints.finished_step(tmp_path / "a") == 2
    final = loop.run(program, config, tmp_path / "a")
    # A termination leaves no time: the evaluation is for the next process.
    again = [2] if number == signal.SIGTERM else []
    assert calls == [1, 2, *again, 3, 4, 5, 6]
    straight = loop.run(program, config, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, final, straight)
    means = [
        [r["loss"] for r in logs.read_metrics(tmp_path / run) if "loss" in r]
        for run in "ab"
    ]
    assert means[0] == means[1] and len(means[0]) == 2


def test_missing_checkpoint_says_how_to_make_one(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="Train it first: rae-jax"):
        checkpoints.load_params(tmp_path)
    config = toy_run.config(num_steps=1)
    loop.run(toy_run.program(config), config, tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match="no part 'mu'; it has"):
        checkpoints.load_params(tmp_path, ("mu",))
