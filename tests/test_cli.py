"""The verbs of the command line, on the runs of a chain."""

import json
import subprocess
import sys

import chain
import numpy as np
import pytest
from PIL import Image

from rae_jax import main
from rae_jax.data import images
from rae_jax.evaluation import pictures

SMOKE = f"{chain.ROOT / 'configs' / 'ldae.py'}:smoke"


def fails(capsys, *argv, status=1):
    """Runs a verb that must fail; returns what it said on the error stream."""
    assert main.main([str(word) for word in argv]) == status
    return capsys.readouterr().err


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main.main([str(word) for word in argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


def succeeds(*argv):
    assert main.main([str(word) for word in argv]) == 0


# ---- Parsing


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_explains_itself(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        main.main([verb, "--help"])
    assert caught.value.code == 0
    assert f"rae-jax {verb}" in capsys.readouterr().out


def test_the_package_runs_as_a_program():
    """All verbs are listed, and --help needs no device."""
    command = [sys.executable, "-W", "error", "-m", "rae_jax", "--help"]
    result = subprocess.run(
        command, cwd=chain.ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and not result.stderr
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert set(main.VERBS) <= listed


def test_wrong_arguments_exit_with_usage(capsys):
    assert "invalid choice: 'trian'" in usage_error(capsys, "trian")
    assert "'quickstart'" in usage_error(capsys, "foo", "train")  # All are named.
    assert "--outt" in usage_error(capsys, "sample", "x", "--out=a.png", "--outt=b")
    assert "required" in usage_error(capsys, "train", "--workdir", "x")
    assert "VERB" in usage_error(capsys)


def test_config_errors_are_one_line_on_the_error_stream(capsys, tmp_path):
    def error(config, *rest):
        text = fails(capsys, "train", "--config", config, "--workdir", tmp_path, *rest)
        assert text.startswith("rae-jax train: ") and "Traceback" not in text
        assert text.count("\n") == 1 and text.endswith("\n")
        return text

    assert "No config file 'gone.py'" in error("gone.py")
    assert "Did you mean 'smoke'?" in error(SMOKE.replace("smoke", "smok"))
    typo = error(SMOKE, "--config.num_step=3")
    assert "'num_step'. Did you mean 'num_steps'?" in typo
    assert "many" in error(SMOKE, "--config.num_steps=many")
    assert "Unexpected argument 'stray'" in error(SMOKE, "stray")
    assert "batch_size = 12" in error(SMOKE, "--config.data.batch_size=12")
    assert "Did you mean 'cosine'?" in error(SMOKE, "--config.optimizer.schedule=cosin")
    assert "'photo'" in error(SMOKE, "--config.data.source=photo")
    decoder = SMOKE.replace("ldae.py", "rae_decoder.py")
    assert "'photo'" in error(decoder, "--config.data.source=photo")
    assert not list(tmp_path.iterdir())


def test_verbs_refuse_folders_that_are_no_runs(capsys, tmp_path, runs):
    out = tmp_path / "out.png"
    text = fails(capsys, "sample", tmp_path, "--out", out)
    assert "is not the workdir of a run" in text
    for name, message in (
        ("rae_decoder", "not of 'latent_diffusion'"),
        ("ldae", "denoises and does not generate"),
    ):
        assert message in fails(capsys, "sample", runs / name, "--out", out)
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    options = ("--workdir", runs / "ldae", "--out", tmp_path)
    assert "not of 'rae_decoder'" in fails(capsys, "reconstruct", image, *options)
    (tmp_path / "empty").mkdir()
    text = fails(capsys, "evaluate", tmp_path / "empty")
    assert "is not the workdir of a run" in text
    text = fails(capsys, "evaluate", runs / "latent_stats")
    assert "'latent_stats' have nothing to evaluate" in text


# ---- train


def test_training_continues_where_it_stopped(capsys, tmp_path):
    argv = ["train", "--config", SMOKE, "--workdir", str(tmp_path / "run")]
    argv += ["--config.mesh.data=1", "--config.every.evaluate=0"]
    succeeds(*argv, "--config.num_steps=2")
    assert capsys.readouterr().out.endswith(f"Finished: {tmp_path / 'run'}\n")
    succeeds(*argv, "--config.num_steps=3")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    changed = fails(capsys, *argv, "--config.seed=1")
    assert "seed: 42 -> 1" in changed


# ---- sample


def sample(runs, out, *options):
    arguments = ("--num-samples", 6, "--batch-size", 4, "--out", out)
    succeeds("sample", runs / "latent_diffusion", *arguments, *options)


def test_samples_as_array_picture_and_folder(capsys, runs, tmp_path):
    """The same images each time; labels by name, by number, and mixed."""
    chosen = ("--labels", "class 3, 7", "--seed", 5)
    sample(runs, tmp_path / "new" / "a.npz", *chosen)
    assert "6 images" in capsys.readouterr().out
    with np.load(tmp_path / "new" / "a.npz") as data:
        pixels, labels = data["arr_0"], data["labels"]
    assert pixels.shape == (6, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [3, 7, 3, 7, 3, 7]

    sample(runs, tmp_path / "folder", *chosen)
    files = sorted((tmp_path / "folder").glob("*.png"))
    found = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_array_equal(found, pixels)
    classes = json.loads((tmp_path / "folder" / "labels.json").read_text())
    assert classes == {file.name: y for file, y in zip(files, labels, strict=True)}

    sample(runs, tmp_path / "grid.png", *chosen)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(grid[4:68:2, 4:68:2], pixels[0])

    sample(runs, tmp_path / "all.npz", "--guidance-scale", 2.0)
    with np.load(tmp_path / "all.npz") as data:
        assert sorted(data["labels"]) == [0, 1, 2, 3, 4, 5]


def test_unknown_classes_are_named(capsys, runs, tmp_path):
    def error(*options):
        out = ("--out", tmp_path / "a.png")
        return fails(capsys, "sample", runs / "latent_diffusion", *out, *options)

    text = error("--labels", "class 3,clas 4")
    assert "Unknown class 'clas 4'. Did you mean 'class 4'?" in text
    assert "Unknown class '10'" in error("--labels", "10")
    assert "must be at least 1" in error("--num-samples", "0")
    assert not list(tmp_path.iterdir())


# ---- reconstruct


def odd_images(folder):
    """Grey, transparent, wide and tiny images, one in a subfolder."""
    rng = np.random.default_rng(0)
    (folder / "deeper").mkdir(parents=True)
    shapes = {
        "grey.png": (40, 40),
        "alpha.png": (40, 30, 4),
        "wide.jpg": (24, 90, 3),
        "deeper/tiny.png": (5, 7, 3),
        "grey.bmp": (64, 64, 3),
    }
    for name, shape in shapes.items():
        pixels = rng.integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")


def test_reconstructions_of_odd_images(capsys, runs, tmp_path):
    odd_images(tmp_path / "in")
    out = tmp_path / "out"
    options = ("--workdir", runs / "rae_decoder", "--batch-size", 2)
    succeeds("reconstruct", tmp_path / "in", *options, "--out", out)
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("grey_png.png", "alpha_png.png", "wide_jpg.png", "tiny_png.png"),
        *("grey_bmp.png", "scores.json"),
    }
    text = capsys.readouterr().out
    assert text.count("PSNR") == 5 and "5 reconstructions" in text
    row = np.asarray(Image.open(out / "grey_png.png"))
    assert row.shape == (32 + 4, 3 * 32 + 8, 3)
    shown, recon = row[2:34, 2:34], row[2:34, 36:68]
    assert (shown[..., 0] == shown[..., 1]).all() and shown.std() > 10
    errors = pictures.error_map(shown[None], recon[None])[0]
    np.testing.assert_array_equal(row[2:34, 70:102], errors)
    scores = json.loads((out / "scores.json").read_text())
    found = scores["images"][str(tmp_path / "in" / "grey.png")]
    psnr = -10 * np.log10(np.mean((shown / 255.0 - recon / 255.0) ** 2))
    assert abs(found["psnr"] - psnr) < 1e-3 and found["lpips_vgg"] > 0
    assert len(scores["images"]) == 5 and scores["mean"].keys() == found.keys()

    wide = tmp_path / "in" / "wide.jpg"
    succeeds("reconstruct", wide, *options, "--out", tmp_path / "one")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"wide_jpg.png", "scores.json"}
    alone = (tmp_path / "one" / "wide_jpg.png").read_bytes()
    assert alone == (out / "wide_jpg.png").read_bytes()


def test_reconstruct_says_what_it_cannot_read(capsys, runs, tmp_path):
    def error(path):
        options = ("--workdir", runs / "rae_decoder", "--out", tmp_path / "out")
        return fails(capsys, "reconstruct", path, *options)

    (tmp_path / "empty").mkdir()
    assert "no image there" in error(tmp_path / "empty")
    assert "no image there" in error(tmp_path / "gone")
    assert images.EXTENSIONS[0] in error(tmp_path / "gone")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert "Cannot read" in error(broken)


# ---- evaluate


def evaluate(runs, name, *options):
    succeeds("evaluate", runs / name, *options)
    return json.loads((runs / name / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("ldae", {"denoised_psnr", "denoised_ssim"}),
        ("probe", {"top1_encoder"}),
        ("rae_decoder", {"psnr", "ssim", "lpips_alex", "lpips_vgg"}),
    ],
)
def test_evaluation_of_runs_with_scores(capsys, runs, name, scores):
    found = evaluate(runs, name)
    assert scores <= set(found)
    assert np.isfinite(list(found.values())).all()
    table = capsys.readouterr().out
    assert all(score in table for score in scores)
    if name == "rae_decoder":
        assert found["num_images"] == 12


@pytest.mark.slow
def test_evaluation_of_samples(runs):
    options = ("--num-samples", 8, "--num-reference", 24, "--batch-size", 8)
    found = evaluate(runs, "latent_diffusion", *options, "--guidance-scale", 2.0)
    sets = ("samples", "guided", "untrained", "real_train", "real_validation")
    for name in sets:
        assert found[f"fd_efflite0_{name}"] > 0
    assert found["fd_efflite0_real_train"] < found["fd_efflite0_untrained"]
    assert found["num_samples"] == 8 and found["num_reference"] == 24
    assert found["guidance_scale"] == 2.0
    for name in ("samples.png", "samples_guided.png", "strip.png"):
        assert (runs / "latent_diffusion" / name).is_file()
