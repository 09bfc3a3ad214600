"""The tables of the l-DAE paper beside fabricated runs, and their orderings."""

import json

import pytest

from rae_jax import config as configs
from rae_jax import main
from rae_jax.reporting import ldae, ldae_orderings, ldae_rows, ldae_runs


def save_run(
    folder, row, *, tier="digits", seed=42, steps=400, depth=4, dim=32, **more
):
    """Writes what a pre-training run leaves behind."""
    path = folder / f"{row}-{tier}-seed{seed}"
    path.mkdir(parents=True)
    config = {
        "trainer": "ldae",
        "row": row,
        "tier": tier,
        "seed": seed,
        "num_steps": 400,
        "encoder_depth": depth // 2,
        "data": {"source": "synthetic", "path": "", "batch_size": 256, "limit": 512},
        "tokenizer": {"latent_dim": dim},
        "model": {"depth": depth, "hidden_size": 96},
    }
    (path / "config.json").write_text(json.dumps(config | more))
    (path / "metrics.jsonl").write_text(f'{{"step": {steps}, "loss": 1}}\n{{"st')
    return path


def head(top1, *, block=2, t=10, noisy=False, lr=0.1):
    return dict(block=block, t=t, noisy=noisy, lr=lr, optimizer="lars", top1=top1)


def save_probe(run, *heads, name="probe", encoder=None, row="t3_orig_image"):
    path = run.parent / f"{name}-{run.name}"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"trainer": "probe", "seed": 7}))
    content = {
        "row": row,
        "tier": "digits",
        "encoder": str(encoder or f"../{run.name}"),
        "heads": {f"head{i}": h for i, h in enumerate(heads)},
        "best": "head0",
    }
    (path / "probe.json").write_text(json.dumps(content))
    return path


def save_pair(folder, row, values, **options):
    """Writes a run per seed with the accuracy of its probe."""
    for seed, top1 in zip((42, 7), values, strict=True):
        save_probe(save_run(folder, row, seed=seed, **options), head(top1))


def lines(folder, table, row):
    found = ldae.tables(ldae_runs.find([folder]))[table]
    return [line for line in found if line.row == row]


def orderings(folder):
    found = ldae_orderings.rows([folder], ldae_runs.find([folder]))
    return {row.claim: row for row in found}


# The paper's figures


def test_every_printed_figure_is_there():
    tables = {table.name: table.entries for table in ldae_rows.TABLES}
    counts = {name: len(entries) for name, entries in tables.items()}
    assert counts == {
        "table_1": 5,
        "table_1_fid": 5,
        "table_2": 5 + 4 + 4 + 5,
        "figure_5": 4,
        "table_3": 7,
        "section_5": 6,
        "table_4": 6,
        "appendix_b": 6,
        "appendix_a_times": 10,
        "appendix_a_blocks": 7,
        "extras": 14,
    }
    figures = {e.row: e.paper for e in tables["table_2"]}
    # The paper goes from the best of one tokenizer to the best of the next.
    assert figures["t2_pvae_d16"] == 64.9 and figures["t2_ppca_d32"] == 65.1
    for first, second in ldae_rows.SAME_RUN.items():
        values = {e.paper for t in tables.values() for e in t if e.row == second}
        assert ldae_rows.ACCURACIES[first] in values
    assert ldae_rows.ACCURACIES["t3_orig_image"] == 64.5


def test_rows_without_runs_are_blank(tmp_path):
    for table in ldae.tables(ldae_runs.find([tmp_path])).values():
        assert all(not line.values and not line.tier for line in table)
    assert not orderings(tmp_path)
    (line,) = lines(tmp_path, "table_3", "x_single_sigma")
    assert line.cells()[:6] == ("one noise level", "x_single_sigma", "61.5", "", "", "")


# Runs


def test_a_row_has_a_line_per_tier_with_mean_and_spread(tmp_path):
    save_pair(tmp_path, "t2_ppca_d32", (0.80, 0.84), dim=16)
    run = save_run(tmp_path, "t2_ppca_d32", tier="paper", steps=100, depth=24)
    save_probe(run, head(0.65, block=12))
    paper, digits = lines(tmp_path, "table_2", "t2_ppca_d32")
    assert (paper.tier, paper.cells()[3], paper.remark) == ("paper", "65.0", "")
    assert digits.cells()[3] == "82.0 ± 2.8"
    assert digits.seeds == (42, 7) and "d = 16" in digits.remark
    # 400 steps of 256 of 512 images; the one cut short has a quarter of it.
    assert (digits.cells()[4], paper.cells()[4]) == ("200", "50")
    # The same run is printed as the first of table 3.
    again = lines(tmp_path, "table_3", "t3_pca_baseline")
    assert [line.values for line in again] == [paper.values, digits.values]


def test_the_protocol_chooses_the_head(tmp_path):
    run = save_run(tmp_path, "t3_orig_image", depth=24)
    heads = [
        head(0.60, block=12),
        head(0.62, block=12, lr=1.0),
        head(0.90, block=11),
        head(0.91, block=12, t=20),
        head(0.92, block=12, noisy=True),
        head(0.99, block=12) | {"features": "pixels"},
    ]
    save_probe(run, *heads)
    (line,) = lines(tmp_path, "table_3", "t3_orig_image")
    assert line.values == (62.0,)
    times = {
        line.label: line.values
        for line in ldae.tables(ldae_runs.find([tmp_path]))["appendix_a_times"]
    }
    assert times["t = 10, noisy input"] == (92.0,)
    assert times["t = 20, clean input"] == (91.0,) and times["t = 0, clean input"] == ()
    found = ldae.tables(ldae_runs.find([tmp_path]))["appendix_a_blocks"]
    blocks = {line.label: line.values for line in found}
    assert blocks["block 11 of 24"] == (90.0,) and blocks["block 9 of 24"] == ()


def test_table_4_takes_the_best_head_and_appendix_b_the_fine_tuning(tmp_path):
    run = save_run(tmp_path, "t4_ldae_b", tier="paper")
    save_probe(run, head(0.60), head(0.66, t=40, noisy=True))
    save_probe(run, head(0.64, t=20), name="again")
    tuned = tmp_path / "finetune"
    tuned.mkdir()
    (tuned / "config.json").write_text('{"trainer": "finetune"}')
    content = {"encoder": str(run), "top1": 0.83, "ema_top1": 0.84}
    (tuned / "finetune.json").write_text(json.dumps(content))
    (line,) = lines(tmp_path, "table_4", "t4_ldae_b")
    assert line.values == (pytest.approx(65.0),)  # The mean of two probes of one run.
    (line,) = lines(tmp_path, "appendix_b", "t4_ldae_b")
    assert line.values == (pytest.approx(84.0),)


def test_a_baseline_has_no_time(tmp_path):
    run = save_run(tmp_path, "t4_mae_b", trainer="mae", encoder_depth=12)
    save_probe(run, head(0.5, block=None, t=None) | {"noisy": False})
    (line,) = lines(tmp_path, "table_4", "t4_mae_b")
    assert line.values == (50.0,)


def test_distances_that_are_no_fid_are_named(tmp_path):
    for row, scores in (
        ("t1_no_cls", {"gfid": 33.25}),
        ("t1_no_perc", {"fd_efflite0": 80.0}),
    ):
        run = save_run(tmp_path, row)
        (run / "generation.json").write_text(json.dumps(scores))
    assert lines(tmp_path, "table_1_fid", "t1_no_cls")[0].cells()[3] == "33.2"
    named = lines(tmp_path, "table_1_fid", "t1_no_perc")[0].cells()[3]
    assert named == "80.0 (fd_efflite0)"


def test_other_depths_have_lines_of_their_own(tmp_path):
    run = save_run(tmp_path, "t3_orig_image", depth=4)
    save_probe(run, *(head(0.1 * k, block=k) for k in (1, 2, 3, 4)))
    found = ldae.tables(ldae_runs.find([tmp_path]))["appendix_a_blocks"]
    values = {line.label: line.values for line in found if line.values}
    assert list(values) == [f"block {k} of 4" for k in (1, 2, 3, 4)]
    assert {line.paper for line in found if line.values} == {None}


def test_a_probe_is_told_apart_from_its_run(tmp_path):
    """Only the probe's folder is given; then only its file is left."""
    run = save_run(tmp_path / "a", "t3_orig_image")
    probe = save_probe(run, head(0.7), encoder=run)
    (found,) = ldae_runs.find([probe])
    assert (found.path, found.seed) == (run.resolve(), 42)
    for file in run.iterdir():
        file.unlink()
    (found,) = ldae_runs.find([probe])
    assert (found.row, found.seed, found.epochs()) == ("t3_orig_image", 7, None)
    assert len(ldae_runs.find([tmp_path, probe, tmp_path / "a"])) == 1


def test_steps_stand_where_the_data_is_not_here(tmp_path):
    data = {"source": "array_record", "path": "gone", "batch_size": 8}
    save_probe(save_run(tmp_path, "t3_orig_image", data=data), head(0.5))
    (line,) = lines(tmp_path, "table_3", "t3_orig_image")
    assert line.cells()[4] == "400 steps"


# Orderings


@pytest.mark.parametrize(
    ("better", "worse", "holds"),
    [
        ((0.7, 0.8), (0.5, 0.69), "yes"),
        ((0.5, 0.6), (0.61, 0.7), "no"),
        ((0.5, 0.7), (0.6, 0.8), "unclear"),
        ((0.5, 0.5), (0.5, 0.5), "unclear"),
    ],
)
def test_pairs_need_all_seeds(tmp_path, better, worse, holds):
    save_pair(tmp_path, "t3_orig_image", better)
    save_pair(tmp_path, "x_single_sigma", worse)
    row = orderings(tmp_path)["many noise levels above one"]
    assert (row.holds, row.seeds, row.paper) == (holds, (42, 7), "64.5 / 61.5")


@pytest.mark.parametrize(
    ("middle", "holds"),
    [((0.8, 0.81), "yes"), ((0.4, 0.41), "no"), ((0.4, 0.7), "unclear")],
)
def test_the_best_dimension_is_within(tmp_path, middle, holds):
    for dim, values in ((8, (0.5, 0.6)), (32, middle), (128, (0.55, 0.6))):
        save_pair(tmp_path, f"t2_ppca_d{dim}", values, dim=dim // 2)
    row = orderings(tmp_path)["inverted U over d: patch PCA"]
    assert row.holds == holds and row.measured.startswith("d 4: 50.0, 60.0; d 16")


@pytest.mark.parametrize(
    ("size", "rows", "holds"),
    [
        (10_000, ("t3_orig_image", "x_single_sigma"), "yes"),
        (100, ("t3_orig_image", "x_single_sigma"), "unclear"),
        (100, ("t2_ppca_d32", "x_ppca_cls"), "yes"),  # As good will do.
        (100, ("x_ppca_cls", "t2_ppca_d32"), "yes"),
        (10_000, ("x_ppca_cls", "t2_ppca_d32"), "no"),
    ],
)
def test_differences_count_beyond_the_error(tmp_path, size, rows, holds):
    data = {"source": "synthetic", "batch_size": 8, "validation_size": size}
    for row, value in zip(rows, (0.72, 0.7), strict=True):
        save_pair(tmp_path, row, (value, value), data=data)
    (row,) = orderings(tmp_path).values()
    assert row.holds == holds


@pytest.mark.parametrize(
    ("best", "holds"), [((2, 2), "yes"), ((1, 2), "unclear"), ((4, 4), "no")]
)
def test_the_probe_peaks_in_the_middle(tmp_path, best, holds):
    for seed, peak in zip((42, 7), best, strict=True):
        run = save_run(tmp_path, "t3_orig_image", seed=seed)
        heads = [head(0.9 if k == peak else 0.5, block=k) for k in (1, 2, 3, 4)]
        save_probe(run, *heads, head(0.95, noisy=True))
    found = orderings(tmp_path)
    assert found["probe peaks at the middle block"].holds == holds
    assert found["noisy probe inputs above clean ones, best times"].seeds == (42, 7)


def test_encoders_of_rae_are_told_by_their_config(tmp_path):
    for trainer, scores in (
        ("rae_decoder", ({"lpips_alex": 0.2}, {"lpips_alex": 0.3})),
        ("latent_diffusion", ({"fd_efflite0_samples": 9}, {"fd_efflite0_samples": 8})),
    ):
        for weights, score in zip(("../ldae", "random"), scores, strict=True):
            path = tmp_path / f"{trainer}_{weights[-4:]}"
            path.mkdir()
            encoder = {"name": "ldae", "weights": weights}
            config = {"trainer": trainer, "seed": 1, "encoder": encoder}
            (path / "config.json").write_text(json.dumps(config))
            (path / "evaluation.json").write_text(json.dumps(score))
    found = {row.expected: row.holds for row in orderings(tmp_path).values()}
    assert found == {
        "LPIPS: l-DAE < random": "yes",
        "fd_efflite0: l-DAE < random": "no",
    }
    # A distance that is no smaller than that of an untrained network decides nothing.
    score = {"fd_efflite0_samples": 9, "fd_efflite0_untrained": 8}
    for path in tmp_path.glob("latent_diffusion_*"):
        (path / "evaluation.json").write_text(json.dumps(score))
    row = orderings(tmp_path)["l-DAE as RAE encoder, generation: better than random"]
    assert row.holds == "unclear" and row.measured == "9; 9; untrained 8"


# The command


def test_report_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    save_pair(tmp_path / "runs", "t3_orig_image", (0.70, 0.71))
    save_pair(tmp_path / "more", "x_single_sigma", (0.60, 0.61))
    folders = [str(tmp_path / "runs"), str(tmp_path / "more")]
    for name in ("out.md", "out.json"):
        out = str(tmp_path / name)
        assert main.main(["report", "--table", "ldae", *folders, "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "70.5 ± 0.7" in shown and "Appendix B: fine-tuning" in shown
    text = (tmp_path / "out.md").read_text()
    assert "| one noise level | x_single_sigma | 61.5 | 60.5 ± 0.7 | 200 |" in text
    assert "| yes |" in text.split("## Orderings")[1]
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["orderings"][0]["holds"] == "yes"
    (line,) = [x for x in stored["tables"]["table_3"] if x["row"] == "x_single_sigma"]
    assert line["values"] == [61.0, 60.0] or line["values"] == [60.0, 61.0]
    assert line["paper"] == 61.5


def test_wrong_calls_are_explained(tmp_path, capsys):
    def error(*argv):
        assert main.main(["report", "--table", "ldae", *map(str, argv)]) == 1
        return capsys.readouterr().err

    assert "No folder" in error(tmp_path / "none")
    assert "must end in .md or .json" in error(tmp_path, "--out", "x.html")
    assert "--measure: only with --table claims" in error(tmp_path, "--measure")
    run = save_run(tmp_path, "t3_orig_image")
    (run / "config.json").write_text("{")
    assert "config.json' is not JSON" in error(tmp_path)
    with pytest.raises(configs.ConfigError, match="JSON object"):
        (run / "config.json").write_text("[]")
        ldae_runs.find([tmp_path])
