"""What clusters do to runs: damaged files, full disks, hangs, other machines."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from jax._src import distributed
from toy_run import assert_equal, train

from rae_jax import config as configs
from rae_jax.trainers import frozen
from rae_jax.training import (
    best,
    checkpoints,
    divergence,
    interrupts,
    logs,
    loop,
    resuming,
    watchdog,
)

TESTS = Path(__file__).parent
# Threads of Orbax that outlive a read or write which has failed.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::pytest.PytestUn{name}ExceptionWarning")
    for name in ("handledThread", "raisable")
]


# ---- Changed configs


def test_changes_are_refused_key_by_key(run):
    changed = dict(seed=7, ema_decay=0.5, optimizer=dict(peak_lr=1.0))
    config = toy_run.config(num_steps=3, seed=7)
    config.optimizer.peak_lr = 1.0
    with pytest.raises(configs.ConfigError) as caught:
        resuming.check(run, config)
    text = str(caught.value)
    assert "\n  optimizer.peak_lr: 0.01 -> 1.0\n  seed: 42 -> 7\n" in text
    assert text.endswith("--allow-change optimizer.peak_lr seed")
    with pytest.raises(configs.ConfigError, match="another config:\n  seed: 42 -> 7\n"):
        resuming.check(run, config, ["optimizer"])
    found = resuming.check(run, config, ["optimizer.peak_lr", "seed"])
    assert list(found) == ["optimizer.peak_lr", "seed"]
    with pytest.raises(configs.ConfigError, match="Did you mean 'optimizer.peak_lr'"):
        resuming.check(run, config, ["optimizer.peaklr"])
    assert changed["seed"] == config.seed


def test_keys_that_a_newer_version_adds_are_taken_and_reported(run, trained, capsys):
    """And those that it dropped are not passed over."""
    path = run / checkpoints.CONFIG_NAME
    stored = json.loads(path.read_text())
    del stored["guard"], stored["optimizer"]["eps"]
    path.write_text(json.dumps(stored))
    assert_equal(train(run), trained[1])
    output = capsys.readouterr().err
    assert "\n  guard.skip: '(absent)' -> False\n" in output
    assert "\n  optimizer.eps: '(absent)' -> 1e-08\n" in output
    stored["optimizer"]["momentum"] = 0.5
    path.write_text(json.dumps(stored))
    with pytest.raises(configs.ConfigError, match="momentum: 0.5 -> '.absent.'"):
        train(run)


@pytest.mark.parametrize("rows", [4, 16])
def test_batch_size_may_change_at_the_same_image(run, monkeypatch, rows):
    """The position is kept in images: 3 batches of 8 are 6 of 4, and 1.5 of 16."""
    seen = []
    change = toy_run.Batches.set_state
    monkeypatch.setattr(
        toy_run.Batches,
        "set_state",
        lambda self, state: (seen.append(state), change(self, state)),
    )
    monkeypatch.setattr(toy_run, "ROWS", rows)
    train(run, config=dict(num_steps=4, mesh=dict(data=4, fsdp=1, tensor=1)))
    assert seen == [{"position": 3 * 8 // rows}]


# ---- Divergence


def test_divergence_is_dumped_with_all_that_is_known(tmp_path):
    class Indexed(toy_run.Batches):
        def __next__(self):
            found = super().__next__()
            return found | {"index": np.arange(8) + 100 * self.position}

    config = toy_run.config()
    program = dataclasses.replace(
        toy_run.program(config), batches=lambda: Indexed(poison=5)
    )
    with pytest.raises(FloatingPointError, match="What is known of it: .*divergence"):
        loop.run(program, config, tmp_path)
    found = json.loads((tmp_path / "divergence.json").read_text())
    assert found["message"].startswith("Step 5: grad_norm, loss is not finite")
    assert found["last_good_checkpoint"] == 4
    assert found["steps"][-1]["index"] == list(range(500, 508))
    assert found["steps"][-1]["metrics"]["loss"] == "nan"
    assert found["steps"][-2]["step"] == 4
    assert found["grad_norms"] == {"bias": "nan", "kernel": "nan"}
    assert found["param_norms"].keys() == {"bias", "kernel"}


def test_norms_are_by_block_and_by_part():
    params = {
        "stem": {"kernel": jnp.full((2, 2), 3.0)},
        "trunk": {"blocks": {"a": jnp.ones((3, 4)), "b": jnp.zeros((3, 2, 2))}},
    }
    params["trunk"]["blocks"]["b"] = params["trunk"]["blocks"]["b"].at[1].set(2.0)
    names = divergence.group_names(params)
    norms = divergence.group_norms(params)
    assert names == ["stem", *(f"trunk/blocks[{i}]" for i in range(3))]
    np.testing.assert_allclose(norms, [6, 2, np.sqrt(20), 2], rtol=1e-6)


# ---- Signals and hangs, in processes of their own

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import toy_run
from rae_jax.training import loop

class Batches(toy_run.Batches):
    def __next__(self):
        if self.position == 3:
            {action}
        return super().__next__()

config = toy_run.config(num_steps=6, watchdog={watchdog})
program = toy_run.program(config)
object.__setattr__(program, "batches", Batches)
loop.run(program, config, Path({workdir!r}))
"""


def start(workdir, action, watchdog=0.0):
    options = dict(tests=str(TESTS), workdir=str(workdir))
    script = SCRIPT.format(action=action, watchdog=watchdog, **options)
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stderr


def test_second_signal_stops_at_once(tmp_path):
    both = "[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]; time.sleep(60)"
    status, output = start(tmp_path, both)
    assert status == -signal.SIGTERM, output
    assert output.count("once more stops at once") == 1
    assert checkpoints.finished_step(tmp_path) == 2  # Of step 3 it began the next.


def test_hanging_run_is_ended_with_its_stacks(tmp_path):
    status, output = start(tmp_path, "time.sleep(600)", watchdog=0.5)
    assert status == interrupts.EXIT_HANGING, output
    assert "more than config.watchdog allows (0.5 s for step 4)" in output
    stacks = (tmp_path / watchdog.STACKS_NAME).read_text()
    for text in (output, stacks):
        assert "in __next__" in text and "most recent call first" in text


def test_watchdog_gives_more_time_to_what_takes_longer(tmp_path, monkeypatch):
    stopped = []
    monkeypatch.setattr(
        watchdog.Watchdog, "_stop", lambda self, waited: stopped.append(self._what)
    )
    monkeypatch.setattr(watchdog, "ALLOWANCE", 1000)
    with watchdog.Watchdog(0.05, tmp_path) as dog:
        time.sleep(0.15)  # Starting.
        dog.step(1)
        with dog.longer("the evaluation"):
            time.sleep(0.15)
        assert not stopped
        time.sleep(0.15)
    assert stopped and set(stopped) == {"step 2"}


class Store(dict):
    """Stands for the key-value store that all processes share."""

    def key_value_set(self, key, value):
        if key in self:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self[key]


def test_processes_stop_after_the_same_step(monkeypatch):
    """Though signals come at different moments and one process is ahead."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed.global_state, "client", Store())
    early, ahead, deaf = (interrupts.StopRequest() for _ in range(3))
    assert not early.agreed(4) and not ahead.agreed(5) and not deaf.agreed(4)
    early.requested = signal.SIGTERM
    assert not early.agreed(5)
    ahead.requested = signal.SIGINT  # Later: its own step is not the one.
    stops = [
        next(step for step in range(first, 20) if process.agreed(step))
        for process, first in ((early, 6), (ahead, 6), (deaf, 5))
    ]
    assert stops == [7, 7, 7]
    assert deaf.exit_status == interrupts.EXIT_PREEMPTED


# ---- The best checkpoint


def with_scores(workdir, values, metric="fid", stop=None, **changes):
    """Runs with given scores of the evaluations after each step."""

    def evaluate(state, frozen, folder):
        step = int(state.step)
        if step == stop:
            raise RuntimeError("killed")
        return {"fid": values[step], "psnr": values[step]}

    config = toy_run.config(every=dict(log=0, checkpoint=1, evaluate=1), **changes)
    with config.unlocked():
        config.evaluation = dict(best=metric)
    return loop.run(toy_run.program(config, evaluate=evaluate), config, workdir)


VALUES = [None, 5.0, 3.0, np.nan, 4.0, 2.0, 2.0]


def best_step(workdir):
    record = json.loads((workdir / best.RECORD_NAME).read_text())
    step = checkpoints.load_params(best.folder(workdir), ("step",))
    assert step == record["step"]
    assert record["value"] == VALUES[record["step"]]
    return record["step"]


def test_best_checkpoint_is_kept_and_survives_interruptions(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        with_scores(tmp_path, VALUES, stop=4)
    assert best_step(tmp_path) == 2
    with_scores(tmp_path, VALUES, num_steps=4)
    assert best_step(tmp_path) == 2
    with_scores(tmp_path, VALUES)
    assert best_step(tmp_path) == 5
    at_best = best.folder(tmp_path)
    kept = [path.name for path in checkpoints.folder(at_best).iterdir()]
    assert kept == ["5"]
    # A workdir of its own, from which the run goes on.
    config = configs.read_config(at_best / checkpoints.CONFIG_NAME)
    program = toy_run.program(config, evaluate=lambda *_: {"fid": 9.0, "psnr": 0.0})
    again = loop.run(program, config, at_best)
    expected = checkpoints.load_params(tmp_path, ("params",))
    assert_equal(again.params, expected)


def test_paths_of_a_run_hold_for_its_best_state(tmp_path):
    (tmp_path / "decoder").mkdir()
    (tmp_path / "run" / "best" / "own").mkdir(parents=True)
    run = tmp_path / "run"
    assert frozen.resolve("../decoder", run) == tmp_path / "decoder"
    assert frozen.resolve("../decoder", run / "best") == tmp_path / "decoder"
    assert frozen.resolve("own", run / "best") == run / "best" / "own"
    assert frozen.resolve("nowhere", run / "best") == Path("nowhere")


def test_best_by_a_score_that_is_better_when_higher(tmp_path):
    with_scores(tmp_path, VALUES, metric="psnr")
    assert best_step(tmp_path) == 1


def test_best_names_what_is_wrong(tmp_path):
    with pytest.raises(configs.ConfigError, match="best: Unknown score 'fi"):
        with_scores(tmp_path, VALUES, metric="fi")


# ---- Start-up


def test_first_record_tells_how_long_the_start_took(trained):
    records = logs.read_metrics(trained[0])
    assert (
        0 < records[0]["seconds_of_first_step"] <= records[0]["seconds_to_first_step"]
    )
    assert "seconds_to_first_step" not in records[1]
    assert abs(logs.process_start() - time.time()) < 86_400
