"""`rae-jax bench`: a step and its input, measured here."""

import json
from pathlib import Path

import pytest

from rae_jax import config as configs
from rae_jax import main
from rae_jax.planning import bench

ROOT = Path(__file__).parent.parent
SMOKE = f"{ROOT / 'configs' / 'ldae.py'}:smoke"
GAN = f"{ROOT / 'configs' / 'rae_decoder.py'}:smoke_gan"


def test_a_step_and_its_input_are_measured(capsys, tmp_path):
    trace = tmp_path / "trace"
    argv = ["bench", "--config", SMOKE, "--json", "--steps", "4", "--warmup", "1"]
    assert main.main([*argv, "--profile", str(trace)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    times = found["step_seconds"]
    assert 0 < times["min"] <= times["median"] <= times["p90"]
    assert found["images_per_second"] == pytest.approx(8 / times["median"])
    rate = found["flops_per_step"] / times["median"]
    assert found["mfu"] == pytest.approx(rate / found["peak_flops"])
    assert found["devices"] == 8 and found["batch_size"] == 8
    assert found["compile_seconds"] > 0 and found["host_memory_bytes"] > 1e8
    for name in ("input_images_per_second", "overlapped_images_per_second"):
        assert found[name] > 0
    assert list(trace.rglob("*.xplane.pb"))
    assert "compiling" in err


def test_random_arrays_stand_in_for_data(capsys):
    missing = ["--config.data.source=class_folder", "--config.data.path=nowhere"]
    argv = ["bench", "--config", SMOKE, "--steps", "2", "--warmup", "0", *missing]
    assert main.main(argv) == 1
    assert "--synthetic" in capsys.readouterr().err
    assert main.main([*argv, "--synthetic"]) == 0
    out = capsys.readouterr().out
    assert "images per second" in out and "input alone" not in out


def test_a_bench_begins_where_all_parts_run():
    config = configs.load_config(GAN, ["--config.loss.perceptual_start=1"])
    assert config.gan.start == 2
    changed = bench.from_the_start(config)
    starts = (changed.gan.critic_start, changed.gan.start)
    assert (*starts, changed.loss.perceptual_start) == (0, 0, 0)
    assert config.gan.start == 2  # The config itself is left alone.


def test_unusable_numbers_of_steps_are_refused(capsys):
    assert main.main(["bench", "--config", SMOKE, "--steps", "0"]) == 1
    assert "--steps must be at least 1" in capsys.readouterr().err
