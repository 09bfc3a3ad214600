"""`rae-jax train`: one config, one workdir."""

import argparse

from rae_jax import config as configs
from rae_jax import storage

HELP = "Train (or resume) the run of a config file in a workdir."
EPILOG = """\
Values of the config are overridden by --config.key=value, such as
--config.data.batch_size=64. The same command continues a run that has stopped.

exit status:
  0    finished
  1    an error: a wrong config, a full disk, a loss that is no number; it is named
  2    wrong arguments
  75   stopped by SIGTERM (a preempted machine) after a checkpoint: run it again
  79   nothing moved for config.watchdog seconds; stacks.txt in the workdir has the
       stacks of all threads: run it again
  130  stopped by Ctrl-C, after a checkpoint once a step has been made
A process that is killed (137, or 143 before the first step) loses what came after its
last checkpoint, no more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="experiment file"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=storage.path,
        help="folder of the run: config, checkpoints, logs, pictures",
    )
    parser.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of the config, or blocks of them, that may differ from those the "
        "run was started with, such as data.batch_size",
    )
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Trains to the end; a second call continues."""
    config = configs.load_config(args.config, args.overrides)
    from rae_jax.trainers import registry
    from rae_jax.training import logs

    registry.train(
        config,
        args.workdir,
        allow_change=args.allow_change,
        started=logs.process_start(),
    )
    print(f"Finished: {args.workdir}")
    return 0
