"""A copy of the launch scripts, run with stand-ins for Python, pip and df."""

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
