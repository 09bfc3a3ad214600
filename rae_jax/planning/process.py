"""Plans in a process of their own, where the compiler of a target can be loaded.

A compiler for a chip that is not here needs its environment before JAX is imported,
keeps the memory of all that it has compiled, and may abort instead of raising.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import rae_jax
from rae_jax import config as configs
from rae_jax import storage
from rae_jax.planning import compile as compiling
from rae_jax.planning import predict, targets

RESULT, PROBLEM = "result.json", "problem.txt"


def plan(config: ConfigDict, target: targets.Target, what: str) -> dict[str, Any]:
    """Compiles in a new process and returns `predict.report`.

    Raises:
        ValueError: What the process says is wrong, or that it was killed.
    """
    compiling.check_compiler(target)
    with tempfile.TemporaryDirectory(prefix="rae_jax_plan_") as name:
        folder = Path(name)
        configs.save_config(config, folder / "config.json")
        command = [sys.executable, "-m", __name__, name, target.text, what]
        with (folder / "log").open("w+b") as log:
            process = subprocess.Popen(
                command, env=_environment(), stdout=log, stderr=log
            )
            try:
                code = process.wait()
            finally:
                process.kill()  # If this one is interrupted.
            log.seek(0)
            tail = log.read().decode(errors="replace")[-3000:]
        if (folder / PROBLEM).is_file():
            raise ValueError((folder / PROBLEM).read_text())
        if code or not (folder / RESULT).is_file():
            raise ValueError(_death(target, code, tail))
        return json.loads((folder / RESULT).read_text())


def _environment() -> dict[str, str]:
    environment = os.environ | compiling.ENVIRONMENT
    root = str(Path(rae_jax.__file__).parent.parent)
    paths = [root, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return environment


def _death(target: targets.Target, code: int, tail: str) -> str:
    if code == -9:
        return (
            f"The compiler for {target.text} was killed (SIGKILL), most likely for "
            "lack of memory on this machine; large models take several GB. Close other "
            "programs or plan on a larger machine."
        )
    return f"The compiler for {target.text} ended with code {code}:\n{tail.strip()}"


class _Messages(logging.Handler):
    """Collects what our modules log, such as which attention is used."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main(folder: Path, target_text: str, what: str) -> None:
    """Runs in the new process: writes a result or what is wrong."""
    messages = _Messages()
    logging.getLogger("rae_jax").addHandler(messages)
    logging.getLogger("rae_jax").setLevel(logging.INFO)
    try:
        config = configs.read_config(folder / "config.json")
        target = targets.parse(target_text)
        done = compiling.compiled(config, target, what)
        found = predict.report(done, config, target, what)
    except (ValueError, FileNotFoundError) as error:
        (folder / PROBLEM).write_text(str(error))
        return
    found["notes"] = messages.texts + (found["notes"] or [])
    storage.write_atomically(folder / RESULT, json.dumps(found).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
