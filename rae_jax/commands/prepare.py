"""`rae-jax prepare`: a folder of images becomes shards, a packed array or latents."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.data import preparing, sources

HELP = "Turn images into ArrayRecord shards, one .npz, or an encoder's latents."
EXAMPLES = """\
  rae-jax prepare imagenet/train data/imagenet256 --size 256 --transform center_crop
  rae-jax prepare imagenet/val --pack reference.npz --size 256
  rae-jax prepare --latents data/latents --config configs/dit_dh.py:dinov2_b \\
      --config.data.path=data/imagenet256
Latents are those of the config's encoder and data, and of mirror images where it has
data.flip=True. Train on them by --config.data.latents=data/latents, in the same order
as on the images. SRC, DST and OUT.npz may lie in buckets (gs://, s3://).
"""

_SHOWN = 20  # skipped files named on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb to its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples:\n" + EXAMPLES
    add = parser.add_argument
    folder = "folder of images or of class folders; not with --latents"
    add("src", metavar="SRC", nargs="?", help=folder)
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
    workers = "number of processes (default: all cores; with --latents the config's)"
    add("--workers", type=_positive, metavar="N", help=workers)
    _add_latents(parser)


def _add_latents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("latents").add_argument
    latents = "write the latents of a config's data and encoder, as bfloat16 shards"
    add("--latents", metavar="DST", help=latents)
    config = "experiment file; values are overridden by --config.key=value"
    add("--config", metavar="FILE.py[:VARIANT]", help=config)
    batch = "images per call of the encoder (default: 64 per device)"
    add("--batch-size", type=_positive, metavar="N", help=batch)
    parser.set_defaults(overrides=[])


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
        return _prepare(args) if args.latents is None else _prepare_latents(args)
    except BrokenProcessPool:
        problem = (
            "a worker process was killed, perhaps for lack of memory. Run the same "
            "command again to continue; fewer --workers need less memory"
        )
    except OSError as error:
        # Those of our own, on buckets and weights to be downloaded, have no number.
        ours = error.errno is None
        problem = str(error) if ours else f"cannot read or write: {error}"
    except (ValueError, ModuleNotFoundError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted; run the same command again to continue"
    print(f"rae-jax prepare: {problem}", file=sys.stderr)
    return 1


def _prepare(args: argparse.Namespace) -> int:
    if args.overrides or args.config or args.batch_size:
        given = args.overrides or ["--config" if args.config else "--batch-size"]
        raise ValueError(f"{' '.join(given)}: unrecognized without --latents DST.")
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
    with _progress(total, every=0) as advance:
        options = dict(workers=args.workers or os.cpu_count() or 1, progress=advance)
        if pack:
            options["limit"] = limit
            skipped = preparing.write_pack(source, target, recipe, **options)
        else:
            options["num_shards"] = args.shards
            metadata = preparing.write_shards(source, target, recipe, **options)
            skipped = metadata["skipped"]
    _report(total - len(skipped), target, skipped)
    return 0


def _prepare_latents(args: argparse.Namespace) -> int:
    """Encodes the images of a config; a second call continues."""
    if args.config is None:
        raise ValueError(
            "--latents needs --config FILE.py[:VARIANT], for example dit_dh's."
        )
    for value, option in (
        (args.src, "SRC"),
        (args.pack, "--pack"),
        (args.size, "--size"),
    ):
        if value is not None:
            raise ValueError(
                f"--latents reads the images that the config names; {option} does not "
                "belong to it. Give --config.data.source and --config.data.path."
            )
    config = configs.load_config(args.config, args.overrides)
    if args.workers is not None and "data" in config:
        config.data.num_workers = args.workers
    from rae_jax.trainers import latent_cache
    from rae_jax.training import sharding

    mesh = sharding.make_mesh()
    options = dict(batch_size=args.batch_size, num_shards=args.shards)
    job = latent_cache.make_job(config, storage.path(args.latents), mesh, **options)
    print(job.describe())
    with _progress(job.total, every=60) as advance:
        job.run(mesh, advance)
    print(f"{job.total} images in {args.latents}")
    print(f"Train on them with --config.data.latents={args.latents}")
    return 0


@contextmanager
def _progress(total: int, *, every: float) -> Iterator[Callable[[int], Any]]:
    """Shows a bar, or without a terminal a line `every` so many seconds (0: none).

    Yields a function that is called with numbers of images; what a first call says
    was done earlier and does not count for the rate.
    """
    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), TimeLeft()) as bar:
        task = bar.add_task("", total=total, speed="")
        start = shown = time.monotonic()
        first, done = None, 0

        def advance(count: int) -> None:
            nonlocal first, done, shown
            done += count
            first = done if first is None else first
            now = time.monotonic()
            speed = f"{(done - first) / max(now - start, 1e-9):.1f} images/s"
            bar.update(task, advance=count, speed=speed)
            if every and now - shown > every and not bar.console.is_terminal:
                shown = now
                bar.console.print(f"preparing {done}/{total} {speed}")

        yield advance


def _open(args: argparse.Namespace, pack: bool) -> preparing.Source:
    """Opens the images; those to be packed are all below the folder, as officially."""
    if pack and args.layout == "auto":
        return preparing.Tree(args.src)
    return sources.open_folder(args.src, args.layout)


def _target(args: argparse.Namespace) -> tuple[Path, bool]:
    if args.src is None:
        raise ValueError("name the folder of images, SRC.")
    if (args.dst is None) == (args.pack is None):
        raise ValueError("name either a destination DST or --pack OUT.npz.")
    target = storage.path(args.pack or args.dst).expanduser()
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
