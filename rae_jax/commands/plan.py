"""`rae-jax plan`: what a config costs on machines that are not here."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rae_jax import config as configs

HELP = "Say what a config costs on TPUs or GPUs, by compiling it for them here."
EPILOG = """\
  rae-jax plan --config configs/dit_dh.py:xl_256 --target v5p:4x4x4 --target h100:8
  rae-jax plan --config configs/dit_dh.py --what sample --target v6e:2x2 --json
  rae-jax plan --config configs/dit_dh.py --target v6e:4x4 --search \\
      --config.data.latents=data/latents

Targets are a kind and a topology: v3, v4, v5e, v5p and v6e by the chips along each
axis of a slice (v5p:4x4x4; v5e:16x16*2 for two slices), a100, h100 and h200 by their
number. Values of the config are overridden by --config.key=value.

The real compiler runs, so a large model takes minutes on a few cores and some
gigabytes; neither weights nor data are needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:VARIANT]", help="experiment file")
    add(
        "--target",
        required=True,
        action="append",
        metavar="KIND:TOPOLOGY",
        help="such as v5p:4x4x4, v6e:4x4 or h100:8; may be repeated",
    )
    add(
        "--what",
        choices=("train", "sample", "decode"),
        default="train",
        help="a training step, a batch of sampled latents, or a batch of decoded "
        "images; default train",
    )
    search = (
        "try meshes, rematerialisation and batch sizes, some ten compiles for each "
        "target, and rank them; Ctrl-C ranks what is known"
    )
    add("--search", action="store_true", help=search)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Compiles for every target and prints what was found."""
    config = configs.load_config(args.config, args.overrides)
    from rae_jax.planning import compile as compiling
    from rae_jax.planning import process, targets

    chosen = [targets.parse(text) for text in args.target]
    for target in chosen:
        compiling.check_compiler(target)  # All of them, before the first minutes.
    reports, problems = [], []
    for target in chosen:

        def plan(changed: Any, target: Any = target) -> dict[str, Any]:
            with _progress(args.config, target, changed):
                return process.plan(changed, target, args.what)

        try:
            found = _search(config, target, plan) if args.search else [plan(config)]
            reports.append(found)
        except ValueError as error:  # Minutes went into the others: show them.
            problems.append(f"{target.text}: {error}")
    if reports:
        _print(args, reports)
    if problems:
        raise ValueError("\n".join(problems))
    return 0


def _search(config: Any, target: Any, plan: Callable[[Any], Any]) -> list[Any]:
    """Returns the plans of a search, the fastest first; Ctrl-C ends it early."""
    from rae_jax.planning import search, tables

    found = []
    try:
        for _, report in search.search(config, target, plan):
            found.append(report)
            print(f"  {tables.summary(report)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not found:
            raise
        print("Interrupted: this is what is known.", file=sys.stderr)
    return sorted(found, key=search.rank)


def _print(args: argparse.Namespace, reports: list[list[dict[str, Any]]]) -> None:
    from rae_jax.planning import tables

    best = [found[0] for found in reports]
    if args.json:
        print(json.dumps(_nested(args, reports), indent=2))
        return
    console = Console()
    if args.search:
        for found in reports:
            tables.show_ranking(found, console)
    if args.markdown:
        print(tables.markdown(best))
    else:
        tables.show(best, f"{args.config}, {args.what}", console)


def _nested(args: argparse.Namespace, reports: list[list[dict[str, Any]]]) -> Any:
    """Returns one plan, or a list of them; with --search, lists of choices."""
    found = reports if args.search else [each[0] for each in reports]
    return found[0] if len(found) == 1 else found


@contextmanager
def _progress(name: str, target: Any, config: Any) -> Iterator[None]:
    """Shows on standard error what is being compiled, and for how long."""
    sizes = "x".join(str(n) for n in dict(config.mesh).values())
    choice = f"batch {config.data.batch_size}, mesh {sizes}"
    if "remat" in config.get("model", {}):
        choice += f", remat {config.model.remat}"
    text = f"Compiling {name} for {target.text} ({choice})"
    start = time.monotonic()
    if sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"))
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            bar.add_task(text, total=None)
            yield
        return
    print(f"{text} ...", file=sys.stderr, flush=True)
    yield
    print(f"  {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
