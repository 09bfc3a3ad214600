"""The runs that repeat the l-DAE paper's orderings, and the script that makes them."""

import launch_clone
import pytest
from test_configs import load

from rae_jax import config as configs
from rae_jax.reporting import (
    ldae_encoders,
    ldae_orderings,
    ldae_rows,
    ldae_runs,
    ldae_scores,
)
from rae_jax.trainers import registry


def test_variants_are_rows_made_smaller_alike():
    module = configs.load_module("configs/ldae_claims.py")
    assert {
        row for pair in ldae_orderings.PAIRS for row in (pair.better, pair.worse)
    } - {*module.ROWS} == {"t1_no_cls", "t1_dit_baseline", "t1_linear_g2", "t1_no_adv"}
    for tier in module.STEPS:
        found = {row: load(f"ldae_claims:{row}_{tier}") for row in module.PRETRAINED}
        first = found[module.PRETRAINED[0]]
        for row, config in found.items():
            assert (config.row, config.tier) == (row, f"{tier}-short")
            same = ("data", "optimizer", "num_steps", "ema_decay", "encoder_depth")
            assert all(config[key] == first[key] for key in same)
            assert config.model.hidden_size == 96 and config.model.depth == 6
            registry.design(config)
        dims = [found[f"t2_ppca_d{d}"].tokenizer.latent_dim for d in (8, 32, 128)]
        assert (
            dims == sorted(dims) and found["f5_pix_256_p16"].tokenizer.name == "pixels"
        )


def test_probes_read_every_block_and_the_paper_s_times():
    for tier in ("digits", "photos"):
        depth = load(f"ldae_claims:t3_orig_image_{tier}").model.depth
        probe = load(f"ldae_claims:probe_{tier}")
        assert probe.sweep.blocks == tuple(range(1, depth + 1)) and probe.encoder.match
        times = load(f"ldae_claims:probe_times_{tier}")
        paper = {t.time for t in ldae_rows.TABLES[8].entries}
        for config in (probe, times):
            registry.design(config)
        assert set(times.sweep.times) == paper and times.sweep.noisy == (False, True)
        row = load(f"ldae_claims:t3_orig_image_{tier}")
        assert configs.changes(row.data, probe.data).keys() == {"batch_size"}


@pytest.mark.parametrize("stage", ["decoder", "stats", "dit_dh"])
def test_stages_behind_encoders_differ_in_them_alone(stage):
    module = configs.load_module("configs/ldae_claims.py")
    names = module.STAGES[stage][1]
    found = {e: load(f"ldae_claims:{stage}_{e}") for e in names}
    kinds = [ldae_encoders.kind(configs.flatten(c)) for c in found.values()]
    expected = [ldae_encoders.LDAE, ldae_encoders.RANDOM, ldae_encoders.PIXELS]
    assert kinds == expected[: len(names)]
    for config in found.values():
        registry.design(config)
        changed = configs.changes(found["ldae"], config)
        allowed = ("encoder", "decoder", "latent_stats")
        assert all(key.split(".")[0] in allowed for key in changed)


def test_the_script_trains_what_is_not_finished_then_reports(tmp_path):
    clone = launch_clone.Clone(tmp_path)
    workdir = tmp_path / "my claims"
    done = workdir / "digits-seed1" / "t2_ppca_d8"
    done.mkdir(parents=True)
    (done / registry.FINISHED_NAME).write_text("1")
    result = clone.run("ldae_claims.sh", f"--workdir={workdir}", "--seeds", "1 2")
    assert result.returncode == 0, result.stderr
    calls = [line.split("][") for line in result.stdout.split("[rae-jax][")[1:]]
    assert calls.pop()[:4] == ["report", "--table", "ldae", f"{workdir}"]
    trained = [call for call in calls if call[0] == "train"]
    measured = [call for call in calls if call[0] == "evaluate"]
    # Per seed and tier ten rows, a probe each and one more; nine runs for encoders.
    assert len(trained) == 2 * (2 * 21 + 9) - 1 and len(measured) == 2 * 6
    for call in trained:
        variant = call[2].split("/configs/")[1].replace(".py:", ":")
        seed = call[4].split("seed")[1].split("/")[0]
        assert call[5].rstrip("]") == f"--config.seed={seed}"
        assert load(variant).trainer in registry.TRAINERS
    names = [call[4].removeprefix(f"{workdir}/") for call in trained]
    assert names.index("rae-seed1/ldae") < names.index("rae-seed1/stats_ldae")


# The clearest of the orderings


@pytest.mark.slow
@pytest.mark.optimised
def test_noise_on_pixels_teaches_less_than_noise_on_components(tmp_path):
    """Section 4.2, shorter still: accuracies of about 60 and 45 per cent."""
    small = ("model.hidden_size=64", "model.depth=4", "encoder_depth=2", "mesh.data=1")
    steps = ("num_steps=250", "optimizer.warmup_steps=60")
    found = {}
    for row in ("t2_ppca_d32", "f5_pix_256_p16"):
        registry.train(
            load(f"ldae_claims:{row}_digits", *small, *steps), tmp_path / row
        )
        probe = load(
            "ldae_claims:probe_digits",
            f"encoder.weights=../{row}",
            "sweep.blocks=(2,)",
            "features=('encoder',)",
            "num_steps=100",
            "mesh.data=1",
        )
        registry.train(probe, tmp_path / f"{row}-probe")
    for run in ldae_runs.find([tmp_path]):
        entry = ldae_rows.Entry("", run.row, None)
        found[run.row] = ldae_scores.of(run, ldae_rows.PROBE, entry).value
    assert found["t2_ppca_d32"] > found["f5_pix_256_p16"] + 8, found
