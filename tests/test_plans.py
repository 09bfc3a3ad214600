"""Plans of configs: searches, tables, the verb, and compiles for absent TPUs."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rae_jax import config as configs
from rae_jax import main
from rae_jax.layers import stack
from rae_jax.planning import compile as compiling
from rae_jax.planning import predict, process, search, tables, targets, works
from rae_jax.training import sharding

ROOT = Path(__file__).parent.parent
CONFIG = f"{ROOT / 'configs' / 'dit_dh.py'}:smoke"
GAN = f"{ROOT / 'configs' / 'rae_decoder.py'}:smoke_gan"
KEYS = (
    "target",
    "chips",
    "fits",
    "hbm_bytes_state",
    "hbm_bytes_peak",
    "flops_per_step",
    "cycles_per_step",
    "seconds_per_step",
    "predicted_mfu",
    "collective_bytes_per_step",
    "images_per_second",
)


# ---- What a config computes


@pytest.mark.parametrize(
    ("path", "what"), [(CONFIG, "sample"), (CONFIG, "decode"), (GAN, "decode")]
)
def test_sampling_and_decoding_are_traced(path, what):
    config = configs.load_config(path, ["--config.data.batch_size=16"])
    mesh = sharding.make_mesh(config.mesh)
    work = works.make(config, what, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out = jax.eval_shape(work.function, *work.args)
    assert work.executions == 3125 and work.batch_size == 16
    assert work.model_flops > 0 and work.held_bytes > 0
    size = {"sample": (16, 4, 4, 32), "decode": (16, 32, 32, 3)}[what]
    assert out.shape == size
    assert out.dtype == (jnp.uint8 if what == "decode" else jnp.float32)


def test_what_a_config_cannot_do_is_said():
    config = configs.load_config(GAN)
    mesh = sharding.make_mesh(config.mesh)
    with pytest.raises(ValueError, match="needs a latent_diffusion config"):
        works.make(config, "sample", mesh)
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        works.make(config, "trian", mesh)


def test_a_device_holds_its_part_of_a_state():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    parts = [(jax.sharding.PartitionSpec("fsdp"), 4), (jax.sharding.PartitionSpec(), 1)]
    for spec, count in parts:
        where = jax.sharding.NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=where)
        assert works.device_bytes({"x": x}) == 64 * 32 * 4 / count


def test_missing_compilers_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    for text, package in (("v5p:4x4x4", "libtpu"), ("h100:8", "jax-cuda12-pjrt==")):
        with pytest.raises(compiling.MissingCompiler, match="pip install") as caught:
            process.plan(None, targets.parse(text), "train")
        assert package in str(caught.value)


@pytest.mark.parametrize(
    ("message", "gigabytes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (200.00G) exceeds available HBM (15.75G).",
            200,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 45.64G of 31.25G hbm. Exceeded hbm capacity by "
            "14.39G.\nTotal hbm usage >= 46.14G:",
            45.64,
        ),
    ],
)
def test_a_shortage_is_read_from_the_compilers_message(message, gigabytes):
    text = compiling.shortage(RuntimeError(message))
    assert message.startswith(text)
    assert compiling.needed_bytes(text) == pytest.approx(gigabytes * 2**30)


def test_another_refusal_is_an_error():
    with pytest.raises(ValueError, match="refuses the program: INVALID"):
        compiling.shortage(RuntimeError("INVALID_ARGUMENT: no such option"))


# ---- Search, tables and the verb


def report(**changes):
    found = dict(
        target="v5p:2x2x1", chips=4, what="train", mesh={"data": 1, "fsdp": 4},
        remat="full", batch_size=1024, fits=True, shortage="", basis="compiler",
        hbm_bytes_available=95e9, hbm_bytes_state=1.2e9, hbm_bytes_peak=8e9,
        flops_per_step=9.9e14, steps=1000, cycles_per_step=145e6,
        seconds_per_step=0.09, exposed_seconds=0.005, predicted_mfu=0.375,
        images_per_second=11_378.0, hours=0.025, chip_hours=0.1,
        collective_bytes_per_step=3.3e9,
        collective_bytes_by_kind={"all-gather": 3.3e9}, compiler_options={"flag": True},
        top=[["layers/mlp.py:41 MLP.__call__", 0.25]], notes=["Cycles are estimates."],
    )  # fmt: skip
    return found | changes


# What is not known of a program that does not fit.
NOTHING = (*KEYS[6:], "basis", "exposed_seconds", "hours", "chip_hours", "top", "notes")
NOTHING = dict.fromkeys((*NOTHING, "collective_bytes_by_kind"))


def test_a_search_goes_on_from_the_best_so_far():
    speed = {"fsdp": {4: 3.0, 16: 2.0}, "remat": {"dots": 2.0}}

    def plan(config):
        if config.mesh.fsdp == 8:
            raise ValueError("cannot be laid out")
        rate = speed["fsdp"].get(config.mesh.fsdp, 1.0)
        rate *= speed["remat"].get(config.model.remat, 1.0)
        rate *= config.data.batch_size / 8
        fits = config.data.batch_size < 16 or config.model.remat == "full"
        return {"fits": fits, "images_per_second": rate, "target": "", "c": config}

    config = configs.load_config(CONFIG)
    target = targets.parse("v5p:4x4x4")
    found = [r for _, r in search.search(config, target, plan)]
    best = min(found, key=search.rank)["c"]
    assert (best.mesh.fsdp, best.model.remat, best.data.batch_size) == (4, "dots", 8)
    # Three meshes, as fsdp = 8 is passed over, the other policies, and two batches.
    assert len(found) == 1 + 3 + len(stack.REMAT_POLICIES) + 2
    assert config.mesh.fsdp == 1 and config.model.remat == "unrolled"


def test_a_table_has_a_column_for_every_target():
    short = report(target="v6e:2x2", fits=False, shortage="Used 40G of 31G", **NOTHING)
    text = tables.markdown([report(), short])
    lines = text.splitlines()
    assert lines[0] == "|  | v5p:2x2x1 | v6e:2x2 |"
    assert all(line.count("|") == 4 for line in lines)
    assert "| estimated cycles per step | 145.0 M | - |" in lines
    assert "| - all-gather | 3.3 GB | - |" in lines
    assert any("yes, in 88.5 GiB" in line and "NO" in line for line in lines)


def test_the_verb_prints_what_it_found(monkeypatch, capsys):
    asked = []

    def plan(config, target, what):
        asked.append((config.data.batch_size, target.text, what))
        if target.text == "v3:2x2":
            raise ValueError("no such slice")
        return report(target=target.text)

    monkeypatch.setattr(process, "plan", plan)
    monkeypatch.setattr(compiling, "check_compiler", lambda target: None)
    argv = ["plan", "--config", CONFIG, "--target", "v5p:2x2x1"]
    assert main.main([*argv, "--json", "--config.data.batch_size=32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(KEYS) <= set(found)
    assert asked == [(32, "v5p:2x2x1", "train")]
    argv += ["--target", "v3:2x2", "--target", "h100:8", "--what", "sample"]
    assert main.main(argv) == 1  # And yet what was found is shown.
    out, err = capsys.readouterr()
    assert "h100:8" in out and "layers/mlp.py:41" in out and "flag=True" in out
    assert "v3:2x2: no such slice" in err and "Compiling" in err


def test_an_interrupted_search_ranks_what_it_knows(monkeypatch, capsys):
    speeds = iter([100.0, 300.0, 200.0])

    def plan(config, target, what):
        for speed in speeds:
            return report(target=target.text, images_per_second=speed)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "plan", plan)
    monkeypatch.setattr(compiling, "check_compiler", lambda target: None)
    argv = ["plan", "--config", CONFIG, "--target", "v5p:2x2x1", "--search"]
    assert main.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    found = [each["images_per_second"] for each in json.loads(out)]
    assert found == [300, 200, 100]
    assert "Interrupted" in err and "300 images/s" in err
    speeds = iter([100.0])
    assert main.main(argv) == 0
    assert "MFU" in capsys.readouterr().out
    assert main.main(argv) == 130  # Nothing is known.


def test_the_verb_refuses_unknown_targets_and_keys(capsys):
    argv = ["plan", "--config", CONFIG, "--target"]
    assert main.main([*argv, "v5p:4x4x4", "--target", "tpu"]) == 1
    assert "Unknown target 'tpu'" in capsys.readouterr().err
    assert main.main([*argv, "v5p:4x4x4", "--config.mesh.fdsp=2"]) == 1
    assert "mesh.fsdp" in capsys.readouterr().err


# ---- Real compiles. Without libtpu (not x86 Linux) there is nothing to compile with.

LARGER = [  # Weights large enough to be split.
    "--config.model.hidden_size=(256, 256)",
    "--config.model.depth=(2, 2)",
    "--config.model.num_heads=(4, 4)",
    "--config.model.dtype=bfloat16",
    "--config.data.batch_size=64",
    "--config.mesh.fsdp=4",
]


@functools.cache
def planned(target, *overrides, path=CONFIG):
    """A plan of a tiny run, compiled in a process of its own."""
    pytest.importorskip("libtpu")
    words = [*(LARGER if path == CONFIG else ()), *overrides]
    changes = list({word.partition("=")[0]: word for word in words}.values())
    return process.plan(
        configs.load_config(path, changes), targets.parse(target), "train"
    )


def test_a_sharded_step_moves_each_weight_twice_and_its_gradient_once():
    found = planned("v5e:2x2")
    assert set(KEYS) <= set(found)
    assert found["fits"] and found["basis"] == predict.COMPILER
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    # Parameters, their average and two moments in float32, split over four chips.
    parameters = found["hbm_bytes_state"] / 4
    assert found["hbm_bytes_peak"] > found["hbm_bytes_state"] > 4e6
    # Gathered forwards and backwards, scattered once, in bfloat16.
    ideal = 3 * 2 * parameters
    moved = found["collective_bytes_by_kind"]
    assert 0.6 * ideal < found["collective_bytes_per_step"] < 1.25 * ideal
    assert moved["reduce-scatter"] > 0.2 * ideal
    assert moved.get("all-reduce", 0) < 0.15 * ideal
    cycles = found["compute_seconds"] * targets.CHIPS["v5e"].clock
    assert found["cycles_per_step"] == pytest.approx(cycles, rel=1e-6)
    assert any("Attention on TPU v5 lite" in note for note in found["notes"])
    executed = found["executed_flops_per_step"] / found["flops_per_step"]
    assert 1.0 < executed < 1.5  # Rematerialisation runs the blocks once more.


@pytest.mark.slow
def test_more_replicas_cost_a_chip_little():
    """The same batch per chip on four times the chips."""
    small = planned("v5p:2x2x1")
    large = planned("v5p:4x4x1", "--config.data.batch_size=256")
    assert large["mesh"] == {"data": 4, "fsdp": 4, "tensor": 1}
    assert large["cycles_per_step"] < 1.1 * small["cycles_per_step"]
    moved = [found["collective_bytes_per_step"] for found in (small, large)]
    assert moved[1] < 1.25 * moved[0]


@pytest.mark.slow
def test_a_trunk_without_a_loop_takes_fewer_cycles():
    """It computes nothing twice but norms and sums, and copies nothing into stacks."""
    deep = ("--config.model.depth=(8, 2)", "--config.data.batch_size=256")
    loop, none = (
        planned("v5p:2x2x1", *deep, f"--config.model.remat={remat}")
        for remat in ("weights", "unrolled")
    )
    ideal = none["flops_per_step"]
    assert loop["flops_per_step"] == ideal
    assert loop["executed_flops_per_step"] > 1.2 * ideal
    assert none["executed_flops_per_step"] < 1.05 * ideal
    assert none["cycles_per_step"] < 0.95 * loop["cycles_per_step"]
    moved = [found["collective_bytes_per_step"] for found in (none, loop)]
    assert moved[0] < 1.01 * moved[1]


@pytest.mark.slow
def test_the_decoder_of_stage_1_is_split():
    sizes = ("hidden_size=256", "intermediate_size=1024", "num_heads=4")
    sizes = tuple(f"--config.model.{size}" for size in sizes)
    found = planned("v5p:2x2x1", "--config.mesh.fsdp=4", *sizes, path=GAN)
    whole = planned("v5p:2x2x1", *sizes, path=GAN)
    assert found["fits"]
    assert found["hbm_bytes_state"] < 0.5 * whole["hbm_bytes_state"]
    # In bfloat16, gathered for both ways through the decoder and for the images that
    # the critic sees, and scattered once; the rest is small. States hold 16 bytes.
    parameters = whole["hbm_bytes_state"] / 16
    assert found["collective_bytes_per_step"] < 6 * 2 * parameters
