"""The launchers of pods and clusters, with stand-ins for gcloud, ssh, xpk and SLURM."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from launch_clone import HEEDS_SIGINT, POD, ROOT, TRAIN, Cluster, write_script

from rae_jax.training import interrupts


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


DEPLOY = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]


def test_pod_is_created_used_and_used_again(cluster):
    result = cluster("tpu_pod.sh", "run", *POD, "--env", "A=b c's", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cluster.verbs() == ["queued-resources create", *DEPLOY]
    create = next(call for call in cluster.read("calls") if "create" in call)
    for flag in (
        "--zone=z",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-id=rae",
    ):
        assert f"'{flag}'" in create
    expected = "rae-jax train --workdir my runs A=b c's distributed=1"
    assert cluster.read("runs") == [expected]
    assert "demo,tpu" in cluster.calls()[0]
    assert "] training in rae_jax_tree" in result.stdout
    (log,) = cluster.logs()
    assert log == result.stdout and "ended with code 0" in log

    (cluster.fake / "calls").unlink()
    assert cluster("tpu_pod.sh", "run", *POD, *TRAIN).returncode == 0
    assert cluster.verbs() == DEPLOY
    assert cluster.calls() == []  # Installed before.


def test_preempted_runs_are_resumed_on_a_new_pod_or_the_same(cluster):
    plan = "gone 75 143 0"
    result = cluster("tpu_pod.sh", "run", *POD, "--spot", *TRAIN, plan=plan)
    assert result.returncode == 0, result.stderr
    again = ["queued-resources delete", "queued-resources create", *DEPLOY]
    assert cluster.verbs() == [again[1], *DEPLOY, *again, *DEPLOY, *DEPLOY]
    assert len(cluster.read("runs")) == 4 and len(cluster.logs()) == 4
    assert all("'--spot'" in call for call in cluster.read("calls") if "create" in call)
    codes = [re.findall(r"ended with code (\d+)", log)[-1] for log in cluster.logs()]
    assert sorted(codes) == ["0", "134", "143", "75"]


@pytest.mark.parametrize(
    ("plan", "code", "runs"), [("1", 1, 1), ("130", 130, 1), ("79 79 79 79", 79, 4)]
)
def test_other_failures_stop(cluster, plan, code, runs):
    result = cluster("tpu_pod.sh", "run", *POD, *TRAIN, plan=plan)
    assert result.returncode == code
    assert len(cluster.read("runs")) == runs
    assert "its output is in" in result.stderr or code == 130


def test_preemptions_are_limited(cluster):
    options = (*POD, "--max-restarts", "1")
    result = cluster("tpu_pod.sh", "run", *options, *TRAIN, plan="75 75 0")
    assert result.returncode == 1
    assert "preempted again after 1 restarts" in result.stderr


@pytest.mark.parametrize("call", ["create", "describe", "scp"])
def test_failures_of_gcloud_stop_with_its_message(cluster, call):
    result = cluster("tpu_pod.sh", "run", *POD, *TRAIN, fail=f" {call} ")
    assert result.returncode == 1
    assert "denied" in result.stderr and "error: " in result.stderr
    assert cluster.read("runs") == []
    # Whether there is a pod is not known: none is created.
    assert call != "describe" or cluster.verbs() == []


def test_slices_and_pods_without_a_queue(cluster):
    result = cluster("tpu_pod.sh", "up", *POD, "--slices", "2")
    assert result.returncode == 0, result.stderr
    create, copy = (cluster.read("calls")[i] for i in (2, -2))
    assert "'--node-count=2' '--node-prefix=rae'" in create
    assert "'queued-resources' 'scp'" in copy
    assert "'--worker=all' '--node=all' '--batch-size=all'" in copy
    cluster("tpu_pod.sh", "delete", *POD)
    assert cluster.verbs()[-1] == "queued-resources delete"
    result = cluster("tpu_pod.sh", "up", *POD, "--no-queue", "--create-flag=--tags=a")
    assert result.returncode == 0
    create = next(c for c in cluster.read("calls") if "'tpu-vm' 'create'" in c)
    assert "'--tags=a'" in create and "'--version=v2-alpha-tpuv5'" in create


def test_dry_run_prints_what_can_be_pasted(cluster):
    result = cluster("tpu_pod.sh", "run", *POD, "--dry-run", "--env=A=b c's", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cluster.read("calls") == []
    lines = result.stdout.splitlines()
    assert ["describe" in line for line in lines] == [True] * 2 + [False] * 5
    write_script(
        cluster.root / "launch" / "pasted.sh", "set -e\n" + "\n".join(lines[2:])
    )
    assert cluster("pasted.sh").returncode == 0
    expected = "rae-jax train --workdir my runs A=b c's distributed=1"
    assert cluster.read("runs") == [expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *TRAIN], "--zone is missing; give it or set RAE_ZONE"),
        (["run", "--zone=z", *TRAIN], "--name is missing"),
        (["run", "--zone=z", "--name=n", *TRAIN], "--type is missing"),
        (["run", *POD], "no command: write it after --"),
        (["run", *POD, "--zone", "--", "x"], "--zone needs a value"),
        (["run", *POD, "--sport", *TRAIN], "unknown option --sport"),
        (["run", *POD[1:], "--name=Rae_1", *TRAIN], "--name must be of lower-case"),
        (["run", *POD[:2], "--type=v9-8", *TRAIN], "give --runtime"),
        (["run", *POD, "--env", "A", *TRAIN], "--env takes KEY=VALUE, got 'A'"),
        (["go", *POD], "unknown verb 'go'"),
    ],
)
def test_what_is_missing_is_named(cluster, arguments, message):
    result = cluster("tpu_pod.sh", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert cluster.read("calls") == []


def test_exit_codes_are_those_of_the_program():
    text = (ROOT / "launch" / "lib.sh").read_text()
    codes = dict(re.findall(r"^EXIT_(\w+)=(\d+)", text, re.MULTILINE))
    assert int(codes["PREEMPTED"]) == interrupts.EXIT_PREEMPTED
    assert int(codes["STOPPED"]) == interrupts.EXIT_INTERRUPTED
    assert int(codes["HUNG"]) == interrupts.EXIT_HANGING
    assert int(codes["TERMINATED"]) == 128 + signal.SIGTERM
    batch = (ROOT / "launch" / "gpu_slurm.sbatch").read_text()
    assert f"{codes['PREEMPTED']} | {codes['TERMINATED']})" in batch
    assert f"  {codes['HUNG']})" in batch


def test_ctrl_c_leaves_the_command_to_logs_and_stop(cluster):
    (cluster.fake / "plan").write_text("wait\n")
    script = str(cluster.root / "launch" / "tpu_pod.sh")
    command = [sys.executable, "-c", HEEDS_SIGINT, "bash", script, "run", *POD, *TRAIN]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    options |= dict(cwd=cluster.home, env=cluster.environment())
    with subprocess.Popen(command, start_new_session=True, **options) as launcher:
        deadline = time.monotonic() + 60
        while not (cluster.fake / "waits").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (cluster.fake / "waits").exists()
        os.killpg(launcher.pid, signal.SIGINT)
        assert "the command goes on" in launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 130
    busy = cluster("tpu_pod.sh", "run", *POD, *TRAIN)
    assert busy.returncode == 1
    assert "a command is still running" in busy.stderr
    assert cluster("tpu_pod.sh", "stop", *POD).returncode == 0
    ended = cluster("tpu_pod.sh", "logs", *POD)
    assert ended.returncode == 130 and "ended with code 130" in ended.stdout
    assert len(cluster.read("runs")) == 1


def test_gpu_machine_by_ssh_over_broken_connections(cluster):
    options = ("--host", "me@box", "--ssh-option=-p22", "--gpus", "2", *TRAIN)
    result = cluster("gpu_node.sh", "run", *options, plan="75 0")
    assert result.returncode == 0, result.stderr
    assert len(cluster.read("runs")) == 2
    first = cluster.read("calls")[0]
    assert first.startswith("ssh '-oServerAliveInterval=30' '-p22'")
    assert "CUDA_VISIBLE_DEVICES=0,1 -- rae-jax" in "\n".join(cluster.read("calls"))
    assert "demo,gpu" in cluster.calls()[0]

    (cluster.fake / "down").write_text("1\n2\n")
    result = cluster("gpu_node.sh", "run", "--host=box", *TRAIN)
    assert "ssh box does not work" in result.stderr


def test_gpu_machine_here(cluster):
    result = cluster("gpu_node.sh", "run", "--env=A=b c", *TRAIN, plan="9")
    assert result.returncode == 9
    expected = "rae-jax train --workdir my runs A=b c distributed="
    assert cluster.read("runs") == [expected]
    shown = cluster("gpu_node.sh", "run", "--dry-run", "--env=A=b c", *TRAIN)
    words = shlex.split(shown.stdout)
    assert words[2:] == ["exec", "gpu", "A=b c", *TRAIN]


def test_workload_of_a_gke_cluster(cluster):
    options = ("--name=rae", "--cluster=c", "--zone=us-a1-b", "--type=v5p-16")
    result = cluster("gke.sh", "run", *options, "--storage=bucket", *TRAIN)
    assert result.returncode == 0, result.stderr
    create, wait = (shlex.split(call) for call in cluster.read("calls"))
    values = dict(word.split("=", 1) for word in create if word.startswith("--"))
    assert create[:4] == ["xpk", "workload", "create", "--cluster=c"]
    assert values["--tpu-type"] == "v5p-16" and values["--storage"] == "bucket"
    assert values["--restart-on-exit-codes"] == "75,79"
    assert values["--max-restarts"] == "100"
    command = ["exec", "bash", "launch/worker.sh", "exec", "tpu", "RAE_DISTRIBUTED=1"]
    command.append("RAE_TPU_TYPE=v5p-16")
    assert shlex.split(values["--command"]) == [*command, *TRAIN]
    assert (cluster.fake / "rae_jax.rae.tree" / "launch" / "worker.sh").exists()
    assert wait[1:3] == ["workload", "list"]
    assert wait[-1] == "--wait-for-job-completion=rae"

    cluster("gke.sh", "logs", *options)
    assert "'--location=us-a1'" in cluster.read("calls")[-2]
    result = cluster("gke.sh", "run", *options, *TRAIN, fail="--wait-for")
    assert result.returncode == 1 and "launch/gke.sh logs" in result.stderr
    result = cluster("gke.sh", "run", *options[1:], *TRAIN)
    assert "--name is missing; give it or set RAE_WORKLOAD" in result.stderr


@pytest.mark.parametrize(("state", "code"), [("COMPLETED", 0), ("FAILED", 9)])
def test_slurm_job_is_queued_and_followed(cluster, state, code):
    options = ("--nodes", "4", "--gpus=8", "--partition", "gpu", "--sbatch-flag=--x")
    plan = f"PENDING RUNNING PENDING RUNNING {state} {state}"
    result = cluster("gpu_slurm.sh", "run", *options, *TRAIN, plan=plan)
    assert result.returncode == code, result.stderr
    batch = shlex.split(next(c for c in cluster.read("calls") if c[:6] == "sbatch"))
    script = batch.index(str(cluster.root / "launch" / "gpu_slurm.sbatch"))
    for flag in ("--nodes=4", "--gpus-per-node=8", "--partition=gpu", "--x"):
        assert flag in batch[:script]
    assert batch[script + 1 :] == list(TRAIN)
    assert f"job 77: {state}" in result.stderr
    assert "demo,gpu" in cluster.calls()[0]
    refused = cluster("gpu_slurm.sh", "run", *TRAIN, fail="--parsable")
    assert refused.returncode == 1 and "sbatch refused" in refused.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, 0), (1, 0, 0), (75, 0, 1), (75, 100, 0), (79, 2, 1), (79, 3, 0)],
)
def test_slurm_job_of_several_nodes(cluster, code, restarts, requeued):
    cluster("gpu_slurm.sh", "run", "--detach", *TRAIN)
    (cluster.fake / "calls").unlink()
    variables = dict(SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="7")
    variables |= dict(SLURM_GPUS_ON_NODE="4", SLURM_RESTART_COUNT=str(restarts))
    task = "env | grep -E '^JAX_(C.*ADDR|NUM|PROC|LOCAL)' | sort; exit " + str(code)
    write_script(cluster.venv / "bin" / "rae-jax", f"#!/usr/bin/env bash\n{task}\n")
    variables |= dict(RAE_ROOT=str(cluster.root))
    result = cluster("gpu_slurm.sbatch", *TRAIN, **variables)
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[:4] == [
        "JAX_COORDINATOR_ADDRESS=node1:20007",
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]
    calls = [call for call in cluster.read("calls") if "'requeue' '7'" in call]
    assert len(calls) == requeued
