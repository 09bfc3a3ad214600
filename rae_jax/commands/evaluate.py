"""`rae-jax evaluate`: the numbers of a finished run."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rae_jax import config as configs

HELP = "Measure a run: reconstruction scores, probe accuracy or Frechet distances."
RESULT_NAME = "evaluation.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("workdir", type=Path, help="folder of any run")
    generation = parser.add_argument_group("latent_diffusion runs")
    generation.add_argument("--num-samples", type=int, default=160, help="default 160")
    generation.add_argument(
        "--num-reference", type=int, default=1024, help="real images, default 1024"
    )
    generation.add_argument("--batch-size", type=int, default=32, help="default 32")
    generation.add_argument("--seed", type=int, default=0, help="default 0")
    generation.add_argument(
        "--guidance-scale", type=float, help="compared with 1; default: the config's"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes `evaluation.json` in the workdir."""
    from rae_jax.trainers import scores
    from rae_jax.training import checkpoints

    config = configs.read_config(args.workdir / checkpoints.CONFIG_NAME)
    if config.trainer == "latent_diffusion":
        found = scores.generation_scores(
            args.workdir,
            num_samples=args.num_samples,
            num_reference=args.num_reference,
            batch_size=args.batch_size,
            seed=args.seed,
            scale=args.guidance_scale,
        )
    else:
        found = scores.run_scores(args.workdir)
    text = json.dumps(found, indent=2, sort_keys=True)
    configs.write_atomically(args.workdir / RESULT_NAME, text.encode())
    table = Table("score", "value")
    for name, value in sorted(found.items()):
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    return 0
