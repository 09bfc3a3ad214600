"""`rae-jax sample`: images from a trained diffusion model."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import Progress

from rae_jax import config as configs

HELP = "Generate images with a latent_diffusion run, or with converted weights."
EXAMPLES = """\
  rae-jax sample runs/dit_dh --out samples.png
  rae-jax sample --model dit-dh-xl-256 --autoencoder rae-dinov2-b \\
      --labels 207,360 --num-samples 8 --out samples.png
  rae-jax sample --model dit-dh-xl-256 --autoencoder rae-dinov2-b \\
      --guide dit-dh-s-256-ep14 --guidance-scale 1.42 --num-samples 50000 --out 50k.npz

SRC is a file or folder of any layout (see rae-jax convert), a hub id, a name of a
published model, or the workdir of a run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("workdir", type=Path, nargs="?", help="folder of a latent_diffusion run")
    add(
        "--out",
        type=Path,
        required=True,
        help="a picture (.png: one grid), an array (.npz: arr_0, labels) or a folder",
    )
    add("--num-samples", type=int, default=64, help="default 64")
    add("--batch-size", type=int, default=32, help="default 32")
    add("--seed", type=int, default=0, help="default 0")
    add(
        "--labels",
        help="class names or numbers, separated by commas; default: all, balanced",
    )
    add("--guidance-scale", type=float, help="1 for none; default: the config's, or 1")
    add("--guidance-interval", help="times LOW,HIGH; default: the config's, or 0,1")
    add("--num-points", type=int, help="of the grid; default: the config's, or 50")
    add("--decoder", help="workdir of a rae_decoder run, if not the config's")
    group = parser.add_argument_group("instead of a workdir")
    add = partial(group.add_argument, metavar="SRC")
    add("--model", help="diffusion transformer")
    add("--autoencoder", help="autoencoder of its latents")
    add("--guide", help="weaker diffusion transformer, for autoguidance")
    add("--latent-stats", help="statistics in place of the autoencoder's")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of products; default float32"
    )


def run(args: argparse.Namespace) -> int:
    """Generates, shows progress and writes `--out`."""
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1.")
    generator, names, scale = load(args)
    labels = choose_labels(args.labels, names, args.num_samples, args.seed)
    scale = scale if args.guidance_scale is None else args.guidance_scale
    batches = generator.images(
        labels, scale=scale, seed=args.seed, batch_size=args.batch_size
    )
    parts = []
    with Progress() as bar:
        task = bar.add_task("sampling", total=len(labels))
        for part in batches:
            parts.append(part)
            bar.advance(task, len(part))
    images = np.concatenate(parts)
    save(args.out, images, labels)
    print(f"{len(images)} images: {args.out}")
    return 0


def load(
    args: argparse.Namespace,
) -> tuple[Any, tuple[str, ...], float]:
    """Returns the generator, the names of its classes and its usual guidance scale.

    Raises:
        ConfigError: Arguments are missing or do not go together.
    """
    from rae_jax.trainers import generation, inputs

    check_arguments(args)
    sampling = {"num_points": args.num_points}
    sampling["guidance_interval"] = parse_interval(args.guidance_interval)
    sampling = {k: v for k, v in sampling.items() if v is not None}
    if args.workdir is not None:
        generator = generation.load(args.workdir, args.decoder or "", **sampling)
        names = inputs.class_names(generator.config.data, generator.num_classes)
        return generator, names, generator.config.sampling.guidance_scale
    generator = generation.load_converted(
        args.model,
        args.autoencoder,
        guide=args.guide,
        latent_stats=args.latent_stats,
        dtype=args.dtype or "float32",
        **sampling,
    )
    return generator, tuple(map(str, range(generator.num_classes))), 1.0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a ConfigError where arguments are missing or contradict each other."""
    converted = ("model", "autoencoder", "guide", "latent_stats", "dtype")
    given = [f"--{n.replace('_', '-')}" for n in converted if getattr(args, n)]
    if args.workdir is not None and given:
        raise configs.ConfigError(
            f"Give the workdir of a run or {', '.join(given)}, not both."
        )
    if args.workdir is None and not (args.model and args.autoencoder):
        raise configs.ConfigError(
            "Give the workdir of a run, or --model and --autoencoder."
        )
    if args.workdir is None and args.decoder:
        raise configs.ConfigError("--decoder goes with a workdir; give --autoencoder.")
    if args.guide and args.guidance_scale is None:
        raise configs.ConfigError(
            "Give --guidance-scale for the --guide; the published results have 1.42 at "
            "256 pixels and 1.5 at 512."
        )


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """Turns LOW,HIGH into two times; a ConfigError if it is not that."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise configs.ConfigError(
            f"--guidance-interval {text!r}: give two times, such as 0,1."
        ) from error
    return low, high


def choose_labels(
    text: str | None, names: tuple[str, ...], count: int, seed: int
) -> np.ndarray:
    """Returns `count` labels: balanced over all classes, or over the named ones.

    Raises:
        ConfigError: For a class that is neither a name nor a number of one.
    """
    from rae_jax.evaluation import generate

    if text is None:
        return generate.balanced_labels(count, len(names), seed)
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        if word in names:
            chosen.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            chosen.append(int(word))
        else:
            raise configs.ConfigError(configs.suggest(word, names, "class"))
    return np.resize(np.asarray(chosen, np.int32), count)


def save(out: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes images as one picture, as an .npz for evaluators, or one file each."""
    from rae_jax.evaluation import pictures

    if out.suffix == ".png":
        pictures.save_grid(out, images, columns=max(1, round(len(images) ** 0.5)))
    elif out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, arr_0=images, labels=labels)
    else:
        out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(out / f"{i:06d}.png")
        classes = {f"{i:06d}.png": int(y) for i, y in enumerate(labels)}
        configs.write_atomically(out / "labels.json", json.dumps(classes).encode())
