"""`rae-jax train`: one config, one workdir."""

import argparse
from pathlib import Path

from rae_jax import config as configs

HELP = "Train (or resume) the run of a config file in a workdir."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.epilog = (
        "Values of the config are overridden by --config.key=value, such as "
        "--config.data.batch_size=64."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="experiment file"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=Path,
        help="folder of the run: config, checkpoints, logs, pictures",
    )
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Trains to the end; a second call continues."""
    config = configs.load_config(args.config, args.overrides)
    from rae_jax.trainers import registry

    registry.train(config, args.workdir)
    print(f"Finished: {args.workdir}")
    return 0
