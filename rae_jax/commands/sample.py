"""`rae-jax sample`: images from a trained diffusion model."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from rae_jax import config as configs

HELP = "Generate images with a trained latent_diffusion run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("workdir", type=Path, help="folder of a latent_diffusion run")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a picture (.png: one grid), an array (.npz: arr_0, labels) or a folder",
    )
    parser.add_argument("--num-samples", type=int, default=64, help="default 64")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--guidance-scale", type=float, help="1 for none; default: the config's"
    )
    parser.add_argument(
        "--labels",
        help="class names or numbers, separated by commas; default: all, balanced",
    )
    parser.add_argument(
        "--decoder",
        default="",
        help="workdir of a rae_decoder run, if not the config's",
    )


def run(args: argparse.Namespace) -> int:
    """Generates, shows progress and writes `--out`."""
    from rae_jax.trainers import generation, inputs

    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1.")
    generator = generation.load(args.workdir, args.decoder)
    names = inputs.class_names(generator.config.data, generator.num_classes)
    labels = choose_labels(args.labels, names, args.num_samples, args.seed)
    scale = args.guidance_scale
    scale = generator.config.sampling.guidance_scale if scale is None else scale
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
