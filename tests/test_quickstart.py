"""The quickstart on the embedded photographs, shortened to two steps a stage."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_jax import main
from rae_jax.commands import quickstart
from rae_jax.trainers import registry

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "rae_jax", "quickstart"]


def run_quickstart(workdir):
    """Runs the program on one device; returns its output and the seconds it took."""
    argv = [*COMMAND, "--steps", "2", "--num-samples", "8", "--workdir", str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    # As a user's: it runs for longer than it compiles.
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    start = time.monotonic()
    result = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_from_nothing_to_a_report(tmp_path):
    """Two minutes on two idle cores; a second call repeats nothing but the page."""
    workdir = tmp_path / "quick start"
    output, first_seconds = run_quickstart(workdir)
    shown = output.splitlines()
    names = ("report.html", "samples.png", "reconstructions.png", "metrics.json")
    assert shown[-4:] == [str(workdir / name) for name in names]
    for name in (*names, "samples_guided.png", "strip.png", "real.png"):
        assert (workdir / name).stat().st_size > 500, name
    for stage in quickstart.STAGES:
        assert (workdir / stage / registry.FINISHED_NAME).read_text() == "2"

    metrics = json.loads((workdir / "metrics.json").read_text())
    assert set(quickstart.STAGES) | {"evaluation"} == set(metrics["seconds"])
    assert metrics["generation"]["num_samples"] == 8
    assert metrics["reconstruction"]["num_images"] == 160
    assert {"psnr", "lpips_alex", "lpips_vgg"} <= set(metrics["reconstruction"])
    features = ("encoder", "random", "pca", "pixels")
    assert set(metrics["probe"]) == {f"top1_{name}" for name in features}
    assert metrics["classes"][0] == "astronaut" and len(metrics["classes"]) == 10
    numbers = [*metrics["generation"].values(), *metrics["reconstruction"].values()]
    assert np.isfinite(numbers).all()
    with Image.open(workdir / "samples.png") as picture:
        assert picture.width > 100
    page = (workdir / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("data:image/") > 3

    (workdir / "report.html").unlink()
    _, seconds = run_quickstart(workdir)
    assert seconds < first_seconds / 3
    assert (workdir / "report.html").is_file()
    again = json.loads((workdir / "metrics.json").read_text())
    for name in ("generation", "reconstruction", "probe", "peak_memory_gb"):
        assert again[name] == metrics[name]
    for stage in quickstart.STAGES:  # Nothing was trained again.
        assert again["seconds"][stage] == metrics["seconds"][stage]


def test_wrong_arguments_are_named(tmp_path, capsys):
    def error(*argv):
        assert main.main(["quickstart", "--workdir", str(tmp_path), *argv]) == 1
        return capsys.readouterr().err

    assert "--steps must be at least 1, got 0" in error("--steps", "0")
    assert "No experiment files" in error("--configs", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_stage_that_runs_again_is_measured_again(tmp_path, monkeypatch):
    result = tmp_path / quickstart.GENERATION_NAME
    result.write_text("{}")
    trained = []
    monkeypatch.setattr(registry, "train", lambda *a, **k: trained.append(a[1]))
    config = quickstart.load(quickstart.find_configs(None), "ldae", 5)
    assert config.num_steps == 5 and config.optimizer.warmup_steps == 4
    quickstart.run_stage(config, tmp_path / "ldae", tmp_path, "ldae")
    assert trained == [tmp_path / "ldae"]
    assert not result.exists()
    seconds = json.loads((tmp_path / quickstart.TIMES_NAME).read_text())
    assert set(seconds) == {"ldae"}
