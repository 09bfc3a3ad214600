"""`rae-jax prepare`: a folder of images becomes shards or a packed array."""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from rae_jax.data import preparing, sources

HELP = "Turn a folder of images into ArrayRecord shards, or into one .npz."

_SHOWN = 20  # skipped files named on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb to its parser."""
    add = parser.add_argument
    add("src", metavar="SRC", help="folder of images or of class folders")
    add("dst", metavar="DST", nargs="?", help="folder for shards, or OUT.npz to pack")
    pack = "write centre crops as one array (arr_0, uint8), as references of rFID are"
    add("--pack", metavar="OUT.npz", help=f"{pack}; needs --size")
    limit = f"pack only the first N images (default: {preparing.PACK_LIMIT})"
    add("--limit", type=_positive, metavar="N", help=limit)
    layouts = "class: one folder per class; flat: no labels (default: what is found)"
    add("--layout", choices=("auto", "class", "flat"), default="auto", help=layouts)
    bad = "leave out files that cannot be read, and list them"
    add("--skip-bad", action="store_true", help=bad)
    _add_encoding(parser)
    add("--shards", type=_positive, metavar="N", help="number of files")
    workers, cores = "number of processes (default: all cores)", os.cpu_count() or 1
    add("--workers", type=_positive, metavar="N", default=cores, help=workers)


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=_positive,
        metavar="N",
        help="side of the crops; without a crop the shorter side is reduced to N "
        "(default: keep the files as they are)",
    )
    parser.add_argument(
        "--transform",
        choices=("center_crop", "none"),
        default="none",
        help="crop to a square with ADM's filter, or keep the shape (default: none)",
    )
    either = parser.add_mutually_exclusive_group()
    quality = "JPEG quality of resized images, 1 to 100 (default: 95)"
    either.add_argument(
        "--quality", type=_positive, metavar="Q", default=95, help=quality
    )
    either.add_argument("--png", action="store_true", help="store them without loss")


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns 0, or 1 after a message on the error stream."""
    try:
        return _prepare(args)
    except BrokenProcessPool:
        problem = (
            "a worker process was killed, perhaps for lack of memory. Run the same "
            "command again to continue; fewer --workers need less memory"
        )
    except OSError as error:
        problem = f"cannot read or write: {error}"
    except ValueError as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted; run the same command again to continue"
    print(f"rae-jax prepare: {problem}", file=sys.stderr)
    return 1


def _prepare(args: argparse.Namespace) -> int:
    target, pack = _target(args)
    if args.quality > 100:
        raise ValueError(f"--quality must be from 1 to 100, got {args.quality}.")
    transform = "center_crop" if pack else args.transform
    if transform == "center_crop" and args.size is None:
        raise ValueError("a centre crop needs --size, for example --size 256.")
    if args.limit is not None and not pack:
        raise ValueError("--limit belongs to --pack.")
    recipe = preparing.Recipe(
        size=args.size,
        transform=transform,
        quality=None if args.png else args.quality,
        skip_bad=args.skip_bad,
    )
    source = _open(args, pack)
    print(f"{len(source)} images, {source.num_classes} classes in {args.src}")
    limit = (args.limit or preparing.PACK_LIMIT) if pack else len(source)
    total = min(len(source), limit)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("preparing", total=total)
        options = dict(workers=args.workers, progress=lambda n: bar.advance(task, n))
        if pack:
            options["limit"] = limit
            skipped = preparing.write_pack(source, target, recipe, **options)
        else:
            options["shards"] = args.shards
            metadata = preparing.write_shards(source, target, recipe, **options)
            skipped = metadata["skipped"]
    _report(total - len(skipped), target, skipped)
    return 0


def _open(args: argparse.Namespace, pack: bool) -> preparing.Source:
    """Opens the images; those to be packed are all below the folder, as officially."""
    if pack and args.layout == "auto":
        return preparing.Tree(args.src)
    return sources.open_folder(args.src, args.layout)


def _target(args: argparse.Namespace) -> tuple[Path, bool]:
    if (args.dst is None) == (args.pack is None):
        raise ValueError("name either a destination DST or --pack OUT.npz.")
    target = Path(args.pack or args.dst).expanduser()
    if args.pack and target.suffix != ".npz":
        raise ValueError(f"--pack writes an .npz file, got {args.pack!r}.")
    return target, target.suffix == ".npz"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _report(count: int, target: Path, skipped: list[str]) -> None:
    print(f"{count} images in {target}")
    if not skipped:
        return
    print(f"Skipped {len(skipped)} files that cannot be read:")
    for line in skipped[:_SHOWN]:
        print(f"  {line}")
    if len(skipped) > _SHOWN:
        print(f"  and {len(skipped) - _SHOWN} more")
