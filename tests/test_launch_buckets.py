"""Buckets of the launchers: by their addresses, or mounted where RAE_MOUNT says so."""

import shlex

import pytest
from launch_clone import POD, RECORD, TRAIN, Cluster, write_script

SHOW = 'echo "<$RAE_BUCKET><$RAE_DATA><$RAE_RUNS>" "${AWS_ENDPOINT_URL-}"'
PLACES = ("--", "bash", "-c", SHOW)
LAUNCHERS = {
    "tpu_pod.sh": POD,
    "gke.sh": ("--name=rae", "--cluster=c", "--zone=us-a1-b", "--type=v5p-16"),
    "gpu_node.sh": (),
    "gpu_slurm.sh": ("--detach",),
}


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def extras(cluster):
    """What was installed since the last call; each of two workers does it."""
    return [call.partition("[")[2].rstrip("]") for call in cluster.calls()]


@pytest.mark.parametrize(
    ("address", "extra"),
    [("gs://my-b", "gcs"), ("s3://my-b/a/b", "s3"), ("gs://my-b//", "gcs")],
)
def test_addresses_are_used_as_they_are(cluster, address, extra):
    variables = dict(RAE_BUCKET=address, AWS_ENDPOINT_URL="http://store")
    result = cluster("tpu_pod.sh", "run", *POD, *PLACES, **variables)
    assert result.returncode == 0, result.stderr
    bucket = address.rstrip("/")
    shown = f"<{bucket}><{bucket}/data><{bucket}/runs> http://store"
    assert shown in result.stdout
    assert extras(cluster) == [f"demo,tpu,{extra}"] * 2
    tree = cluster.fake / "0" / "rae_jax_tree"
    assert tree.is_dir() and not (tree / "bucket").exists()
    assert not any("fs" in call.split()[0] for call in cluster.read("calls"))


@pytest.mark.parametrize(
    ("address", "program", "flags"),
    [
        ("gs://my-b/", "gcsfuse", ["--rename-dir-limit=1000000", "my-b", "my disk"]),
        ("gs://my-b/a/b", "gcsfuse", ["--only-dir=a/b", "my-b", "my disk"]),
        ("s3://my-b", "s3fs", ["my-b", "my disk"]),
        ("s3://my-b/a/b", "s3fs", ["my-b:/a/b", "my disk"]),
    ],
)
def test_buckets_are_mounted_where_a_folder_is_named(cluster, address, program, flags):
    write_script(cluster.bin / "mountpoint", "#!/usr/bin/env bash\nexit 1\n")
    variables = dict(RAE_BUCKET=address, RAE_MOUNT="my disk", RAE_MOUNT_OPTIONS="a=b,c")
    write_script(cluster.bin / program, RECORD)
    result = cluster("tpu_pod.sh", "run", *POD, *PLACES, **variables)
    assert result.returncode == 0, result.stderr
    assert "<my disk/data><my disk/runs>" in result.stdout
    mount = shlex.split(cluster.read("calls")[-1])
    assert mount[0] == program and {*flags, "-o", "a=b,c"} <= set(mount)
    assert (cluster.fake / "0" / "rae_jax_tree" / "my disk").is_dir()
    assert extras(cluster) == ["demo,tpu"] * 2
    write_script(cluster.bin / program, "#!/usr/bin/env bash\nexit 3\n")
    failed = cluster("tpu_pod.sh", "run", *POD, *PLACES, **variables)
    assert "could not be mounted" in failed.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("given", ["variable", "option"])
def test_what_is_no_bucket_is_refused_before_anything_starts(cluster, script, given):
    for wrong in ("http://b", "gs://", "my-b", "gs:///x", "s3://b//x"):
        words = (f"--env=RAE_BUCKET={wrong}",) if given == "option" else ()
        variables = {} if words else dict(RAE_BUCKET=wrong)
        words = (*LAUNCHERS[script], *words, *TRAIN)
        result = cluster(script, "run", *words, **variables)
        assert result.returncode == 1
        message = f"RAE_BUCKET must be gs://NAME or s3://NAME, got '{wrong}'"
        assert message in result.stderr
    words = (*LAUNCHERS[script], *TRAIN)
    result = cluster(script, "run", *words, RAE_MOUNT_OPTIONS="a=b")
    assert result.returncode == 1 and "needs RAE_MOUNT" in result.stderr
    assert cluster.read("calls") == cluster.read("runs") == cluster.calls() == []


def test_the_worker_refuses_it_too(cluster):
    words = ("exec", "cpu", "RAE_BUCKET=ftp://b", *TRAIN)
    result = cluster("worker.sh", *words)
    assert result.returncode == 1 and "got 'ftp://b'" in result.stderr
    assert cluster.read("runs") == cluster.calls() == []


@pytest.mark.parametrize("script", ["gpu_node.sh", "gpu_slurm.sh"])
@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (TRAIN, {}, "demo,gpu"),
        (TRAIN, {"RAE_BUCKET": "gs://b"}, "demo,gpu,gcs"),
        (TRAIN, {"RAE_BUCKET": "gs://b", "RAE_DATA": "s3://d"}, "demo,gpu,gcs,s3"),
        (TRAIN, dict(RAE_BUCKET="gs://b", RAE_DATA="d", RAE_RUNS="r"), "demo,gpu,gcs"),
        (TRAIN, {"RAE_BUCKET": "gs://b", "RAE_MOUNT": "m"}, "demo,gpu"),
        (("--env", "RAE_RUNS=gs://b", *TRAIN), {}, "demo,gpu,gcs"),
        (("--", "rae-jax", "--workdir=s3://b/x"), {}, "demo,gpu,s3"),
    ],
)
def test_machines_get_what_addresses_need(cluster, script, words, variables, expected):
    for name in ("gcsfuse", "mountpoint"):
        write_script(cluster.bin / name, "#!/usr/bin/env bash\n")
    words = (*LAUNCHERS[script], *words)
    result = cluster(script, "run", *words, **variables)
    assert result.returncode == 0, result.stderr
    assert extras(cluster) == [expected]


def test_nodes_of_a_job_find_it_installed(cluster):
    words = (*LAUNCHERS["gpu_slurm.sh"], "--env=RAE_RUNS=gs://b", *TRAIN)
    assert cluster("gpu_slurm.sh", "run", *words).returncode == 0
    assert extras(cluster) == ["demo,gpu,gcs"]
    (batch,) = (c for c in cluster.read("calls") if c.startswith("sbatch"))
    batch = shlex.split(batch)
    script = batch.index(str(cluster.root / "launch" / "gpu_slurm.sbatch"))
    node = dict(SLURM_NNODES="1", SLURM_JOB_ID="7", RAE_ROOT=str(cluster.root))
    result = cluster("gpu_slurm.sbatch", *batch[script + 1 :], **node)
    assert result.returncode == 0, result.stderr
    assert len(cluster.read("runs")) == 1 and cluster.calls() == []


def test_a_pod_is_set_up_for_its_bucket_without_a_command(cluster):
    result = cluster("tpu_pod.sh", "up", *POD, "--env=RAE_BUCKET=gs://b")
    assert result.returncode == 0, result.stderr
    assert extras(cluster) == ["demo,tpu,gcs"] * 2


def test_keys_stay_on_this_machine(cluster):
    keys = dict(AWS_ACCESS_KEY_ID="id-1", AWS_SECRET_ACCESS_KEY="secret-1")
    words = ("run", *POD, "--dry-run", *TRAIN)
    variables = dict(RAE_BUCKET="s3://b", AWS_REGION="eu-1", **keys)
    result = cluster("tpu_pod.sh", *words, **variables)
    assert result.returncode == 0 and "AWS_REGION=eu-1" in result.stdout
    assert not any(value in result.stdout for value in keys.values())


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_runs_with_a_bucket_can_be_pasted(cluster, script):
    words = ("run", *LAUNCHERS[script], "--dry-run", *PLACES)
    result = cluster(script, *words, RAE_BUCKET="gs://my-b/a")
    assert result.returncode == 0, result.stderr
    assert cluster.read("calls") == cluster.calls() == []
    lines = [line for line in result.stdout.splitlines() if "describe" not in line]
    write_script(cluster.root / "launch" / "pasted.sh", "set -e\n" + "\n".join(lines))
    pasted = cluster("pasted.sh")
    assert pasted.returncode == 0, pasted.stderr
    if script in ("gke.sh", "gpu_slurm.sh"):  # These stand-ins run no commands.
        call = cluster.read("calls")[0 if script == "gpu_slurm.sh" else -2]
        assert "RAE_BUCKET=gs://my-b/a" in call and SHOW.split()[1] in call
    else:
        assert "<gs://my-b/a><gs://my-b/a/data><gs://my-b/a/runs>" in pasted.stdout


def test_extras_that_are_there_are_not_installed_again(cluster):
    def install(platform, **variables):
        result = cluster("worker.sh", "install", platform, **variables)
        assert result.returncode == 0, result.stderr
        return extras(cluster)

    assert install("gpu,gcs") == ["demo,gpu,gcs"]
    assert install("gpu") == install("gpu,gcs") == install("cpu") == []
    assert install("gpu", RAE_BUCKET="gs://b") == []
    assert install("gpu", RAE_BUCKET="s3://b") == ["demo,gpu,s3"]
    assert install("gpu,gcs,s3") == install("cpu,s3") == []
    with (cluster.root / "launch" / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert install("cpu") == ["demo"]
    assert install("cpu,s3") == ["demo,s3"]


def test_an_unknown_platform_is_refused(cluster):
    result = cluster("worker.sh", "install", "npu,gcs")
    assert result.returncode == 1 and "unknown platform npu" in result.stderr
    assert cluster.calls() == []
