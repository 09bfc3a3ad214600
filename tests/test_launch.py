"""The launch scripts, run with stand-ins for Python, pip and df."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_clone import DF, PYTHONS, ROOT, Clone, write_script

LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), ROOT / ".ci" / "run"]
# Answers the version probe as a Python that the test's own was made to look like.
DISGUISED_PYTHON = f"""#!/usr/bin/env bash
exec '{sys.executable}' -c 'import sys; {{disguise}}; exec(sys.argv[1])' "$2"
"""
PYTEST = "pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal"
PYTEST += " --durations=15"
INSTALL = "pip install --constraint {root}/launch/constraints.txt"


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    assert shellcheck, "pip install '.[dev]' brings it"
    paths = sorted(str(path.relative_to(ROOT)) for path in SCRIPTS)
    command = [shellcheck, "--external-sources", *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_scripts_are_short():
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 250, path


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_installs_nothing(clone, script):
    result = clone.run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: bash launch/{script}")
    assert not clone.venv.exists()


@pytest.mark.parametrize("workdir", [["--workdir", "my runs"], ["--workdir=my runs"]])
def test_quickstart_passes_its_arguments_on(clone, workdir):
    arguments = [*workdir, "--x=a b"]
    result = clone.run("quickstart.sh", *arguments)
    passed = "".join(f"[{argument}]" for argument in arguments)
    assert result.stdout == f"[rae-jax][quickstart]{passed}"
    assert result.returncode == 0


def test_quickstart_writes_into_the_clone_by_default(clone):
    result = clone.run("quickstart.sh")
    workdir = clone.root / "runs" / "quickstart"
    assert result.stdout == f"[rae-jax][quickstart][--workdir][{workdir}]"


def test_the_second_run_installs_nothing(clone):
    expected = f"{INSTALL} --editable ROOT[demo]".format(root="ROOT")
    clone.run("quickstart.sh")
    assert clone.calls() == [expected]
    result = clone.run("quickstart.sh")
    assert (clone.calls(), result.stderr) == ([], "")
    with (clone.root / "launch" / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    clone.run("quickstart.sh")
    assert clone.calls() == [expected]


def test_moved_clone_is_installed_again(clone):
    clone.run("quickstart.sh")
    clone.calls()
    clone.root = clone.root.rename(clone.root.with_name("moved"))
    assert clone.run("quickstart.sh").returncode == 0
    assert len(clone.calls()) == 1


def test_wrong_python_is_named(clone):
    old = DISGUISED_PYTHON.format(disguise="sys.version_info = (3, 10, 13)")
    for name in PYTHONS:
        write_script(clone.bin / name, old)
    bare = 'sys.version_info = (3, 11, 2); sys.modules["ensurepip"] = None'
    write_script(clone.bin / "python3", DISGUISED_PYTHON.format(disguise=bare))
    result = clone.run("quickstart.sh")
    assert result.returncode == 1
    assert "Python 3.11 or newer with the venv module is needed" in result.stderr
    assert "python3.12 is 3.10.13" in result.stderr
    assert "python3 is 3.11.2 without venv" in result.stderr
    assert not clone.venv.exists()


def test_python_is_found_behind_unusable_ones(clone):
    write_script(clone.bin / "python3.11", "#!/usr/bin/env bash\nexit 127\n")
    write_script(clone.bin / "python3.12", "#!/usr/bin/env bash\necho 3.9.1; exit 1\n")
    result = clone.run("quickstart.sh")
    assert result.returncode == 0
    assert f"with {clone.bin / 'python3.13'}" in result.stderr


def test_environment_of_an_old_python_is_refused(clone):
    clone.run("quickstart.sh")
    (clone.venv / ".installed-demo").unlink()
    python = (clone.venv / "bin" / "python").read_text()
    write_script(clone.venv / "bin" / "python", python.replace("echo 3.11.9", "exit 1"))
    result = clone.run("quickstart.sh")
    assert result.returncode == 1
    assert "was made with an older Python" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "free", "status"),
    [
        (["quickstart.sh"], 2_900_000, 1),
        (["quickstart.sh"], 3_000_000, 0),
        (["test.sh", "--parity"], 7_900_000, 1),
        (["test.sh", "--parity"], 8_000_000, 0),
    ],
)
def test_small_disk_is_refused(clone, arguments, free, status):
    write_script(clone.bin / "df", DF.format(free=free))
    result = clone.run(*arguments)
    assert result.returncode == status
    message = f"{free // 1000} MB are free"
    assert (message in result.stderr) == (status == 1)
    assert clone.venv.exists() == (status == 0)


def test_failed_install_is_explained_and_repeated(clone):
    result = clone.run("quickstart.sh", FAIL="pip install")
    assert result.returncode == 1
    assert "pip could not install" in result.stderr
    assert "rae-jax]" not in result.stdout
    # pip was cut off inside `half`, and had finished `whole`.
    packages = clone.venv / "lib" / "python3.11" / "site-packages"
    for name in ("half", "whole"):
        (packages / f"{name}-1.dist-info").mkdir()
    (packages / "whole-1.dist-info" / "INSTALLER").touch()
    clone.calls()
    assert clone.run("quickstart.sh").returncode == 0
    assert len(clone.calls()) == 1
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


@pytest.mark.parametrize("state", ["unfinished", "broken"])
def test_half_made_environment_is_replaced(clone, state):
    clone.run("quickstart.sh")
    clone.calls()
    if state == "unfinished":
        (clone.venv / ".unfinished").touch()
    else:
        (clone.venv / "bin" / "python").unlink()
    result = clone.run("quickstart.sh")
    assert result.returncode == 0
    assert "replacing the unfinished or broken" in result.stderr
    assert len(clone.calls()) == 1


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ([], ["not parity and not slow"]),
        (["--slow"], ["not parity"]),
        (["--parity"], ["not parity and not slow", "parity and not slow"]),
        (["--slow", "--parity"], ["not parity", "parity"]),
    ],
)
def test_test_script_runs_every_check(clone, arguments, calls):
    result = clone.run("test.sh", *arguments, "--", "-k", "some words")
    assert result.returncode == 0, result.stderr
    install = INSTALL.format(root="ROOT")
    parity = "--parity" in arguments
    extras = "demo,dev,parity" if parity else "demo,dev"
    assert clone.calls() == [
        *([f"{install} torch"] if parity else []),
        f"{install} --editable ROOT[{extras}]",
        "ruff check .",
        "ruff format --check .",
        *(f"{PYTEST} -m {markers} -k some words" for markers in calls),
    ]


@pytest.mark.parametrize(
    ("step", "status"), [("ruff check", 1), ("ruff format", 1), ("pytest", 3)]
)
def test_test_script_fails_with_its_steps(clone, step, status):
    assert clone.run("test.sh", FAIL=step).returncode == status
    assert clone.calls()[-1].startswith(step)


@pytest.mark.parametrize(
    ("fail", "status", "expected"),
    [
        ("pytest", "3", 3),
        (f"{PYTEST} -m not parity", "3", 3),
        (f"{PYTEST} -m parity", "3", 3),
        (f"{PYTEST} -m parity", "5", 0),  # No test has the name, as with -k.
        ("pytest", "5", 5),
    ],
)
def test_all_tests_run_though_some_fail(clone, fail, status, expected):
    result = clone.run("test.sh", "--parity", FAIL=fail, STATUS=status)
    assert result.returncode == expected
    assert [call.split()[0] for call in clone.calls()[-2:]] == ["pytest", "pytest"]


def test_unknown_test_argument_is_refused(clone):
    result = clone.run("test.sh", "--parities")
    assert result.returncode == 1
    assert "unknown argument --parities" in result.stderr
    assert not clone.venv.exists()
