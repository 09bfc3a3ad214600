"""`rae-jax report`: a folder as an HTML page, or runs as tables."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rae_jax import config as configs
from rae_jax import storage

HELP = "Make one HTML page of a quickstart folder, or a table of runs."
NAME = "report.html"
FILE_WIDTH = 160  # Characters of a line where output goes to a file.
_COLORS = {"yes": "green", "no": "red", "unclear": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add = parser.add_argument
    folder = (
        "folder of a quickstart, complete or not; with --table claims the folder that "
        "the workdirs of configs/claims.py lie in"
    )
    add("workdirs", type=storage.path, nargs="+", metavar="WORKDIR", help=folder)
    page = (
        f"where the page goes (default: WORKDIR/{NAME}); with --table ldae a .md or "
        ".json file for the tables"
    )
    add("--out", type=storage.path, metavar="FILE", help=page)
    table = (
        "print tables instead: claims, the RAE paper's claims beside measurements; "
        "ldae, the tables of the l-DAE paper beside what WORKDIRS have"
    )
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
    if args.measure and args.table != "claims":
        raise configs.ConfigError("--measure: only with --table claims.")
    if args.table is not None:
        return TABLES[args.table](args)
    from rae_jax.reporting import ldae_page, page

    workdir = _only_one(args)
    path = args.out or workdir / NAME
    is_ldae = ldae_page.is_run(workdir)
    draw_pictures(workdir if is_ldae else workdir / "ldae")
    (ldae_page if is_ldae else page).write(workdir, path)
    print(f"Report: {path}")
    return 0


def draw_pictures(workdir: Path) -> None:
    """Draws an l-DAE run's pictures if it has a checkpoint and its images are here."""
    from rae_jax.training import checkpoints, logs

    if checkpoints.finished_step(workdir) is None:
        return
    from rae_jax.trainers import ldae_pictures

    try:
        ldae_pictures.draw(workdir)
    except (ValueError, OSError, ImportError) as error:
        logs.warn(f"No pictures of {workdir} were drawn: {error}")


def _only_one(args: argparse.Namespace) -> Path:
    if len(args.workdirs) > 1:
        raise configs.ConfigError(
            f"Give one WORKDIR, not {len(args.workdirs)}: "
            f"{', '.join(map(str, args.workdirs))}."
        )
    return args.workdirs[0]


def _claims(args: argparse.Namespace) -> int:
    from rae_jax.reporting import claim_runs, claims

    if args.out is not None:
        raise configs.ConfigError(
            "--out: only for the page and --table ldae, not with --table claims."
        )
    folder = _only_one(args)
    if args.measure:
        from rae_jax.trainers import claims as measuring
        from rae_jax.training import logs

        measuring.measure(folder, num_samples=args.num_samples, note=logs.note)
    rows = claims.table(folder)
    table = Table("claim", "paper", "expected here", "measured", "seeds", "holds")
    for row in rows:
        seeds = ", ".join(map(str, row.seeds))
        cells = (row.claim, row.paper, row.expected, row.measured, seeds)
        table.add_row(*cells, _colored(row.holds))
    _console().print(table)
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


def _ldae(args: argparse.Namespace) -> int:
    from rae_jax.reporting import ldae, ldae_orderings, ldae_rows, ldae_runs

    if args.out is not None:
        ldae.check_format(args.out)
    runs = ldae_runs.find(args.workdirs)
    found = ldae.tables(runs)
    for table in ldae_rows.TABLES:
        rows = [line.cells() for line in found[table.name]]
        _print(table.title, ldae.HEADS, rows)
    rows = [row.cells() for row in ldae_orderings.rows(args.workdirs, runs)]
    if rows:
        colored = [(*row[:-1], _colored(row[-1])) for row in rows]
        _print("Orderings", ldae_orderings.HEADS, colored)
    if args.out is not None:
        ldae.write(args.workdirs, args.out)
        print(args.out)
    return 0


def _console() -> Console:
    """Returns a console; what is not a terminal has room for whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table without empty columns, but for those of every table."""
    kept = ("paper", "ours", "epochs", "tier")
    used = [i for i, h in enumerate(heads) if h in kept or any(r[i] for r in rows)]
    table = Table(*(heads[i] for i in used), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(row[i] for i in used))
    _console().print(table)


def _colored(verdict: str) -> str:
    return f"[{_COLORS.get(verdict, 'dim')}]{verdict}[/]"


TABLES: dict[str, Callable[[argparse.Namespace], int]] = {
    "claims": _claims,
    "ldae": _ldae,
}
