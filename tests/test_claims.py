"""The table of the paper's claims, its runs, and the theorem that they repeat."""

import json
import shutil

import launch_clone
import numpy as np
import pytest
from test_configs import load

from rae_jax import config as configs
from rae_jax import main
from rae_jax.data import latents
from rae_jax.evaluation import extractors, features
from rae_jax.reporting import claim_runs, claims
from rae_jax.trainers import claims as measuring
from rae_jax.trainers import inputs, latent_network, registry
from rae_jax.training import logs

SEEDS = (42, 7)


def save_run(path, *, width=240, losses=(0.5,), seed=42, num_steps=100, scores=None):
    """Writes the log of a finished run; the last loss fills its last tenth."""
    path.mkdir(parents=True)
    config = {
        "seed": seed,
        "num_steps": num_steps,
        "encoder": {"sizes": {"hidden_size": 128}},
        "model": {"hidden_size": width},
    }
    (path / "config.json").write_text(json.dumps(config))
    steps = range(10, num_steps + 1, 10)
    losses = [1.0] * (len(steps) - len(losses)) + list(losses)
    lines = [{"step": s, "loss": x} for s, x in zip(steps, losses, strict=True)]
    lines.append({"step": num_steps, "sample_std": 0.2})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    if scores is not None:
        content = json.dumps({"num_steps": num_steps} | scores)
        (path / claim_runs.SCORES_NAME).write_text(content)
    return path


def save_seeds(folder, variant, values):
    """Writes a run per seed, all scores of which are one value."""
    for number, (seed, value) in enumerate(zip(SEEDS, values, strict=True)):
        curves = {name: [value, value] for name in ("psnr", "lpips_alex")}
        scores = dict.fromkeys(claims.DISTANCES, value)
        scores |= {"curves": curves | {"sigma": [0.0, claims.SIGMA]}}
        name = variant if not number else f"{variant}-seed{seed}"
        save_run(folder / name, losses=(value,), seed=seed, scores=scores)


def rows_of(folder, text):
    found = [row for row in claims.table(folder) if text in row.claim]
    assert found, text
    return found


# Runs


def test_variants_are_those_of_the_table():
    module = configs.load_module("configs/claims.py")
    assert set(module.VARIANTS) - {"smoke"} == set(claim_runs.VARIANTS)
    for width in claim_runs.WIDTHS:
        config = load(f"claims:width_{width}")
        assert config.model.hidden_size == width and config.data.limit == 1
        assert config.encoder.sizes.hidden_size == claim_runs.TOKENS


@pytest.mark.parametrize(
    ("variant", "recipe", "keys"),
    [
        ("dit_dh", "dit_dh", set()),
        ("no_shift", "dit_dh", {"flow.shift_base"}),
        ("paper_shift", "dit_dh", {"flow.shift_base"}),
        ("dit", "dit", {"model.hidden_size"}),
        ("decoder_clean", "rae_decoder", {"noise.tau", "gan.weight"}),
        ("decoder_noisy", "rae_decoder", {"noise.tau", "gan.weight"}),
    ],
)
def test_a_variant_changes_one_thing_of_a_recipe(variant, recipe, keys):
    found = configs.changes(load(f"{recipe}:photos"), load(f"claims:{variant}"))
    assert found.keys() - {"decoder", "every.evaluate"} == keys


def test_compared_runs_are_equal_otherwise():
    def changes(a, b):
        pair = [load(f"claims:{name}") for name in (a, b)]
        return {key for key in configs.changes(*pair) if "sampling" not in key}

    assert changes("decoder_clean", "decoder_noisy") == {"noise.tau"}
    networks = changes("dit_dh", "dit")
    assert {key for key in networks if not key.startswith("model.")} == {"network"}
    flops = [registry.model_flops(load(f"claims:{v}")) for v in ("dit_dh", "dit")]
    assert 0.9 < flops[0] / flops[1] < 1.1
    shifts = {
        v: latent_network.time_shift(load(f"claims:{v}"))
        for v in ("no_shift", "paper_shift", "dit_dh")
    }
    np.testing.assert_allclose(list(shifts.values()), [1, 2**0.5, 5], rtol=1e-3)


def test_a_limit_leaves_one_training_image():
    data = load("claims:smoke", "data.batch_size=4").data
    assert len(inputs.open_source(data, "train")) == 1
    assert len(inputs.open_source(data, "validation")) > 1
    with inputs.train_batches(data, seed=0) as batches:
        batch = next(batches)
        later = next(batches)["image"]
    assert set(batch["index"]) == {0}
    # Mirrored or not, every row shows the same pixels.
    totals = np.concatenate([batch["image"], later]).sum(axis=(1, 2, 3))
    assert len(set(totals.tolist())) == 1
    everything = load("claims:smoke", "data.limit=0").data
    assert len(inputs.open_source(everything, "train")) > 1
    with pytest.raises(configs.ConfigError, match="negative, got -1"):
        inputs.open_source(load("claims:smoke", "data.limit=-1").data, "train")


def test_a_limit_below_the_cached_latents_is_an_error(monkeypatch):
    monkeypatch.setattr(latents, "Latents", lambda folder: [0, 1, 2])
    data = load("claims:smoke", "data.latents=cached").data
    with pytest.raises(configs.ConfigError, match="data.limit = 1, but cached .* 3"):
        inputs.train_source(data)
    assert (
        len(
            inputs.train_source(
                load("claims:smoke", "data.latents=cached", "data.limit=3").data
            )
        )
        == 3
    )


# Table


@pytest.mark.parametrize(
    ("width", "losses", "holds"),
    [
        (64, (0.52, 0.51), "yes"),
        (64, (0.52, 0.56), "no"),  # One seed has not come down.
        (64, (0.499, 0.5), "yes"),  # Finitely many samples.
        (64, (0.48, 0.52), "no"),  # Nothing may be below the floor.
        (96, (0.27, 0.26), "yes"),
        (96, (0.27, 0.28), "no"),
        (48, (0.65, 0.65), "yes"),
        (128, (0.03, 0.04), "yes"),
        (128, (0.03, 0.2), "no"),
    ],
)
def test_width_rows_compare_with_the_floor(tmp_path, width, losses, holds):
    for seed, loss in zip(SEEDS, losses, strict=True):
        name = f"width_{width}" + ("" if seed == SEEDS[0] else f"-seed{seed}")
        save_run(tmp_path / name, width=width, losses=(loss,), seed=seed)
    (row,) = rows_of(tmp_path, f"width {width} of 128")
    assert (row.holds, row.seeds, row.missing) == (holds, SEEDS, ())
    assert row.measured == f"loss {losses[0]:g}, {losses[1]:g}"


def test_floors_are_those_of_the_theorem():
    found = [claims.floor(width, 128) for width in claim_runs.WIDTHS]
    assert found == [0.625, 0.5, 0.25, 0, 0]


def test_the_final_loss_is_that_of_the_last_tenth(tmp_path):
    save_run(tmp_path / "width_64", losses=(9.0, 0.3, 0.5), num_steps=200)
    (run,) = claim_runs.find(tmp_path)
    assert run.final_loss() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("shifted", "plain", "holds"),
    [
        ((10, 11), (12, 13), "yes"),
        ((12, 13), (10, 11), "no"),
        ((10, 12.5), (12, 13), "unclear"),
        ((12, 12), (12, 12), "unclear"),
    ],
)
def test_comparisons_hold_if_all_seeds_agree(tmp_path, shifted, plain, holds):
    save_seeds(tmp_path, "dit_dh", shifted)
    save_seeds(tmp_path, "no_shift", plain)
    found = {row.expected: row for row in rows_of(tmp_path, "4.2")}
    row = found["fd_efflite0: chosen < none"]
    assert (row.holds, row.seeds) == (holds, SEEDS)
    assert row.measured.startswith(f"chosen {shifted[0]:g}, {shifted[1]:g}; none")
    assert found["fd_tokens: chosen < none"].holds == holds
    assert found["fd_tokens: formula < none"].holds == "not run"


def test_higher_is_better_where_it_is(tmp_path):
    save_seeds(tmp_path, "decoder_noisy", (20, 21))
    save_seeds(tmp_path, "decoder_clean", (10, 11))
    found = {row.expected: row.holds for row in rows_of(tmp_path, "4.3")}
    assert found["PSNR: noisy > clean"] == "yes"
    assert found["LPIPS: noisy < clean"] == "no"
    assert found["PSNR: clean > noisy"] == "no"
    assert found["LPIPS: clean < noisy"] == "yes"
    assert found["fd_efflite0: noisy < clean"] == "not run"
    assert found["fd_efflite0: clean < noisy"] == "not run"
    decoded = {"decoded": {"decoder_noisy": 5.0, "decoder_clean": 6.0}}
    save_run(tmp_path / "dit_dh", scores=decoded)
    row, other = rows_of(tmp_path, "samples")
    assert (row.holds, row.measured) == ("yes", "noisy 5; clean 6")
    assert other.holds == "not run"


@pytest.mark.parametrize(("noise", "holds"), [(100.0, "yes"), (11.0, "unclear")])
def test_a_distance_that_is_blind_to_noise_decides_nothing(tmp_path, noise, holds):
    save_seeds(tmp_path, "dit_dh", (10, 10.1))
    save_seeds(tmp_path, "dit", (12, 12.1))
    scales = {"scales": {"fd_tokens_noise": noise}}
    save_run(tmp_path / "no_shift", scores=scales)
    found = {row.expected: row.holds for row in rows_of(tmp_path, "5: wide head")}
    assert found["fd_tokens: DiT-DH < DiT"] == holds
    assert found["final loss: DiT-DH < DiT"] == "yes"


def test_what_is_missing_comes_with_its_command(tmp_path):
    folder = tmp_path / "my claims"
    save_run(folder / "width_64", width=64, losses=(0.5,))
    unfinished = save_run(folder / "width_96", width=96)
    text = (unfinished / "metrics.jsonl").read_text().splitlines()[0]
    (unfinished / "metrics.jsonl").write_text(text + '\n{"step": 2')
    save_run(folder / "dit", scores={"num_steps": 99})  # Of a shorter run.
    save_run(folder / "dit_dh")
    save_run(folder / "another")
    rows = claims.table(folder)
    lines = claims.missing(rows)
    train = "rae-jax train --config configs/claims.py:width_96 --workdir "
    assert f"{train}'{folder}/width_96'" in lines
    assert f"rae-jax report --table claims --measure '{folder}'" in lines
    assert not [line for line in lines if "width_64" in line or "dit" in line]
    assert len(lines) == len(set(lines))
    not_run = [row for row in rows if row.holds == "not run"]
    assert all(row.missing and not row.measured for row in not_run)


def test_report_prints_and_writes_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    scales = {f"{d}_{end}": 3.5 for d in claims.SCALES for end in ("real", "noise")}
    save_run(tmp_path / "width_64", width=64, losses=(0.515,))
    save_run(tmp_path / "dit", scores={"scales": scales, "fd_tokens": 2.0})
    assert main.main(["report", "--table", "claims", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "loss 0.515" in shown and "0.500 to 0.550" in shown
    assert "fd_tokens (tokens of latents): real crops 3.5, noise 3.5" in shown
    assert f"claims.py:width_48 --workdir {tmp_path / 'width_48'}\n" in shown
    stored = json.loads((tmp_path / claims.TABLE_NAME).read_text())
    assert stored["scales"] == scales
    assert stored["rows"][1]["holds"] == "yes"
    assert len(stored["rows"]) == len(claims.table(tmp_path))
    assert (tmp_path / claims.PLOT_NAME).read_bytes().startswith(b"\x89PNG")


def test_wrong_calls_are_explained(tmp_path, capsys):
    def error(*argv):
        assert main.main(["report", *argv]) == 1
        return capsys.readouterr().err

    folder, claim = str(tmp_path), ("--table", "claims")
    assert "No folder" in error(*claim, str(tmp_path / "none"))
    assert "Give one WORKDIR, not 2" in error(*claim, folder, folder)
    assert "Give one WORKDIR, not 2" in error(folder, folder)
    assert "--measure: only with --table claims" in error("--measure", folder)
    assert "--out: only for the page" in error(*claim, folder, "--out", "x.html")
    run = save_run(tmp_path / "dit")
    (run / "config.json").write_text("{")
    assert "dit/config.json' is not JSON" in error(*claim, folder)


# Measurements


def mean_colors(batch_size=64, **options):
    """A feature network that costs nothing: colours of the image's quarters."""

    def quarters(params, images):
        b, h, w, c = images.shape
        x = images.reshape(b, 2, h // 2, 2, w // 2, c).astype(np.float32)
        return {extractors.POOL: x.mean(axis=(2, 4)).reshape(b, -1)}

    return extractors.Extractor("fd_efflite0", quarters, {}, batch_size=batch_size)


def test_measuring_scores_every_finished_run_once(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "make_efflite0", mean_colors)
    for name in ("ldae", "latent_stats", "rae_decoder"):
        (tmp_path / name).symlink_to(runs / name)
    shutil.copytree(runs / "rae_decoder", tmp_path / "decoder_noisy")
    shutil.copytree(runs / "latent_diffusion", tmp_path / "dit_dh")
    save_run(tmp_path / "width_64", width=64)
    notes = []
    measuring.measure(tmp_path, num_samples=16, batch_size=8, note=notes.append)
    assert notes == ["decoder_noisy: latents with noise", "dit_dh: 16 samples"]
    found = {run.variant: run.scores for run in claim_runs.find(tmp_path)}
    assert not found["width_64"]
    curves = found["decoder_noisy"]["curves"]
    assert {0.0, claims.SIGMA} <= set(curves["sigma"])
    assert {"psnr", "lpips_alex", "fd_efflite0"} <= curves.keys()
    assert curves["psnr"][0] >= curves["psnr"][-1] - 1
    scores = found["dit_dh"]
    # The decoder of its config is the one that is compared.
    np.testing.assert_allclose(
        scores["decoded"]["decoder_noisy"], scores["fd_efflite0"], rtol=1e-4
    )
    assert scores["encoded"]["decoder_noisy"] > 0
    scales = scores["scales"]
    assert scales["fd_tokens_real"] < 0.2 * scales["fd_tokens_noise"]
    assert scales["fd_efflite0_real"] < scales["fd_efflite0_noise"]
    assert 0 < scores["fd_tokens"] < 2 * scales["fd_tokens_noise"]
    assert scores["gflops_per_step"] > 0

    measuring.measure(tmp_path, num_samples=16, batch_size=8, note=notes.append)
    assert len(notes) == 2
    shutil.copytree(tmp_path / "decoder_noisy", tmp_path / "decoder_clean")
    measuring.measure(tmp_path, num_samples=16, batch_size=8, note=notes.append)
    assert notes[2:] == ["dit_dh: 16 samples"]


# Script


def test_the_script_trains_what_is_not_finished_then_reports(tmp_path):
    clone = launch_clone.Clone(tmp_path)
    workdir = tmp_path / "my claims"
    for name in ("ldae", "dit-seed2"):
        (workdir / name).mkdir(parents=True)
        (workdir / name / registry.FINISHED_NAME).write_text("1")
    result = clone.run("claims.sh", f"--workdir={workdir}", "--seeds", "1 2")
    assert result.returncode == 0, result.stderr
    calls = [line.split("][") for line in result.stdout.split("[rae-jax][")[1:]]
    assert calls.pop() == ["report", "--table", "claims", "--measure", f"{workdir}]"]
    names = [call[4].removeprefix(f"{workdir}/").rstrip("]") for call in calls]
    both = [name + end for end in ("", "-seed2") for name in claim_runs.VARIANTS]
    assert sorted(names) == sorted({"latent_stats", *both} - {"dit-seed2"})
    # What others need comes first.
    assert names.index("latent_stats") == 0 and names.index("decoder_noisy") == 1
    for name, call in zip(names[1:], calls[1:], strict=True):
        variant, _, seed = name.partition("-seed")
        assert call[2].endswith(f"/configs/claims.py:{variant}")
        assert call[5:] == [f"--config.seed={seed or 1}]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds"], "--seeds needs a value"),
        (["--seeds", "1,2"], "--seeds must be numbers"),
        (["--steps=3"], "unknown argument --steps=3"),
    ],
)
@pytest.mark.parametrize("script", ["claims.sh", "ldae_claims.sh"])
def test_scripts_refuse_what_they_do_not_know(tmp_path, script, arguments, message):
    result = launch_clone.Clone(tmp_path).run(script, *arguments)
    assert result.returncode == 1 and message in result.stderr


# Theorem


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("width", [16, 48])
def test_width_below_the_tokens_leaves_a_floor(tmp_path, width):
    """Tokens of 32: half the width leaves half the variance, more leaves nothing."""
    config = load(
        "claims:smoke",
        "mesh.data=1",
        "num_steps=1000",
        "every.checkpoint=1000",
        f"model.hidden_size={width}",
        "model.class_dropout_prob=0.0",
        "model.remat=none",
        "optimizer.name=muon",
        "optimizer.peak_lr=8e-3",
        "optimizer.final_lr=1e-4",
        "optimizer.schedule=cosine",
        "optimizer.warmup_steps=30",
        "data.flip=False",
        "flow.shift_base=20",
        "every.log=10",
    )
    registry.train(config, tmp_path)
    records = [r for r in logs.read_metrics(tmp_path) if "loss" in r]
    loss = np.mean([r["loss"] for r in records if r["step"] > 900])
    if width == 16:
        assert 0.99 * 0.5 <= loss <= 1.1 * 0.5
    else:
        assert loss < 0.02
