"""`rae-jax sample`: classes of ImageNet by name, and the kinds of guidance."""

from pathlib import Path

import numpy as np
import pytest
from test_converted import DIT_DH, RAE, fails, random, run

from rae_jax.models import dit_dh, rae
from rae_jax.trainers import generation

# As ImageNet's networks, with an early head.
EARLY = DIT_DH | dict(depth=(2, 1), num_classes=1000, early_depth=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    random(dit_dh.DiTDH, **EARLY).save_pretrained(folder / "early")
    random(dit_dh.DiTDH, **DIT_DH).save_pretrained(folder / "plain")
    random(rae.RAE, **RAE).save_pretrained(folder / "rae")
    return folder


pytestmark = pytest.mark.usefixtures("loaded_once")


def command(folder, out, *options, model="early"):
    argv = ["sample", "--model", folder / model, "--autoencoder", folder / "rae"]
    argv += ["--num-points", 4, "--num-samples", 3, "--batch-size", 3]
    return [*argv, "--out", out, *options]


def sample(folder, out, *options):
    assert run(*command(folder, out, *options)) == 0
    with np.load(out) as data:
        return {name: data[name] for name in data.files}


def test_classes_by_name_without_data(folder, tmp_path, capsys):
    labels = ("--labels", "Golden Retriever, tench,3")
    found = sample(folder, tmp_path / "a.npz", *labels)
    assert found["labels"].tolist() == [207, 0, 3]
    said = capsys.readouterr().out
    assert "classes: 207 golden retriever, 0 tench, 3 tiger shark" in said
    out = tmp_path / "b.npz"
    said = fails(capsys, *command(folder, out, "--labels", "tench,crane"))
    assert "134 (crane, crane bird), 517 (crane, construction crane)" in said
    said = fails(capsys, *command(folder, out, "--labels", "tensh"))
    assert "Did you mean 0 (tench)" in said
    # Other networks have other classes.
    argv = command(folder, out, "--labels", "tench", model="plain")
    assert "Unknown class 'tench'" in fails(capsys, *argv)


def test_guidance_from_the_early_head(folder, tmp_path, capsys):
    """Beside that without a class, and none of it at a scale of one."""
    images = {}
    for kind in ("cfg", "internal"):
        scales = ("--guidance", kind, "--guidance-scale", "1,1.5")
        assert run(*command(folder, tmp_path / f"{kind}.npz", *scales)) == 0
        for scale in ("1", "1.5"):
            with np.load(tmp_path / f"{kind}_{scale}.npz") as data:
                images[kind, scale] = data["arr_0"].astype(int)
    plain = images["cfg", "1"]
    assert np.abs(images["internal", "1"] - plain).max() <= 1
    for other in (plain, images["cfg", "1.5"]):
        assert np.abs(images["internal", "1.5"] - other).mean() > 1
    usual = sample(folder, tmp_path / "a.npz", "--guidance-scale", "1.5")["arr_0"]
    np.testing.assert_array_equal(usual, images["cfg", "1.5"])


def test_guidance_that_cannot_be(folder, tmp_path, capsys):
    out = tmp_path / "out" / "a.npz"
    scale = ("--guidance-scale", "1.5")

    def error(*options, **changes):
        return fails(capsys, *command(folder, out, *options, **changes))

    said = error("--guidance", "internal", *scale, model="plain")
    assert "model.early_depth" in said
    assert "Give --guidance-scale for --guidance" in error("--guidance", "internal")
    said = error("--guide", folder / "early", "--guidance", "internal", *scale)
    assert "--guide goes with --guidance autoguidance, not internal" in said
    assert "needs --guide SRC" in error("--guidance", "autoguidance", *scale)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--guidance", "internal"], {"guidance": "internal", "guide": ""}),
        (["--guidance", "autoguidance"], {"guidance": "autoguidance"}),
        (["--guide", "weak"], {"guidance": "autoguidance", "guide": "weak"}),
        ([], {}),
    ],
)
def test_guidance_of_runs(options, expected, tmp_path, monkeypatch, capsys):
    """The config's is kept but for what is given."""
    seen = []

    def load(workdir, decoder, **changes):
        seen.append(changes)
        raise ValueError("enough")

    monkeypatch.setattr(generation, "load", load)
    argv = ("sample", Path("run"), "--out", tmp_path / "a.png", *options)
    assert "enough" in fails(capsys, *argv, "--guidance-scale", "1.5")
    assert seen == [expected]
