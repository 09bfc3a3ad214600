"""`rae-jax VERB ...`: finds the verb and turns expected errors into one message."""

import argparse
import ctypes
import importlib
import sys
from collections.abc import Sequence

from rae_jax import __version__

VERBS = ("train", "quickstart", "prepare", "reconstruct", "sample", "evaluate")
VERBS += ("convert", "report", "plan", "bench")
# Those that several processes may run as one.
TOGETHER = ("train", "sample", "evaluate", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="rae-jax", description="Representation autoencoders and l-DAE in JAX."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    # A verb's module imports JAX and more: only the one that is called is loaded
    # in full, unless all are listed.
    asked = [word for word in argv[:1] if word in VERBS]
    for verb in asked or VERBS:
        module = importlib.import_module(f"rae_jax.commands.{verb}")
        sub = verbs.add_parser(verb, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    try:
        args, rest = parser.parse_known_args(argv)
    except ModuleNotFoundError as error:  # Of a bucket that an argument names.
        parser.error(str(error))
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(args, "overrides"):
        args.overrides = rest
    return _run(args)


def reuse_freed_memory() -> None:
    """Lets glibc keep freed memory instead of returning it to the system.

    On a CPU, XLA allocates the buffers of every step anew. By default each large one
    is mapped, cleared page by page and unmapped again, which took up to half of a
    small model's step. Call it before JAX starts its threads. Elsewhere than on
    glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # From malloc.h.
    mallopt(arena_max, 1)  # Other arenas cannot hold large blocks.
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)


def _run(args: argparse.Namespace) -> int:
    reuse_freed_memory()
    from rae_jax.training import checkpoints, distributed, interrupts

    try:
        if args.verb in TOGETHER:
            distributed.initialize()
        return args.run(args)
    except (interrupts.Interrupted, KeyboardInterrupt) as stop:
        print(f"\n{str(stop) or 'Interrupted.'}", file=sys.stderr)
        return getattr(stop, "exit_status", interrupts.EXIT_INTERRUPTED)
    except (
        ValueError,
        OSError,
        ModuleNotFoundError,
        FloatingPointError,
        checkpoints.CheckpointError,
    ) as error:
        print(f"rae-jax {args.verb}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
