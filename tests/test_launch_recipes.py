"""The recipes, the environment of a run, and several processes on this CPU."""

import argparse
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from launch_clone import ROOT, Clone, write_script

from rae_jax import config as configs
from rae_jax.planning import compile, targets

LAUNCH = ROOT / "launch"
RECIPES = ("rae_imagenet256", "rae_imagenet512", "ldae_imagenet")
FILES = ("--imagenet=in", "--inception=w.pth", "--reference=r.npz", "--latents=a b")


def run(script, *arguments, **variables):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(name, *arguments, **variables):
    result = run(f"recipes/{name}.sh", "--dry-run", *arguments, **variables)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def parse(words):
    """Returns the arguments of a command, and its config if it has one."""
    program, verb, *rest = words
    assert program == "rae-jax"
    module = importlib.import_module(f"rae_jax.commands.{verb}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    args, overrides = parser.parse_known_args(rest)
    config = None
    if getattr(args, "config", None):
        config = configs.load_config(args.config, overrides)
    else:
        assert not overrides
    return verb, args, config


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_and_config_of_a_recipe_exists(name):
    parsed = [parse(words) for words in commands(name, *FILES, "--set=mesh.fsdp=2")]
    trained = {
        args.workdir.name: config for verb, args, config in parsed if verb == "train"
    }
    stages = re.search(
        r"^STAGES=\((.*)\)", (LAUNCH / f"recipes/{name}.sh").read_text(), re.M
    )
    assert set(trained) == set(stages[1].split()) - {
        "prepare",
        "latents",
        "sample",
        "fid",
    }
    assert all(config.mesh.fsdp == 2 for config in trained.values())
    assert {config.data.path for config in trained.values()} == {"data/imagenet"}
    kinds = [config.trainer for config in trained.values()]
    assert kinds[-1] == "latent_diffusion" and "rae_decoder" in kinds
    sizes = {config.data.image_size for config in trained.values()}
    assert sizes == {512 if "512" in name else 256}

    # The stages find each other's workdirs, latents and samples.
    dit = trained["dit"]
    assert (dit.latent_stats, dit.decoder, dit.data.latents) == (
        "../stats",
        "../decoder",
        "a b",
    )
    encoders = {c.encoder.weights for n, c in trained.items() if "encoder" in c}
    assert len(encoders) == 1
    assert dit.encoder == trained["decoder"].encoder == trained["stats"].encoder
    cache = next(
        config for verb, args, config in parsed if verb == "prepare" and config
    )
    assert cache.data.image_size == dit.data.image_size
    out = next(args.out for verb, args, _ in parsed if verb == "sample")
    scales = next(args.guidance_scale for verb, args, _ in parsed if verb == "sample")
    measured = [str(args.target) for verb, args, _ in parsed if verb == "evaluate"]
    several = len(str(scales).strip("()[]").split(",")) > 1
    assert len(measured) == (2 if several else 1)
    assert all(path.startswith(str(out.with_suffix(""))) for path in measured)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hand_addresses_over(name):
    variables = dict(RAE_BUCKET="gs://b/", RAE_IMAGENET="s3://in/")
    options = ("--inception=w.pth", "--reference=s3://r/a.npz", "--latents=gs://l//x/")
    parsed = [parse(words) for words in commands(name, *options, **variables)]
    runs = f"gs://b/runs/{name}"
    for verb, args, config in parsed:
        if verb == "train":
            assert str(args.workdir).startswith(f"{runs}/")
        elif verb == "sample":
            assert (str(args.workdir), str(args.out)) == (
                f"{runs}/dit",
                f"{runs}/samples.npz",
            )
            assert args.guide in (None, f"{runs}/guide")
        elif verb == "evaluate":
            assert str(args.target).startswith(f"{runs}/samples")
            assert args.target.with_suffix(".json") == args.out
            assert args.reference == "s3://r/a.npz"
        elif config:
            assert str(args.latents) == "gs://l/x"
            own = name == "ldae_imagenet"
            assert (config.encoder.weights == f"{runs}/ldae") == own
        else:
            assert str(args.src) in ("s3://in/train", "s3://in/val")
            assert str(args.dst).startswith("gs://b/data/imagenet/")
        if config:
            assert config.data.path == "gs://b/data/imagenet"
    trained = [c for verb, _, c in parsed if verb == "train"]
    assert trained[-1].data.latents == "gs://l/x"


def test_recipes_take_a_mounted_bucket_and_places_of_their_own():
    mounted = dict(RAE_BUCKET="gs://b", RAE_MOUNT="disk")
    (words,) = commands("rae_imagenet256", "stats", **mounted)
    _, args, config = parse(words)
    assert str(args.workdir) == "disk/runs/rae_imagenet256/stats"
    assert config.data.path == "disk/data/imagenet"
    places = ("--runs=s3://c/r/", "--data=images")
    (words,) = commands("rae_imagenet256", "stats", *places, **mounted)
    _, args, config = parse(words)
    assert str(args.workdir) == "s3://c/r/stats" and config.data.path == "images"
    result = run("recipes/rae_imagenet256.sh", "--dry-run", RAE_BUCKET="b")
    assert result.returncode == 1 and result.stdout == ""
    assert "RAE_BUCKET must be gs://NAME or s3://NAME, got 'b'" in result.stderr


def test_guide_is_the_small_network_of_the_paper():
    for name, epochs in (("rae_imagenet256", 14), ("rae_imagenet512", 20)):
        (words,) = commands(name, "guide")
        _, _, config = parse(words)
        assert config.model.hidden_size == (384, 2048)
        assert config.model.depth == (12, 2)
        assert config.num_steps == epochs * 1251


def test_stages_are_chosen_and_places_come_from_the_environment():
    variables = dict(RAE_DATA="disk/d", RAE_RUNS="disk/r")
    words = commands("rae_imagenet256", "stats", "decoder", **variables)
    assert [parse(w)[1].workdir.name for w in words] == ["decoder", "stats"]
    assert str(parse(words[0])[1].workdir) == "disk/r/rae_imagenet256/decoder"
    assert parse(words[0])[2].data.path == "disk/d/imagenet"
    assert not any("latents" in word for word in commands("rae_imagenet256", "dit")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "--imagenet is missing; give it or set RAE_IMAGENET"),
        (["fid", "--inception=w"], "--reference is missing"),
        (["decode"], "unknown stage decode; choose from: prepare decoder"),
        (["--runs=http://b/x"], "--runs may be a folder, gs://NAME/PATH or s3://"),
        (["--latents=gs://"], "--latents may be a folder, gs://NAME/PATH or s3://"),
        (["--latent=x"], "unknown option --latent"),
        (["prepare", "--imagenet=i"], "stage prepare runs on one machine"),
    ],
)
def test_what_a_recipe_lacks_is_named(arguments, message):
    variables = dict(RAE_DISTRIBUTED="1") if "--imagenet=i" in arguments else {}
    result = run("recipes/rae_imagenet256.sh", "--dry-run", *arguments, **variables)
    assert result.returncode == 1
    assert message in result.stderr


def test_a_failed_stage_ends_a_recipe_with_its_code(tmp_path):
    clone = Clone(tmp_path)
    log = f'echo "$*" >>"{tmp_path}/runs"; [[ $* != *stats* ]] || exit 75'
    write_script(clone.bin / "rae-jax", f"#!/usr/bin/env bash\n{log}\n")
    result = clone.run("recipes/rae_imagenet256.sh", "decoder", "stats", "dit")
    assert result.returncode == 75
    assert len((tmp_path / "runs").read_text().splitlines()) == 2


def environment(platform, **variables):
    script = f"source launch/env.sh; set_environment {platform} && env -0"
    command = ["bash", "-c", script]
    own = {"PATH": os.environ["PATH"], "HOME": "/h", **variables}
    result = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if line)


def test_environment_of_a_run():
    tpu = environment("tpu", LIBTPU_INIT_ARGS="--mine=1", RAE_DATA="/d")
    assert tpu["LIBTPU_INIT_ARGS"].endswith("fuse_all_gather=true --mine=1")
    assert tpu["RAE_DATA"] == "/d" and tpu["RAE_RUNS"] == "runs"
    assert tpu["JAX_COMPILATION_CACHE_DIR"] == "/h/.cache/rae_jax/compiled"
    assert "XLA_FLAGS" not in tpu
    assert environment("gpu")["JAX_PLATFORMS"] == "cuda,cpu"
    assert environment("npu") == {}
    native = environment("cpu", RAE_BUCKET="gs://b/", RAE_DATA="/d")
    assert native["RAE_RUNS"] == "gs://b/runs" and native["RAE_DATA"] == "/d"
    assert "RAE_MOUNT" not in native
    mounted = environment("cpu", RAE_BUCKET="gs://b", RAE_MOUNT="/m")
    assert mounted["RAE_RUNS"] == "/m/runs" and mounted["RAE_DATA"] == "/m/data"
    assert environment("cpu", RAE_BUCKET="b") == {}


def test_plan_compiles_with_the_same_options():
    def flags(table):
        return " ".join(f"--{key}={str(value).lower()}" for key, value in table.items())

    assert environment("gpu")["XLA_FLAGS"] == flags(compile.OPTIONS["cuda"])
    assert environment("tpu")["LIBTPU_INIT_ARGS"] == flags(compile.OPTIONS["tpu"])
    for name in ("RAE_TPU_TYPE", "TPU_ACCELERATOR_TYPE"):
        for chip in ("v6e", "v5p", "v4"):
            found = environment("tpu", **{name: f"{chip}-16"})["LIBTPU_INIT_ARGS"]
            assert found == flags(compile.options(targets.CHIPS[chip]))
    assert compile.CHIP_OPTIONS.keys() == {"v6e"}


def test_this_jaxlib_accepts_the_gpu_flags():
    # An unknown flag ends the process.
    flags = environment("gpu")["XLA_FLAGS"]
    code = "import jax; jax.devices()"
    variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    python = [sys.executable, "-c", code]
    assert subprocess.run(python, env=variables, capture_output=True).returncode == 0


def test_processes_find_each_other_and_print_by_number():
    shown = 'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_NUM_CPU_DEVICES $1"'
    result = run("simulate.sh", "2x4", "bash", "-c", shown, "x", "a b")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["[0] 0/2 4 a b", "[1] 1/2 4 a b"]


@pytest.mark.parametrize(("end", "code"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_when_one_process_fails_the_others_are_ended(end, code):
    wait = "trap '' TERM; echo ready; sleep 60"
    script = f"[[ $JAX_PROCESS_ID == 0 ]] || {{ {wait}; }}; sleep 0.3; {end}"
    start = time.monotonic()
    result = run("simulate.sh", "3x1", "bash", "-c", script, RAE_GRACE_SECONDS="1")
    assert result.returncode == code
    assert time.monotonic() - start < 20
    assert f"process 0 ended with code {code}" in result.stderr
    assert "[2] ready" in result.stdout


def test_sigterm_reaches_every_process_once_and_all_are_awaited(tmp_path):
    save = "sleep 0.$((JAX_PROCESS_ID * 5)); touch saved$JAX_PROCESS_ID; exit 75"
    script = f"trap '{save}' TERM; touch $JAX_PROCESS_ID; while :; do sleep 0.05; done"
    command = ["bash", str(LAUNCH / "simulate.sh"), "3x1", "bash", "-c", script]
    options = dict(stderr=subprocess.DEVNULL, start_new_session=True)
    with subprocess.Popen(command, cwd=tmp_path, **options) as process:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    assert len(list(tmp_path.glob("saved*"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["2"], "PROCESSESxDEVICES such as 2x4, got '2'"), (["2x4"], "no command")],
)
def test_wrong_simulations_are_refused(arguments, message):
    result = run("simulate.sh", *arguments)
    assert result.returncode == 1 and message in result.stderr
