"""The quickstart report shows what is there, says what is missing, stands alone."""

import html.parser
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from rae_jax import config as configs
from rae_jax import main
from rae_jax.evaluation import pictures
from rae_jax.reporting import charts, folder, markup, numbers, page, tiles

CLASSES = ["astronaut", "<b>cat</b> & dog"]
METRICS = {
    "seconds": {"ldae": 61.0, "probe": 3.25, "evaluation": 59.0},
    "peak_memory_gb": 4.83,
    "versions": {"jax": "0.10", "python": "3.12"},
    "device": "cpu x 1",
    "classes": CLASSES,
    "denoising": {"denoised_psnr": 20.03, "denoised_ssim": 0.497},
    "probe": {"top1_encoder": 0.78, "top1_random": 0.55, "top1_pixels": 0.80},
    "reconstruction": {"psnr": 20.714, "ssim": 0.55, "lpips_alex": 0.29},
    "generation": {
        "fd_efflite0_samples": 70.0,
        "fd_efflite0_guided": 62.0,
        "fd_efflite0_untrained": 400.0,
        "fd_efflite0_real_train": 10.0,
        "fd_efflite0_real_validation": 84.0,
        "num_samples": 1000,
        "num_reference": 4000,
        "guidance_scale": 1.5,
    },
}


def save_sheet(path, rows, columns, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (rows, columns, 8, 8, 3))
    pictures.save_rows(path, list(images.astype(np.uint8)))
    return images


def save_stage(path, name):
    config = {"num_steps": 40, "data": {"batch_size": 32}, "<i>key</i>": "a & b"}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    lines = [{"step": s, "loss": 9.0 / s} for s in range(1, 41, 3)]
    lines += [{"step": 40, "psnr": 12.5, "ssim": 0.3, "lpips_alex": 0.4}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"step": 4')  # Cut by a kill.


@pytest.fixture
def complete(tmp_path):
    workdir = tmp_path / "run"
    for name in folder.STAGES:
        save_stage(workdir / name, name)
    for name in ("samples.png", "samples_guided.png", "real.png"):
        save_sheet(workdir / name, rows=2, columns=3)
    save_sheet(workdir / "reconstructions.png", rows=2, columns=4)
    save_sheet(workdir / "strip.png", rows=3, columns=5)
    save_sheet(workdir / "ldae" / "denoising.png", rows=3, columns=4)
    (workdir / "metrics.json").write_text(json.dumps(METRICS))
    return workdir


class Balance(html.parser.HTMLParser):
    """Collects attributes and fails on tags that do not match."""

    VOID = {"meta", "link", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(text):
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    return parser


def visible(text):
    return re.sub(r"data:image/[^\"]*", "", text)


def test_complete_folder(complete, capsys):
    assert main.main(["report", str(complete)]) == 0
    path = complete / "report.html"
    assert str(path) in capsys.readouterr().out
    text = visible(path.read_text(encoding="utf-8"))
    parser = parse(text)
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.tags.count("img") == 3 * 2 * 3 + 2 * 4 + 3 * 5 + 3 * 4
    assert parser.tags.count("svg") == 4 + 3
    assert parser.tags.count("details") == 5
    assert 'class="missing"' not in text
    for value in ("20.71", "78.0\u00a0%", "4.8", "2 min 3 s", "scale 1.5", "0.10"):
        assert value in text
    assert "bash launch/quickstart.sh" in text
    assert not list(complete.glob(".*")), "a partial file was left"


def test_page_needs_nothing_else(complete):
    text = visible(page.render(folder.read(complete)))
    assert not re.search(r"https?:|@import|@font-face|<script|url\((?!#)", text)
    parser = parse(text)
    for tag, name, value in parser.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            local = value.startswith(("#", "data:")) or (tag == "img" and not value)
            assert local, f"{tag} {name}={value}"
    anchors = [v for t, n, v in parser.attributes if (t, n) == ("a", "href")]
    assert {v.removeprefix("#") for v in anchors} <= set(parser.ids)


def test_text_is_escaped(complete):
    text = page.render(folder.read(complete))
    assert "<b>cat</b>" not in text and "<i>key</i>" not in text
    assert "&lt;b&gt;cat&lt;/b&gt; &amp; dog" in text
    assert "&lt;i&gt;key&lt;/i&gt;" in text


def test_incomplete_folder_names_what_is_missing(tmp_path):
    save_stage(tmp_path / "ldae", "ldae")
    save_sheet(tmp_path / "real.png", rows=2, columns=3)
    out = tmp_path / "elsewhere" / "page.html"
    assert main.main(["report", str(tmp_path), "--out", str(out)]) == 0
    text = visible(out.read_text(encoding="utf-8"))
    assert parse(text).tags.count("img") == 2 * 3
    notice = text[text.index("This run is incomplete") :].split("</p>")[0]
    for name in ("metrics.json", "strip.png", "probe/config.json"):
        assert name in notice
    assert "real.png" not in notice and "ldae/config.json" not in notice
    assert not re.search(r"\bNone\b|\bnan\b", text)


@pytest.mark.parametrize("kept", ["metrics.json", "strip.png", "probe"])
def test_any_single_part_is_enough(complete, kept, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (complete / kept).rename(part / kept)
    parse(visible(page.render(folder.read(part))))


def test_missing_folder(tmp_path, capsys):
    with pytest.raises(configs.ConfigError, match=r"absent.*launch/quickstart\.sh"):
        folder.read(tmp_path / "absent")
    with pytest.raises(configs.ConfigError, match="holds nothing of a quickstart"):
        folder.read(tmp_path)
    assert main.main(["report", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["metrics.json", "real.png"])
def test_damaged_file_is_named(complete, name):
    (complete / name).write_bytes(b"{half")
    with pytest.raises(configs.ConfigError, match=name):
        page.write(complete, complete / "report.html")
    assert not (complete / "report.html").exists()


def test_sheets_are_cut_into_their_images(tmp_path):
    images = save_sheet(tmp_path / "a.png", rows=3, columns=4)
    images[0, 0, :, 0] = 255  # A white edge is no gap.
    images[:, 1] = 0
    rows = [images[0], images[1, :2], images[2]]
    pictures.save_rows(tmp_path / "a.png", [row.astype(np.uint8) for row in rows])
    found = tiles.cut(tiles.load(tmp_path / "a.png"))
    assert [len(row) for row in found] == [4, 2, 4]
    for row, expected in zip(found, rows, strict=True):
        for tile, image in zip(row, expected, strict=True):
            np.testing.assert_array_equal(tile[::2, ::2], image)


def test_other_pictures_are_shown_whole(complete):
    noise = np.random.default_rng(0).integers(0, 255, (30, 50, 3)).astype(np.uint8)
    assert tiles.cut(noise) is None
    for name in ("samples.png", "strip.png", "reconstructions.png"):
        Image.fromarray(noise).save(complete / name)
    text = visible(page.render(folder.read(complete)))
    assert parse(text).tags.count("img") == 3 + 1 + 1 + 3 * 4


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (
            dict(encoder=0.78, random=0.55, pca=0.75, pixels=0.80),
            "The encoder (78.0\u00a0%) clearly beats the random encoder (55.0\u00a0%); "
            "it narrowly beats patch PCA (75.0\u00a0%); "
            "it does not beat raw pixels (80.0\u00a0%).",
        ),
        (
            dict(encoder=0.5, random=0.505),
            "The encoder (50.0\u00a0%) is level with the random encoder (50.5\u00a0%).",
        ),
        (dict(pixels=0.5), "The accuracy of the encoder is not known."),
    ],
)
def test_probe_sentence_is_honest(scores, expected):
    assert numbers.probe_sentence(scores) == expected


def test_frechet_sentence_is_honest():
    scores = dict(samples=70.0, guided=62.0, real_train=10.0, untrained=410.0)
    text = numbers.frechet_sentence(scores)
    assert "closed 85 %" in text and "Guidance lowers" in text
    scores |= dict(samples=500.0, guided=600.0)
    text = numbers.frechet_sentence(scores)
    assert "no closer" in text and "Guidance does not lower" in text
    assert numbers.frechet_sentence({}) == ""


def test_charts_follow_the_page_and_leave_pyplot_alone():
    import matplotlib

    before, loaded = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    steps = list(range(20))
    lines = [charts.Line(name, steps, [float("nan"), *range(1, 20)]) for name in "abcd"]
    svg = charts.line_chart("x", lines, size=(4, 2), smooth=True)
    assert matplotlib.rcParams.copy() == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert {f"var(--c{i})" for i in range(1, 5)} <= set(
        re.findall(r"var\(--c\d\)", svg)
    )
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that is no variable"
    assert svg == charts.line_chart("x", lines, size=(4, 2), smooth=True)
    with pytest.raises(ValueError, match="5 curves"):
        charts.line_chart("x", [*lines, lines[0]], size=(4, 2), smooth=True)


def test_logarithmic_axis_only_for_a_wide_positive_range():
    assert charts.is_log(np.array([0.1, 1.0]))
    assert not charts.is_log(np.array([0.5, 1.0]))
    assert not charts.is_log(np.array([0.0, 1.0]))
    assert not charts.is_log(np.array([]))


def test_smoothing_keeps_level_and_lowers_noise():
    noise = np.random.default_rng(0).normal(size=200)
    np.testing.assert_allclose(charts.smoothed(np.full(50, 3.0)), 3.0, rtol=1e-12)
    assert charts.smoothed(noise).std() < 0.5 * noise.std()


def test_unfinished_stage_shows_both_counts(complete):
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (10, 20)]
    (complete / "probe" / "metrics.jsonl").write_text("\n".join(lines))
    assert "20 of 40" in numbers.stages(folder.read(complete))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(403.27, "403"), (68.41, "68.4"), (0.01234, "0.0123"), (0, "0"), (None, "–")],
)
def test_numbers_have_three_digits(value, expected):
    assert markup.significant(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(6.42, "6.4 s"), (31.2, "31 s"), (119.7, "2 min 0 s"), (3725, "1 h 2 min")],
)
def test_durations(seconds, expected):
    assert markup.duration(seconds) == expected
