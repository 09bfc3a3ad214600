"""`rae-jax prepare`: shards, packed arrays, bad files, resuming."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_jax.commands import prepare
from rae_jax.data import images, loader, records, shards, sources, transforms

ROOT = Path(__file__).parents[1]


def picture(height, width, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


def save(path, pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for k, name in enumerate(("ant", "bee", "cow")):
        (root / name).mkdir(parents=True)
        for j in range(5):
            save(root / name / f"{j}.png", picture(40 + j, 50, 10 * k + j))
    return root


def run(*words):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(word) for word in words]))


def refuses(capsys, *words):
    """Returns the message with which the verb ends."""
    assert run(*words) == 1
    return capsys.readouterr().err


def test_shards_hold_the_folder_unchanged(folder, tmp_path):
    out = tmp_path / "out"
    assert run(folder, out, "--shards", 4, "--workers", 1) == 0
    source = sources.make_source("class_folder", path=folder)
    shards = sources.make_source("array_record", path=out)
    assert shards.class_names == source.class_names == ("ant", "bee", "cow")
    assert len(shards) == len(source) == 15
    for i in range(15):
        assert shards[i]["image"] == source[i]["image"]
        assert shards[i]["label"] == source[i]["label"]
        assert shards[i]["name"] == source.name(i)
    names = [*records.shard_names(4), records.METADATA]
    assert sorted(os.listdir(out)) == sorted(names)


def test_workers_write_the_same_bytes(folder, tmp_path):
    for workers in (1, 2):
        words = ("--shards", 3, "--size", 16, "--transform", "center_crop")
        assert run(folder, tmp_path / str(workers), *words, "--workers", workers) == 0
    for name in (*records.shard_names(3), records.METADATA):
        first, second = ((tmp_path / k / name).read_bytes() for k in ("1", "2"))
        assert first == second


def test_png_crops_equal_crops_of_the_files(folder, tmp_path):
    words = ("--size", 24, "--transform", "center_crop", "--png", "--workers", 1)
    assert run(folder, tmp_path / "out", *words) == 0
    shards = sources.ArrayRecords(tmp_path / "out")
    source = sources.ClassFolder(folder)
    for crop in ("none", "center_crop"):
        transform = transforms.make_transform(crop, 24)
        (batch,) = loader.eval_batches(shards, transform, batch_size=15)
        reference = transforms.make_transform("center_crop", 24)
        (expected,) = loader.eval_batches(source, reference, batch_size=15)
        for key in ("image", "label", "index"):
            np.testing.assert_array_equal(batch[key], expected[key])


def test_resizing_reduces_the_shorter_side_and_never_enlarges(folder, tmp_path):
    save(folder / "ant" / "0.png", picture(20, 90, 0))
    assert run(folder, tmp_path / "out", "--size", 24, "--workers", 1) == 0
    shards = sources.ArrayRecords(tmp_path / "out")
    assert images.decode(shards[0]["image"]).shape == (20, 90, 3)
    assert images.decode(shards[1]["image"]).shape == (24, 29, 3)  # int(24 * 50 / 41)
    assert shards[1]["image"][:3] == b"\xff\xd8\xff"  # JPEG


def test_quality_changes_the_size_of_files(folder, tmp_path):
    sizes = []
    for quality in (30, 95):
        out = tmp_path / str(quality)
        assert run(folder, out, "--size", 24, "--quality", quality, "--workers", 1) == 0
        shards = sources.ArrayRecords(out)
        sizes.append(sum(len(shards[i]["image"]) for i in range(15)))
    assert sizes[0] < 0.8 * sizes[1]


def test_flat_folders_and_a_glob_of_shards(folder, tmp_path):
    out = tmp_path / "out"
    assert run(folder / "bee", out, "--shards", 3, "--workers", 1) == 0
    shards = sources.make_source("array_record", path=out / "*-00001-*")
    assert shards.class_names == ("image",)
    # Five images in three shards: 0-1, 2, 3-4 after rounding the bounds.
    assert [shards[i]["name"] for i in range(len(shards))] == ["2.png"]
    with pytest.raises(ValueError, match="names none of the 3 shards"):
        sources.ArrayRecords(out / "*-00007-*")


def add_bad_files(folder):
    (folder / "ant" / "empty.jpg").write_bytes(b"")
    whole = (folder / "bee" / "1.png").read_bytes()
    (folder / "bee" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cow" / "text.webp").write_text("no image")
    return ["ant/empty.jpg", "bee/half.png", "cow/text.webp"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_file_stops_with_its_name(folder, tmp_path, capsys, workers):
    add_bad_files(folder)
    error = refuses(capsys, folder, tmp_path / "out", "--workers", workers)
    assert "empty.jpg: the file is empty" in error and "--skip-bad" in error
    assert len(error.splitlines()) == 1
    with pytest.raises(ValueError, match="no metadata.json"):
        sources.ArrayRecords(tmp_path / "out")


def test_skip_bad_counts_and_lists_and_continues_a_stopped_run(
    folder, tmp_path, capsys
):
    bad = add_bad_files(folder)
    out = tmp_path / "out"
    assert run(folder, out, "--shards", 3, "--workers", 1) == 1
    assert run(folder, out, "--shards", 3, "--workers", 1, "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert "15 images in" in printed and "Skipped 3 files" in printed
    metadata = json.loads((out / records.METADATA).read_text())
    assert metadata["num_images"] == len(sources.ArrayRecords(out)) == 15
    for name, line in zip(bad, metadata["skipped"], strict=True):
        assert line.startswith(f"{name}: ") and line in printed


def test_only_bad_files_is_an_error(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    for out in ("out", "out.npz"):
        words = ("--size", 8, "--skip-bad", "--workers", 1)
        error = refuses(capsys, tmp_path / "images", tmp_path / out, *words)
        assert "None of the 1 images could be read" in error


def test_finished_shards_are_kept_and_partial_ones_rewritten(folder, tmp_path, capsys):
    """The state in which a killed run leaves the folder, made by hand."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ("--shards", 3, "--workers", 1)
    assert run(folder, whole, *words) == 0
    (folder / "cow" / "0.png").rename(folder / "kept")
    (folder / "cow" / "0.png").write_bytes(b"")
    assert run(folder, out, *words) == 1
    names = records.shard_names(3)
    stamps = {name: (out / name).stat().st_mtime_ns for name in names[:2]}
    assert not (out / names[2]).exists()
    (out / f"{names[2]}.partial").write_bytes(b"half a shard")
    (folder / "kept").rename(folder / "cow" / "0.png")
    assert run(folder, out, *words) == 0
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in names[:2]}
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    # Once complete, nothing is written any more; other options are refused.
    assert run(folder, out, *words) == 0
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in names[:2]}
    assert "other size" in refuses(capsys, folder, out, *words, "--size", 8)


def test_a_killed_run_is_finished_by_the_next(tmp_path):
    """SIGKILL in the middle of real work by two processes."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for k in range(60):
        save(folder / f"{k:02d}.png", picture(300, 300, k))
    words = ["--size", "290", "--png", "--shards", "20", "--workers", "2"]
    program = """
import argparse
from rae_jax.commands import prepare
parser = argparse.ArgumentParser()
prepare.add_arguments(parser)
raise SystemExit(prepare.run(parser.parse_args()))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(out), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("*.array_record")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # Until its workers, too, have noticed and ended.
    finished = {path: path.read_bytes() for path in out.glob("*.array_record")}
    assert finished and not (out / records.METADATA).exists()
    assert run(folder, out, *words[:-1], "1") == 0
    assert len(sources.ArrayRecords(out)) == 60
    assert not (out / "unfinished").exists() and not list(out.glob("*.partial"))
    assert all(path.read_bytes() == content for path, content in finished.items())
    source, shards = sources.FlatFolder(folder), sources.ArrayRecords(out)
    for k in (0, 31, 59):
        expected = transforms.resize_shorter(images.decode(source[k]["image"]), 290)
        np.testing.assert_array_equal(images.decode(shards[k]["image"]), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_packed_crops_are_in_order(folder, tmp_path, workers):
    out = tmp_path / "reference.npz"
    assert run(folder, "--pack", out, "--size", 24, "--workers", workers) == 0
    source = sources.ClassFolder(folder)
    packed = np.load(out)["arr_0"]
    assert packed.shape == (15, 24, 24, 3) and packed.dtype == np.uint8
    for k in range(15):
        pixels = images.decode(source[k]["image"])
        np.testing.assert_array_equal(packed[k], transforms.center_crop(pixels, 24))
    assert sorted(os.listdir(tmp_path)) == ["images", "reference.npz"]


def test_packing_skips_bad_files_and_stops_at_the_limit(folder, tmp_path, capsys):
    add_bad_files(folder)
    out = tmp_path / "reference.npz"
    assert "empty.jpg" in refuses(capsys, folder, out, "--size", 8, "--workers", 1)
    assert os.listdir(tmp_path) == ["images"]
    words = ("--size", 8, "--workers", 1, "--skip-bad")
    assert run(folder, out, *words) == 0
    assert np.load(out)["arr_0"].shape[0] == 15
    assert "Skipped 3 files" in capsys.readouterr().out
    assert run(folder, out, *words, "--limit", 7) == 0
    assert np.load(out)["arr_0"].shape[0] == 6


def test_unusable_arguments_are_explained(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert "needs --size" in refuses(capsys, folder, out, "--transform", "center_crop")
    assert "needs --size" in refuses(capsys, folder, tmp_path / "out.npz")
    assert "either a destination" in refuses(capsys, folder)
    assert "writes an .npz" in refuses(capsys, folder, "--pack", out, "--size", 8)
    assert "--quality must be" in refuses(capsys, folder, out, "--quality", 101)
    with pytest.raises(SystemExit):
        run(folder, out, "--workers", 0)
    assert "--workers: invalid" in capsys.readouterr().err
    assert "--limit belongs" in refuses(capsys, folder, out, "--limit", 3)
    assert "does not exist" in refuses(capsys, tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "folder is empty" in refuses(capsys, tmp_path / "empty", out)
    assert "'flat_folder'" in refuses(capsys, folder / "ant", out, "--layout", "class")
    assert not out.exists()


def test_unwritable_destination_is_explained(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refuses(capsys, folder, tmp_path / "file" / "out", "--workers", 1)
    assert "cannot read or write" in error and "file" in error


@pytest.mark.parametrize("out", ["out", "out.npz"])
def test_full_disk_is_explained_and_leaves_no_result(folder, tmp_path, out):
    """A limit on the size of files stands in for a full disk."""
    program = f"""
import argparse, resource
from rae_jax.commands import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
parser = argparse.ArgumentParser()
prepare.add_arguments(parser)
words = [{str(folder)!r}, {str(tmp_path / out)!r}, "--size", "36", "--workers", "1"]
raise SystemExit(prepare.run(parser.parse_args(words)))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot read or write" in done.stderr and "too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.npz").exists()
    assert not list(tmp_path.glob("out/*.array_record"))


def test_shards_that_do_not_match_their_metadata_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    assert run(folder, out, "--shards", 2, "--workers", 1) == 0
    first, second = records.shard_names(2)
    content = (out / second).read_bytes()
    (out / second).write_bytes((out / first).read_bytes())
    with pytest.raises(ValueError, match="16 records, but metadata.json counts 15"):
        sources.ArrayRecords(out)
    (out / second).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        sources.ArrayRecords(out)
    (out / second).unlink()
    with pytest.raises(ValueError, match=f"lacks '{second}'"):
        sources.ArrayRecords(out)
    (out / records.METADATA).write_text("{")
    with pytest.raises(ValueError, match="metadata.json is damaged"):
        sources.ArrayRecords(out)


def test_default_number_of_shards_grows_with_the_images():
    assert shards.shard_count(10) == 1
    assert shards.shard_count(1_281_167) == 626
    assert shards.shard_count(10**8) == 1024
    assert shards.shard_count(3, asked=5) == 3
