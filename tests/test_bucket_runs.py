"""Runs whose workdir is in a bucket: written, resumed, repaired, moved and read."""

import shutil

import numpy as np
import pytest
import toy_run
from toy_run import assert_equal, train

from rae_jax import copies, main, storage
from rae_jax.training import best, buckets, checkpoints, logs, spool

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::pytest.PytestUn{name}ExceptionWarning")
    for name in ("handledThread", "raisable")
]
COMMITTED = "commit_success.txt"


@pytest.fixture
def workdir(bucket):
    return storage.path(bucket) / "runs" / "toy"


def steps(workdir):
    return sorted(map(int, storage.names_in(workdir / "checkpoints")[0]))


def test_a_run_goes_on_in_a_bucket_as_on_a_disk(workdir, tmp_path):
    """Bitwise; and its log has every step once, TensorBoard's events beside it."""
    train(workdir)
    assert storage.is_bucket(workdir) and steps(workdir) == [1, 2, 3]
    found = train(workdir, config=dict(num_steps=6))
    wanted = train(tmp_path, config=dict(num_steps=6))
    assert_equal(found, wanted)
    records = logs.read_metrics(workdir)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    keys = ("loss", "grad_norm")
    for a, b in zip(records, logs.read_metrics(tmp_path), strict=True):
        assert [a[k] for k in keys] == [b[k] for k in keys]
    assert len(storage.names_in(workdir / "tensorboard")[1]) == 2
    stored = checkpoints.load_params(workdir)
    np.testing.assert_array_equal(stored["kernel"], found.ema_params["kernel"])


def test_old_checkpoints_are_removed(workdir):
    train(workdir, config=dict(keep=1))
    assert steps(workdir) == [3]


def test_a_damaged_checkpoint_is_named_and_passed_over(workdir, trained, capsys):
    train(workdir)
    data = workdir / "checkpoints" / "3" / "state"
    names = [n for n in storage.files_below(data) if "d/" in n and n[0] in "do"]
    for name in names:
        content = bytearray((data / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        storage.write_atomically(data / name, bytes(content))
    assert_equal(train(workdir), trained[1])
    assert f"{workdir}/checkpoints/3' cannot be read" in capsys.readouterr().err
    assert storage.names_in(workdir / "damaged")[0] == ["3"]
    assert steps(workdir) == [1, 2, 3]


def test_a_half_written_checkpoint_does_not_count(workdir, trained):
    """As a kill leaves it: all may be there but the file that says so."""
    train(workdir)
    storage.remove(workdir / "checkpoints" / "3" / COMMITTED)
    assert checkpoints.finished_step(workdir) == 2
    assert_equal(train(workdir), trained[1])
    assert checkpoints.finished_step(workdir) == 3


def test_a_run_may_move_into_a_bucket_and_back(workdir, trained, tmp_path):
    storage.upload_tree(trained[0], workdir)
    assert checkpoints.finished_step(workdir) == 3
    found = train(workdir, config=dict(num_steps=4))
    assert steps(workdir) == [1, 2, 3, 4]
    shutil.copytree(copies.local(workdir), tmp_path / "back")
    assert_equal(train(tmp_path / "back", config=dict(num_steps=4)), found)
    wanted = train(tmp_path / "disk", config=dict(num_steps=4))
    assert_equal(found, wanted)


def test_the_best_state_is_kept(workdir):
    config = toy_run.config(num_steps=3)
    scores = [3.0, 1.0, 2.0]
    final = train(workdir)
    kept = best.Best(workdir, config, "gfid_10k")
    for step, score in enumerate(scores, 1):
        kept.offer(step, final, {"gfid_10k": score}, {"batches": {}})
    kept.close()
    assert checkpoints.finished_step(best.folder(workdir)) == 2
    again = best.Best(workdir, config, "gfid_10k")
    assert again.record == {"metric": "gfid_10k", "value": 1.0, "step": 2}


def test_a_log_that_cannot_be_copied_stays(bucket, monkeypatch):
    def refuse(file, target):
        raise OSError(f"{target} cannot be written")

    log = spool.Spool(storage.path(bucket) / "run")
    (log.folder / "metrics.jsonl").write_text("1\n")
    log.grown()
    assert log.sync() == ""
    assert storage.files_below(storage.path(bucket) / "run") == ["metrics.jsonl"]
    (log.folder / "metrics.jsonl").write_text("1\n2\n")
    monkeypatch.setattr(storage, "upload", refuse)
    assert "metrics.jsonl cannot be written" in log.sync()
    problem = log.close()
    assert str(log.folder) in problem
    assert (log.folder / "metrics.jsonl").read_text() == "1\n2\n"
    shutil.rmtree(log.folder)


def test_orbax_that_cannot_be_taught_is_named(monkeypatch):
    monkeypatch.setattr(buckets, "_knows_s3", lambda: False)
    buckets._teach_s3.cache_clear()
    with pytest.raises(ValueError, match="orbax-checkpoint .* does not write to s3://"):
        buckets.prepare("s3://bucket/run")
    buckets._teach_s3.cache_clear()


def test_other_stores_are_reached_by_their_endpoint(monkeypatch):
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")
    for name in (*names, "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    amazon = {"driver": "s3", "bucket": "b", "path": "x/y", "aws_region": "eu-west-1"}
    assert buckets.s3_store("s3://b/x/y") == amazon
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    other = amazon | {"endpoint": "http://127.0.0.1:9"}
    assert buckets.s3_store("s3://b/x/y") == other


def test_runs_in_a_bucket_are_sampled_and_measured(runs, bucket, capsys):
    """Relative names in a config count from the workdir there too."""
    for name in ("ldae", "rae_decoder", "latent_stats", "latent_diffusion"):
        storage.upload_tree(runs / name, storage.path(bucket) / "runs" / name)
    words = ["sample", f"{bucket}/runs/latent_diffusion", "--num-samples", "4"]
    words += ["--batch-size", "4", "--guidance-scale", "1"]
    out = storage.path(bucket) / "samples.npz"
    assert main.main([*words, "--out", str(out)]) == 0
    local = ["sample", str(runs / "latent_diffusion"), *words[2:]]
    here = copies.cache() / "here.npz"
    assert main.main([*local, "--out", str(here)]) == 0
    with np.load(copies.local(out)) as a, np.load(here) as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    assert main.main([*words, "--out", str(out)]) == 0
    assert "4 were there" in capsys.readouterr().out
    folder = storage.path(bucket) / "images"
    assert main.main([*words, "--out", str(folder)]) == 0
    pngs = [n for n in storage.names_in(folder)[1] if n.endswith(".png")]
    assert pngs == [f"{i:06d}.png" for i in range(4)]
    again = [*words, "--seed", "7", "--out", str(folder)]
    assert main.main(again) == 1
    output = capsys.readouterr().err
    assert f"{folder} was begun with other settings" in output
    assert str(copies.cache()) not in output
    target = f"{bucket}/runs/latent_diffusion/network"
    words = ["convert", f"{bucket}/runs/latent_diffusion", target]
    assert main.main([*words, "--target", "rae_jax"]) == 0
    assert storage.names_in(storage.path(target))[1] == [
        "config.json",
        "model.safetensors",
    ]
