"""`rae-jax report`: a quickstart folder as an HTML page, or runs as a table."""

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rae_jax import config as configs

HELP = "Make one HTML page of a quickstart folder, or a table of runs."
NAME = "report.html"
_COLORS = {"yes": "green", "no": "red", "unclear": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add = parser.add_argument
    folder = (
        "folder of a quickstart, complete or not; with --table claims the folder that "
        "the workdirs of configs/claims.py lie in"
    )
    add("workdirs", type=Path, nargs="+", metavar="WORKDIR", help=folder)
    page = f"where the page goes (default: WORKDIR/{NAME})"
    add("--out", type=Path, metavar="FILE.html", help=page)
    table = "print a table instead: claims, the paper's claims beside measurements"
    add("--table", choices=TABLES, help=table)
    group = parser.add_argument_group("--table claims")
    measure = "first draw and measure samples of runs that have none (minutes)"
    group.add_argument("--measure", action="store_true", help=measure)
    group.add_argument(
        "--num-samples",
        type=int,
        default=160,
        metavar="N",
        help="samples of each run that is measured, default 160",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page or prints the table, and says where files are."""
    if args.table is not None:
        if args.out is not None:
            raise configs.ConfigError("--out: only for the page, not with --table.")
        return TABLES[args.table](args)
    if args.measure:
        raise configs.ConfigError("--measure: only with --table claims.")
    from rae_jax.reporting import page

    workdir = _only_one(args)
    path = args.out or workdir / NAME
    page.write(workdir, path)
    print(f"Report: {path}")
    return 0


def _only_one(args: argparse.Namespace) -> Path:
    if len(args.workdirs) > 1:
        raise configs.ConfigError(
            f"Give one WORKDIR, not {len(args.workdirs)}: "
            f"{', '.join(map(str, args.workdirs))}."
        )
    return args.workdirs[0]


def _claims(args: argparse.Namespace) -> int:
    from rae_jax.reporting import claim_runs, claims

    folder = _only_one(args)
    if args.measure:
        from rae_jax.trainers import claims as measuring
        from rae_jax.training import logs

        measuring.measure(folder, num_samples=args.num_samples, note=logs.note)
    rows = claims.table(folder)
    table = Table("claim", "paper", "expected here", "measured", "seeds", "holds")
    for row in rows:
        color = _COLORS.get(row.holds, "dim")
        seeds = ", ".join(map(str, row.seeds))
        holds = f"[{color}]{row.holds}[/]"
        cells = (row.claim, row.paper, row.expected, row.measured, seeds)
        table.add_row(*cells, holds)
    Console().print(table)
    found = claims.scales(claim_runs.find(folder))
    for name, what in claims.SCALES.items() if found else ():
        real, noise = (found[f"{name}_{end}"] for end in ("real", "noise"))
        print(f"{name} ({what}): real crops {real:.4g}, noise {noise:.4g}")
    for path in claims.write(folder, rows):
        print(path)
    lines = claims.missing(rows)
    if lines:
        print("Missing; `bash launch/claims.sh` makes all of it, or one by one:")
        print("\n".join(f"  {line}" for line in lines))
    return 0


TABLES: dict[str, Callable[[argparse.Namespace], int]] = {"claims": _claims}
