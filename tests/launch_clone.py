"""A copy of the launch scripts, run with stand-ins for what they start.

Those of gcloud and ssh run what they are told to on "workers": folders of this machine.
`rae-jax` there ends as the file `plan` says, one word for each run.
"""

import shlex
import shutil
import stat
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14", "python3", "python")

# Answers the version probe, makes environments that hold itself, and logs the rest.
PYTHON = """#!/usr/bin/env bash
case "$1 ${2-}" in
"-c "*) echo 3.11.9 ;;
"-m venv")
  mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"
  cp "$0" "$3/bin/python"
  printf '#!/usr/bin/env bash\\nprintf "[%%s]" rae-jax "$@"\\n' >"$3/bin/rae-jax"
  chmod +x "$3/bin/rae-jax"
  ;;
"-m pip" | "-m ruff" | "-m pytest")
  [[ $3 == --version ]] || echo "${*:2}" >>"$CALLS"
  [[ "${*:2}" != ${FAIL-nothing}* ]] || exit "${STATUS-3}"
  ;;
esac
"""
# For `python -c`: a suite in the background ignores SIGINT, and so would its children.
HEEDS_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
DF = "#!/usr/bin/env bash\nprintf 'h\\nd 9 9 {free} 9 /\\n'\n"
# Ends as the next line of $FAKE/plan says: a code; `gone`, as if the pod was taken
# away; `wait`, when it gets SIGTERM.
RAE_JAX = r"""#!/usr/bin/env bash
echo "rae-jax $* A=${A-} distributed=${RAE_DISTRIBUTED-}" >>"$FAKE/runs"
echo "training in ${PWD##*/}"
next=$(head -n 1 "$FAKE/plan")
sed -i 1d "$FAKE/plan"
case $next in
  gone) echo SUSPENDED >"$FAKE/request"; echo PREEMPTED >"$FAKE/pod"; exit 134 ;;
  wait) trap 'exit 75' TERM; touch "$FAKE/waits"; while :; do sleep 0.1; done ;;
esac
exit "${next:-0}"
"""
# Keeps the state of request and pod in files; FAIL holds a part of a command line.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "gcloud ${*@Q}" >>"$FAKE/calls"
if [[ -s $FAKE/fail && "$*" == *"$(<"$FAKE/fail")"* ]]; then
  echo "ERROR: denied" >&2
  exit 1
fi
show() { cat "$FAKE/$1" 2>/dev/null || { echo "NOT_FOUND: none" >&2; exit 1; }; }
on_workers() {
  local code=0
  for worker in 0 1; do
    [[ $worker == 0 || $* != *"worker.sh "[rls]* ]] || continue # One plan.
    mkdir -p "$FAKE/$worker"
    (cd "$FAKE/$worker" && HOME=$PWD "$@") || code=$?
  done
  return "$code"
}
case "$*" in
  *"queued-resources describe"*) show request ;;
  *"tpu-vm describe"*) show pod ;;
  *"queued-resources create"*) echo ACTIVE >"$FAKE/request"; echo READY >"$FAKE/pod" ;;
  *"tpu-vm create"*) echo READY >"$FAKE/pod" ;;
  *" delete "*) rm -rf "$FAKE"/{request,pod,0,1} ;;
  *" scp "*) archive=${*: -2:1}; on_workers cp "$archive" rae_jax.tar.gz ;;
  *" ssh "*)
    for word in "$@"; do
      [[ $word != --command=* ]] || on_workers bash -c "${word#--command=}" || exit
    done
    ;;
esac
"""
SSH = r"""#!/usr/bin/env bash
printf '%s\n' "${0##*/} ${*@Q}" >>"$FAKE/calls"
[[ ! -s $FAKE/down ]] || { sed -i 1d "$FAKE/down"; exit 255; }
mkdir -p "$FAKE/0"
cd "$FAKE/0"
case $0 in
  *scp) cp "${*: -2:1}" rae_jax.tar.gz ;;
  *) HOME=$PWD bash -c "${*: -1}" ;;
esac
"""
RECORD = r"""#!/usr/bin/env bash
printf '%s\n' "${0##*/} ${*@Q}" >>"$FAKE/calls"
case "${0##*/} $*" in
  sbatch*) echo "77;cluster" ;;
  "scontrol --oneliner"*) echo "JobId=77 JobState=$(head -1 "$FAKE/plan") ExitCode=9:0"
    sed -i 1d "$FAKE/plan" ;;
  "scontrol show hostnames"*) printf 'node1\nnode2\n' ;;
  "srun"*) SLURM_PROCID=1 "${@:2}" || exit ;;
esac
[[ ! -s $FAKE/fail || "$*" != *"$(<"$FAKE/fail")"* ]]
"""
POD = ("--name=rae", "--zone=z", "--type=v5p-16")
TRAIN = ("--", "rae-jax", "train", "--workdir", "my runs")


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Clone:
    """A copy of the scripts in a folder with a space, and stand-ins first on PATH."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone"
        self.venv = self.root / ".venv"
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.calls_file = folder / "calls"
        self.bin.mkdir()
        self.home.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        write_script(self.bin / "df", DF.format(free=50_000_000))
        for name in PYTHONS:
            write_script(self.bin / name, PYTHON)

    def environment(self) -> dict[str, str]:
        """Returns the only variables that the scripts see."""
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.home),
            "CALLS": str(self.calls_file),
        }

    def run(self, script: str, *arguments: str, **variables: str):
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments],
            cwd=self.home,
            env=self.environment() | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        """What was run with -m since the last call, one line each."""
        lines = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return lines.replace(str(self.root), "ROOT").splitlines()


class Cluster(Clone):
    """A clone whose launchers find stand-ins only."""

    def __init__(self, folder):
        super().__init__(folder)
        self.fake = folder / "fake"
        self.fake.mkdir()
        for name in ("LICENSE", "README.md"):
            (self.root / name).touch()
        for name in ("configs", "rae_jax"):
            (self.root / name).mkdir()
        write_script(self.bin / "gcloud", GCLOUD)
        for name in ("ssh", "scp"):
            write_script(self.bin / name, SSH)
        for name in ("xpk", "kubectl", "sbatch", "scontrol", "srun", "squeue"):
            write_script(self.bin / name, RECORD)
        # What the stand-in of pip's environment holds.
        python = (self.bin / "python3.11").read_text()
        rae_jax = f"cat >\"$3/bin/rae-jax\" <<'END'\n{RAE_JAX}END\n"
        lines = python.splitlines(keepends=True)
        lines = [rae_jax if "printf '#!" in line else line for line in lines]
        write_script(self.bin / "python3.11", "".join(lines))

    def __call__(self, script, *arguments, plan="", fail="", **variables):
        (self.fake / "plan").write_text(plan.replace(" ", "\n") + "\n")
        (self.fake / "fail").write_text(fail)
        return self.run(script, *arguments, **variables)

    def environment(self):
        fake = str(self.fake)
        own = dict(FAKE=fake, TMPDIR=fake, RAE_POLL_SECONDS="0")
        return super().environment() | own

    def read(self, name):
        path = self.fake / name
        return path.read_text().splitlines() if path.exists() else []

    def verbs(self):
        """The gcloud calls but those that describe, as `tpu-vm create`."""
        words = [shlex.split(call)[3:5] for call in self.read("calls")]
        return [" ".join(pair) for pair in words if pair[1] != "describe"]

    def logs(self):
        paths = sorted((self.root / "runs" / "launch").glob("*.log"))
        return [path.read_text() for path in paths]
