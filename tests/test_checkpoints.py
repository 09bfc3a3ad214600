"""Checkpoints that are damaged, cannot be written, or move to other machines."""

import json
import random
import re
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from toy_run import assert_equal, train

from rae_jax.layers import partition
from rae_jax.training import (
    checkpoints,
    integrity,
    loop,
    sharding,
)

TESTS = Path(__file__).parent
# Threads of Orbax that outlive a read or write which has failed.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::pytest.PytestUn{name}ExceptionWarning")
    for name in ("handledThread", "raisable")
]


# ---- Checksums


def example():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(8, 6, 5)).astype(np.float32),
        "b": np.arange(-3, 4, dtype=np.int32),
        "c": jnp.asarray(rng.normal(size=(16, 3)), jnp.bfloat16),
        "d": np.array([True, False]),
        "e": np.float32(np.nan),
    }


def test_checksum_is_the_same_on_the_host_and_however_devices_share():
    tree = example()
    expected = {k: integrity.of_host(np.asarray(x)) for k, x in tree.items()}
    for shape in ({"data": 1}, {"data": 8}, {"data": 2, "fsdp": 4}):
        mesh = sharding.make_mesh(shape)
        spec = jax.sharding.PartitionSpec(("data", "fsdp"))
        rows = jax.sharding.NamedSharding(mesh, spec)
        placed = {
            k: jax.device_put(x, rows if k in "ac" else sharding.replicated(mesh))
            for k, x in tree.items()
        }
        assert integrity.of_arrays(placed) == expected
        together = np.asarray(integrity._all_sums(placed)).tolist()  # Not on a CPU.
        assert together == list(expected.values())


def test_every_flipped_bit_and_swap_changes_the_checksum():
    x = example()["a"]
    right = integrity.of_host(x)
    raw, rng = x.tobytes(), random.Random(0)
    for _ in range(200):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        assert integrity.of_host(np.frombuffer(flipped, np.float32)) != right
    swapped = x.copy()
    swapped[0, 0, 0], swapped[0, 0, 1] = x[0, 0, 1], x[0, 0, 0]
    assert integrity.of_host(swapped) != right


# ---- Damaged checkpoints


def cut(folder, file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder, file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def delete(folder, file):
    file.unlink()


def delete_half(folder, file):
    shutil.rmtree(folder / "state")


def change_position(folder, file):
    path = folder / "data" / "metadata"
    path.write_text(path.read_text().replace('"position": 3', '"position": 2'))


@pytest.mark.parametrize("damage", [cut, flip, delete, delete_half, change_position])
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    run, trained, capsys, damage
):
    newest = checkpoints.folder(run) / "3"
    for file in sorted((newest / "state" / "d").iterdir()):
        damage(newest, file)
    if damage is not change_position:
        found = checkpoints.load_params(run, ("step",))
        assert found == 2
    assert_equal(train(run), trained[1])
    output = capsys.readouterr().err
    assert f"checkpoint {str(newest)!r} cannot be read" in output
    assert "The one of step 2 is used instead" in output
    assert (run / "damaged" / "3").is_dir()
    assert checkpoints.load_params(run, ("step",)) == 3


def test_arrays_that_changed_unnoticed_by_the_format_are_found(run, capsys):
    """Its files are consistent, but hold other numbers than were saved."""
    path = checkpoints.folder(run) / "3" / "data" / "metadata"
    data = json.loads(path.read_text())
    data["arrays"]["params/kernel"] ^= 1
    content = {key: data[key] for key in ("position", "arrays")}
    path.write_text(json.dumps(content | {"checksum": integrity.of_json(content)}))
    assert checkpoints.load_params(run, ("step",)) == 3  # Of another part.
    checkpoints.load_params(run, ("params",))
    train(run)
    output = capsys.readouterr().err
    found = re.findall(r"1 of (\d+) arrays have changed since .* as (\S+)", output)
    assert [name for _, name in found] == ["params/kernel"] * 2
    assert int(found[0][0]) == 2 and int(found[1][0]) > 6  # Those that were read.


def test_nothing_whole_is_an_error_and_moves_nothing(run):
    for folder in checkpoints.folder(run).iterdir():
        shutil.rmtree(folder / "state")
    for attempt in (train, checkpoints.load_params):
        with pytest.raises(checkpoints.CheckpointError, match="checkpoints/3.*cannot"):
            attempt(run)
    assert checkpoints.finished_step(run) == 3 and not (run / "damaged").exists()


def test_checkpoint_without_checksums_is_read(run, trained):
    """Of a version that kept none."""
    path = checkpoints.folder(run) / "3" / "data" / "metadata"
    position = json.loads(path.read_text())["position"]
    old = {key: position[key] for key in ("batches", "meter")}
    path.write_text(json.dumps(old))
    assert_equal(train(run), trained[1])


@pytest.mark.parametrize("process", [0, 1])
def test_processes_share_the_reading_before_they_restore(run, monkeypatch, process):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    reader = object.__new__(checkpoints.Checkpoints)
    reader._folder = checkpoints.folder(run)
    reader._verify_share(3)
    path = checkpoints.folder(run) / "3" / "data" / "metadata"
    data = json.loads(path.read_text())
    data["arrays"] = {key: value ^ 1 for key, value in data["arrays"].items()}
    path.write_text(json.dumps(data))
    with pytest.raises(checkpoints.CheckpointError, match="1 of 1 arrays have changed"):
        reader._verify_share(3)


def test_full_disk_stops_the_run_and_leaves_the_checkpoints(tmp_path):
    """A limit on the size of files stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def evaluate(state, frozen, workdir):
        if state.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        return {}

    config = toy_run.config(every=dict(log=0, checkpoint=1, evaluate=1))
    program = toy_run.program(config, evaluate=evaluate)
    message = r"cannot be written to '.*checkpoints': .*\nStep [12] is intact\. Make"
    try:
        with pytest.raises(checkpoints.CheckpointError, match=message):
            loop.run(program, config, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = {path.name for path in checkpoints.folder(tmp_path / "a").iterdir()}
    assert kept in ({"1"}, {"1", "2"})  # And no part of another.
    plain = toy_run.program(config, evaluate=lambda *_: {})
    final = loop.run(plain, config, tmp_path / "a")
    assert_equal(final, loop.run(plain, config, tmp_path / "b"))


# ---- Other machines, other configs


def test_state_moves_between_topologies(tmp_path, monkeypatch):
    """8 devices -> 4, fsdp -> data -> 1: what is read is what was written."""
    monkeypatch.setattr(partition, "MIN_SHARDED_SIZE", 2)
    meshes = [dict(data=2, fsdp=4), dict(fsdp=4, data=1), dict(data=8), dict(data=1)]
    for step, mesh in enumerate(meshes, start=1):
        config = toy_run.config(num_steps=step, mesh=dict(tensor=1) | mesh)
        state = loop.run(toy_run.program(config), config, tmp_path)
        size = mesh["data"] * mesh.get("fsdp", 1)
        kernel = state.params["kernel"]
        assert len(kernel.sharding.device_set) == size
        assert kernel.sharding.is_fully_replicated == ("fsdp" not in mesh)
        assert_equal(state.params, checkpoints.load_params(tmp_path, ("params",)))
        # Read by the next, before it makes its step.
        other = toy_run.config(
            num_steps=step, mesh=dict(tensor=1) | meshes[step % len(meshes)]
        )
        assert_equal(loop.run(toy_run.program(other), other, tmp_path), state)
