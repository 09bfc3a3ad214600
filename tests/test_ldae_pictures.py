"""Pictures of an l-DAE run, from its checkpoint to its page."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from rae_jax import main
from rae_jax.evaluation import latent_noise
from rae_jax.models import tokenizers
from rae_jax.reporting import folder, ldae_page, ldae_sheets, page, tiles
from rae_jax.trainers import ldae_pictures


@pytest.fixture(scope="module")
def run(runs, tmp_path_factory):
    """A copy of a trained l-DAE whose pictures are drawn."""
    path = tmp_path_factory.mktemp("pictures") / "ldae"
    shutil.copytree(runs / "ldae", path)
    assert ldae_pictures.draw(path)
    return path


def random_pca(size=4, latent_dim=6):
    """A patch PCA with a random orthonormal basis and a scale that is not one."""
    dim = 3 * size**2
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0].astype(np.float32)
    mean = rng.normal(size=dim).astype(np.float32) / 10
    scale = np.full(latent_dim, 0.3, np.float32)
    return tokenizers.PatchPCA(mean, basis, scale, latent_dim, size)


def test_both_noises_have_the_same_energy_but_another_place():
    pca = random_pca()
    images = np.random.default_rng(1).uniform(size=(16, 32, 32, 3)).astype(np.float32)
    key = jax.random.key(0)
    on_pixels, on_latents = latent_noise.side_by_side(pca, images, 0.5, key)
    clean = (pca.decode(pca.encode(2 * images - 1)) + 1) / 2
    of_pixels, of_latents = on_pixels - images, on_latents - clean
    deviations = [float(np.std(noise)) for noise in (of_pixels, of_latents)]
    np.testing.assert_allclose(*deviations, rtol=0.02)
    # 0.5 of the scale in 6 of 48 directions, and pixels in [0, 1] are half as far.
    np.testing.assert_allclose(
        deviations[1], 0.5 * 0.3 * (6 / 48) ** 0.5 / 2, rtol=0.05
    )
    inside = pca.decode(pca.encode(2 * on_latents - 1))
    np.testing.assert_allclose(inside, 2 * on_latents - 1, atol=1e-5)
    inside = pca.decode(pca.encode(2 * on_pixels - 1))
    assert np.std(inside - (2 * on_pixels - 1)) > 0.1


def test_patterns_are_the_rows_of_the_basis():
    pca = random_pca()
    found = latent_noise.patterns(pca, 4)
    assert found.shape == (4, 4, 4, 3)
    rows = np.asarray(found).reshape(4, -1) - 0.5
    expected = pca.basis[:4] / np.abs(pca.basis[:4]).max(axis=1, keepdims=True) / 2
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert len(latent_noise.patterns(pca, 100)) == pca.latent_dim


def test_a_run_has_all_sheets_with_a_label_per_row(run):
    found = ldae_sheets.read(run)
    assert found["tokenizer"] == "pca" and found["step"] > 0
    for name in (ldae_sheets.NOISE, ldae_sheets.PATTERNS, ldae_sheets.DENOISED):
        sheet = tiles.cut(tiles.load(run / name))
        assert sheet is not None and len(sheet) == len(found["labels"][name])
    noise = tiles.cut(tiles.load(run / ldae_sheets.NOISE))
    images = np.stack(noise[0]).astype(float)
    errors = [np.abs(np.stack(row) - images).mean() for row in noise[1:]]
    assert errors[0] < errors[2] < errors[4] and errors[1] < errors[3] < errors[5]


def test_pictures_are_drawn_once_per_checkpoint(run, monkeypatch):
    path = run / ldae_sheets.NOISE
    before = path.stat().st_mtime_ns
    assert ldae_pictures.draw(run)
    assert path.stat().st_mtime_ns == before
    labels = run / ldae_sheets.LABELS_NAME
    kept = labels.read_text()
    labels.write_text(json.dumps(json.loads(kept) | {"step": 1}))
    assert ldae_pictures.draw(run)
    assert path.stat().st_mtime_ns > before and labels.read_text() == kept
    assert not ldae_pictures.draw(run.parent)


def test_report_of_a_run_is_a_page_with_its_pictures(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main.main(["report", str(run), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    text = re.sub(r"data:image/[^\"]*", "", out.read_text(encoding="utf-8"))
    for title in ("Noise on latents and on pixels", "What spans the latents"):
        assert title in text
    assert "Denoised at several levels" in text and "<svg" in text
    assert "On latents, σ 0.58" in text and "Not drawn" not in text
    assert not re.search(r"https?:|<script", text)


def test_the_quickstart_page_shows_them_too(run):
    (run.parent / "real.png").write_bytes((run / ldae_sheets.NOISE).read_bytes())
    text = page.render(folder.read(run.parent))
    assert "What spans the latents" in text


def test_a_run_without_checkpoint_has_a_page(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert ldae_page.is_run(tmp_path)
    assert main.main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not drawn" in text and "No log yet" in text


def test_images_that_are_gone_are_a_warning(run, tmp_path, capsys):
    path = tmp_path / "ldae"
    shutil.copytree(run, path)
    (path / ldae_sheets.LABELS_NAME).unlink()
    config = json.loads((path / "config.json").read_text())
    config["data"] |= {"source": "class_folder", "path": "gone"}
    (path / "config.json").write_text(json.dumps(config))
    assert main.main(["report", str(path)]) == 0
    assert "No pictures of" in capsys.readouterr().err


def test_a_sheet_that_cannot_be_cut_is_shown_whole(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / ldae_sheets.NOISE)
    labels = {"labels": {ldae_sheets.NOISE: ["a", "b"]}, "tokenizer": "pca"}
    (tmp_path / ldae_sheets.LABELS_NAME).write_text(json.dumps(labels))
    text = ldae_sheets.all_parts(tmp_path)
    assert text.count("<img") == 1 and "Rows from above: a, b" in text
