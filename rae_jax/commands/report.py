"""`rae-jax report`: a quickstart folder becomes one HTML page."""

import argparse
from pathlib import Path

from rae_jax.reporting import page

HELP = "Make one HTML page, without outside files, of a quickstart folder."
NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument(
        "workdir",
        type=Path,
        metavar="WORKDIR",
        help="folder of a quickstart, complete or not",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"where the page goes (default: WORKDIR/{NAME})",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it is."""
    path = args.out or args.workdir / NAME
    page.write(args.workdir, path)
    print(f"Report: {path}")
    return 0
