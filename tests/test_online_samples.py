"""Scores of samples while training: which weights, which guidance, which names."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.evaluation import extractors, quality
from rae_jax.trainers import judges, online_samples, registry
from rae_jax.training import checkpoints, logs, sharding

NAME = "fd_pixels"
COUNT = 12


@dataclasses.dataclass
class Chain:
    """Draws noise whose brightness tells weights, and whose spread guidance."""

    params: dict
    num_classes: int = 4

    def images(self, labels, *, scale, seed, batch_size):
        rng = np.random.default_rng(seed)
        for start in range(0, len(labels), batch_size):
            y = labels[start : start + batch_size, None, None, None]
            noise = rng.normal(size=(len(y), 2, 2, 3))
            images = 100 + self.params["dit"] + 10 * scale * noise + y
            yield images.astype(np.uint8)


@dataclasses.dataclass
class State:
    params: float
    ema_params: float


def pixels():
    def function(params, images):
        return {"pool": images.reshape(len(images), -1)[:, :3].astype(np.float32)}

    return extractors.Extractor(NAME, function, {}, batch_size=8)


def reference(seed=1):
    images = np.random.default_rng(seed).integers(0, 255, (40, 2, 2, 3), np.uint8)
    return quality.measure(pixels(), [images], "the reference")


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(
        judges.Judges,
        "networks",
        lambda self, mesh=None: (pixels(),) if self.efflite0 else (),
    )
    monkeypatch.setattr(
        judges.Judges, "references", lambda self, nets, keep: {NAME: reference()}
    )


def make(tmp_path, **block):
    config = ConfigDict(dict(seed=3, sampling={"guidance_scale": 1.5}))
    config.evaluation = dict(efflite0=True, reference="r", num_samples=COUNT) | block
    chain = Chain({"dit": None, "decoder": 0})
    mesh = sharding.make_mesh(-1)
    return online_samples.make_evaluate(config, tmp_path, chain, mesh)


def expected(weights, scale):
    labels = online_samples.generate.balanced_labels(COUNT, 4, 3)
    images = Chain({"dit": weights}).images(labels, scale=scale, seed=3, batch_size=12)
    found = quality.measure(pixels(), images, "samples")
    return quality.compare(found, reference()).scores[NAME]


def test_ema_weights_are_scored_with_and_without_guidance(network, tmp_path):
    scores = make(tmp_path)(State(params=30, ema_params=5))
    assert scores.keys() == {NAME, f"{NAME}_cfg1.5"}
    np.testing.assert_allclose(scores[NAME], expected(5, 1.0), rtol=1e-6)
    np.testing.assert_allclose(scores[f"{NAME}_cfg1.5"], expected(5, 1.5), rtol=1e-6)


def test_trained_weights_are_scored_when_asked_for(network, tmp_path):
    evaluate = make(tmp_path, online_weights=True, guidance=(2.0,), batch_size=5)
    scores = evaluate(State(params=30, ema_params=5))
    assert scores.keys() == {f"{NAME}_cfg2", f"{NAME}_cfg2_online"}
    np.testing.assert_allclose(
        scores[f"{NAME}_cfg2_online"], expected(30, 2), rtol=1e-6
    )


def test_nothing_is_scored_without_networks(network, tmp_path):
    assert make(tmp_path, efflite0=False)(State(1, 1)) == {}


@pytest.mark.parametrize(
    ("block", "message"),
    [(dict(reference=""), "reference is empty"), (dict(num_samples=1), "at least 2")],
)
def test_what_cannot_be_scored_is_an_error_before_training(
    network, tmp_path, block, message
):
    with pytest.raises(configs.ConfigError, match=message):
        make(tmp_path, **block)


def test_run_is_scored_and_its_best_state_kept(network, tmp_path):
    """Guided and unguided at every evaluation; the lowest unguided one is in best/."""
    given = ["evaluation.efflite0=True", "evaluation.reference=images.npz"]
    given += [f"evaluation.num_samples={COUNT}", f"evaluation.best={NAME}"]
    given += ["sampling.guidance_scale=1.5", "sampling.num_points=3"]
    given += ["every.evaluate=1"]
    path = Path(__file__).parent.parent / "configs/dit_dh.py:smoke_pixels"
    config = configs.load_config(str(path), [f"--config.{text}" for text in given])
    registry.train(config, tmp_path)
    scores = {r["step"]: r for r in logs.read_metrics(tmp_path) if NAME in r}
    assert list(scores) == [1, 2, 3]
    assert all(np.isfinite(r[f"{NAME}_cfg1.5"]) for r in scores.values())
    best = min(scores, key=lambda step: scores[step][NAME])
    assert json.loads((tmp_path / "best.json").read_text())["step"] == best
    assert checkpoints.finished_step(tmp_path / "best") == best


def test_judges_without_a_decoder_are_refused(network, tmp_path):
    path = Path(__file__).parent.parent / "configs/dit_dh.py:smoke"
    config = configs.load_config(str(path), ["--config.evaluation.efflite0=True"])
    with pytest.raises(configs.ConfigError, match="decoder = 'none'"):
        registry.train(config, tmp_path)
