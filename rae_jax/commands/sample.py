"""`rae-jax sample`: images from a trained diffusion model."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.data import class_names
from rae_jax.evaluation import rates

HELP = "Generate images with a diffusion model, of a run or of converted weights."
EXAMPLES = """\
  rae-jax sample runs/dit_dh --out samples.png
  rae-jax sample runs/dit_dh --guidance-scale 1,1.5,2 --sampler heun --out scale.png
  rae-jax sample --model dit-dh-xl-256 --autoencoder rae-dinov2-b \\
      --labels "golden retriever,otter,88" --num-samples 9 --out samples.png
  rae-jax sample --model dit-dh-xl-256 --autoencoder rae-dinov2-b \\
      --guide dit-dh-s-256-ep14 --guidance-scale 1.42 --num-samples 50000 --out 50k.npz
  rae-jax sample runs/early --guidance internal --guidance-scale 1.5 --out early.png
  rae-jax sample runs/t1_linear_g2 --num-points 100 --out samples.png  # of l-DAE

SRC is a file or folder of any layout (see rae-jax convert), a hub id, a name of a
published model, or the workdir of a run.

The same command continues an .npz or a folder where it was interrupted. Its images are
a function of the seed and their numbers: neither batch size nor devices change them.
"""
AUTOGUIDANCE = "autoguidance"
GUIDANCE = ("cfg", AUTOGUIDANCE, "internal")  # As in trainers.sampling.
_SHOWN = 20  # Classes that are printed.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    folder = "folder of a latent_diffusion run, or of an l-DAE that generates"
    add("workdir", type=storage.path, nargs="?", help=folder)
    out = "a picture (.png: one grid), an array (.npz: arr_0, labels) or a folder"
    add("--out", type=storage.path, required=True, help=out)
    latents = "also write the normalised latents, for rae-jax evaluate --latents"
    add("--latents", type=storage.path, metavar="OUT.npz", help=latents)
    add("--num-samples", type=int, default=64, help="default 64")
    add("--batch-size", type=int, default=32, help="default 32")
    add("--seed", type=int, default=0, help="default 0")
    labels = (
        "classes by number or name, separated by commas: names of the run's data, or "
        "ImageNet's where the network has its 1000 classes; default: all"
    )
    add("--labels", help=labels)
    mode = "equal numbers of each class, or each sample's at random; default balanced"
    add("--label-mode", choices=("balanced", "random"), default="balanced", help=mode)
    add("--decoder", help="workdir of a rae_decoder run, if not the config's")
    _add_sampling(parser)
    group = parser.add_argument_group("instead of a workdir")
    add = partial(group.add_argument, metavar="SRC")
    add("--model", help="diffusion transformer")
    add("--autoencoder", help="autoencoder of its latents")
    add("--latent-stats", help="statistics in place of the autoencoder's")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of products; default float32"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "sampling (default: the config's, else the official)"
    ).add_argument
    add("--sampler", metavar="NAME", help="such as euler, heun, dopri5, euler_maruyama")
    option = "option of the sampler, such as rtol=1e-4; may be repeated"
    add("--sampler-option", action="append", metavar="KEY=VALUE", help=option)
    points = "of the official grid, default 50; l-DAE: levels visited, default 250"
    add("--num-points", type=int, help=points)
    zero = "whether to add a last step to t = 0"
    add("--final-zero", action=argparse.BooleanOptionalAction, help=zero)
    scale = "1 for none; several give one output each, with the scale in its name"
    add("--guidance-scale", metavar="S[,S...]", help=scale)
    kind = (
        "against no class (cfg), a weaker network (autoguidance: --guide) or the "
        "network's own early head (internal: trained with model.early_depth); "
        "default: autoguidance with --guide, else the config's or cfg"
    )
    add("--guidance", choices=GUIDANCE, help=kind)
    add("--guidance-interval", metavar="LOW,HIGH", help="times at which guidance acts")
    add("--guide", metavar="SRC", help="weaker diffusion transformer: autoguidance")


def run(args: argparse.Namespace) -> int:
    """Generates, shows progress and writes `--out`, for every guidance scale."""
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1.")
    scales = parse_scales(args.guidance_scale)
    generator, names, usual = load(args)
    labels = choose_labels(
        args.labels, names, args.num_samples, args.seed, args.label_mode
    )
    if args.labels:
        print(f"classes: {describe_classes(labels, names)}")
    for scale in scales or (usual,):
        settings = {
            "dtype": args.dtype or "",
            "seed": args.seed,
            "num_samples": args.num_samples,
            "labels": args.labels or "all",
            "label_mode": args.label_mode,
            "guidance_scale": scale,
        }
        _sample(args, generator, labels, settings, named=len(scales) > 1)
    return 0


def _sample(
    args: argparse.Namespace,
    generator: Any,
    labels: np.ndarray,
    settings: dict[str, Any],
    *,
    named: bool,
) -> None:
    """Makes and writes what is missing of one output."""
    from rae_jax.evaluation import writing
    from rae_jax.training import distributed

    scale, out, latents = settings["guidance_scale"], args.out, args.latents
    if named:
        out, latents = with_scale(out, scale), latents and with_scale(latents, scale)
    if latents or out.suffix != ".png":  # What can be continued.
        settings = settings | generator.describe()
    outputs = []
    if distributed.is_main():
        outputs.append(writing.open_images(out, labels, settings))
        if latents:
            stats = generator.stats
            outputs.append(writing.open_latents(latents, labels, stats, settings))
    wanted = np.zeros(len(labels), bool)
    for output in outputs:
        wanted[output.missing()] = True
    missing = np.flatnonzero(distributed.from_main(wanted))
    batches = generator.batches(
        labels,
        scale=scale,
        seed=args.seed,
        batch_size=args.batch_size,
        index=missing,
        latents=bool(latents),
    )
    with _progress(len(labels), len(labels) - len(missing)) as advance:
        for drawn in batches:
            for output, rows in zip(
                outputs, (drawn.images, drawn.latents), strict=False
            ):
                output.add(drawn.index, rows)
            speed = advance(len(drawn.index))
    for output in outputs:
        output.finish()
    found = len(labels) - len(missing)
    notes = [f"{found} were there"] if found else []
    notes += [speed] if len(missing) else []
    print(f"{len(labels)} images: {out} ({', '.join(notes)})")


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """Shows a bar; yields a function (count) -> "3.20 images/s"."""
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), TimeLeft()) as bar:
        task = bar.add_task("", total=total, completed=done, speed="")
        rate = rates.Rate()

        def advance(count: int) -> str:
            speed = rate(count)
            bar.update(task, advance=count, speed=speed)
            return speed

        yield advance


def with_scale(path: Path, scale: float) -> Path:
    """Returns the path with a guidance scale in its name: a.npz -> a_1.5.npz."""
    if path.suffix in (".png", ".npz"):
        return path.with_name(f"{path.stem}_{scale:g}{path.suffix}")
    return path.with_name(f"{path.name}_{scale:g}")


def load(
    args: argparse.Namespace,
) -> tuple[Any, tuple[str, ...], float]:
    """Returns the chain, the names of its classes and its usual guidance scale.

    Raises:
        ConfigError: Arguments are missing or do not go together.
    """
    from rae_jax.trainers import generation

    check_arguments(args)
    changes = sampling_changes(args)
    if args.workdir is not None:
        if args.guide:
            changes |= dict(guidance=AUTOGUIDANCE, guide=_guide(args.guide))
        elif args.guidance not in (None, AUTOGUIDANCE):
            changes["guide"] = ""  # The config's is for another guidance.
        generator = generation.load(args.workdir, args.decoder or "", **changes)
        usual = generator.config.sampling.guidance_scale
        return generator, generator.class_names, usual
    generator = generation.load_converted(
        args.model,
        args.autoencoder,
        guide=args.guide,
        latent_stats=args.latent_stats,
        dtype=args.dtype or "float32",
        **changes,
    )
    return generator, tuple(map(str, range(generator.num_classes))), 1.0


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the arguments change in a config's `sampling` block."""
    changes = dict(
        name=args.sampler,
        num_points=args.num_points,
        final_zero=args.final_zero,
        guidance=args.guidance,
        guidance_interval=parse_interval(args.guidance_interval),
    )
    if args.sampler or args.sampler_option:
        changes["options"] = ", ".join(args.sampler_option or ())
    if args.num_points is not None or args.final_zero is not None:
        changes["times"] = ()  # These are of the official grid.
    return {key: value for key, value in changes.items() if value is not None}


def _guide(source: str) -> str:
    """Names a file by its whole path: a config's would count from the workdir."""
    path = storage.path(source)
    return str(storage.absolute(path)) if path.exists() else source


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a ConfigError where arguments are missing or contradict each other."""
    converted = ("model", "autoencoder", "latent_stats", "dtype")
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
    _check_guidance(args)


def _check_guidance(args: argparse.Namespace) -> None:
    if args.guide and args.guidance not in (None, AUTOGUIDANCE):
        raise configs.ConfigError(
            f"--guide goes with --guidance {AUTOGUIDANCE}, not {args.guidance}."
        )
    is_auto = args.guidance == AUTOGUIDANCE
    if is_auto and args.workdir is None and not args.guide:
        raise configs.ConfigError(
            f"--guidance {AUTOGUIDANCE} needs --guide SRC, a weaker network."
        )
    if args.guidance_scale is not None or not (args.guide or args.guidance):
        return
    hint = "; the published results have 1.42 at 256 pixels and 1.5 at 512"
    raise configs.ConfigError(
        f"Give --guidance-scale for {'the --guide' if args.guide else '--guidance'}"
        f"{hint if args.guide else ', such as 1.5'}."
    )


def parse_scales(text: str | None) -> tuple[float, ...]:
    """Turns S,S,... into scales; a ConfigError if it is not that."""
    if text is None:
        return ()
    try:
        scales = tuple(map(float, text.split(",")))
    except ValueError:
        scales = ()
    names = {f"{scale:g}" for scale in scales}  # As in `with_scale`.
    if not scales or not np.isfinite(scales).all() or len(names) < len(scales):
        raise configs.ConfigError(
            f"--guidance-scale {text!r}: give one number or several different ones, "
            "such as 1,1.5,2."
        )
    return scales


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
    text: str | None, names: Sequence[str], count: int, seed: int, mode: str
) -> np.ndarray:
    """Returns `count` labels of all classes or of the named ones.

    Args:
        text: Names and numbers, separated by commas; None for all.
        names: Names of the classes; see `class_names.find`.
        count: Number of labels.
        seed: Of their order, and of the choice if it is random.
        mode: "balanced" takes named classes in turn, all in random order; "random"
            chooses anew for every sample.

    Raises:
        ConfigError: For what is neither a class's name nor its number, or is the name
            of several.
    """
    from rae_jax.evaluation import generate

    if text is None and mode == "balanced":
        return generate.balanced_labels(count, len(names), seed)
    chosen = []
    for word in (part.strip() for part in text.split(",")) if text else ():
        chosen.append(class_names.find(word, names))
    classes = np.asarray(chosen if text else range(len(names)), np.int32)
    if mode == "random":
        return classes[generate.random_labels(count, len(classes), seed)]
    return np.resize(classes, count)


def describe_classes(labels: np.ndarray, names: Sequence[str]) -> str:
    """Returns classes with their first names: "207 golden retriever, 0 tench"."""
    found = list(dict.fromkeys(labels.tolist()))
    first = class_names.names_of(names)
    words = [f"{i} {first[i][0]}" if first[i][0] != str(i) else str(i) for i in found]
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more
