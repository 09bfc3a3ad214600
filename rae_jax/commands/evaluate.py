"""`rae-jax evaluate`: the numbers of a finished run, or of a set of images."""

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.evaluation import rates

HELP = "Measure a run or a set of images: FID, PSNR, SSIM, LPIPS, probe accuracy."
RESULT_NAME = "evaluation.json"
ROBUSTNESS_NAME = "robustness"
LATENTS_NAME = "latents"
_BATCH_SIZE = 32
DECODER = {"trainer": "rae_decoder"}
LINE_SECONDS = 30.0  # Between lines of progress where there is no terminal.
TOKENS = ("mean", "cls")  # As in evaluation.features.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add = parser.add_argument
    what = (
        "folder of any run; or images: a folder, or an .npz with arr_0 (uint8); or, "
        "with --images, an autoencoder: converted weights or a published name"
    )
    add("target", type=storage.path, metavar="WORKDIR|IMAGES|RAE", help=what)
    add("--batch-size", type=int, metavar="N", help="never changes the scores")
    add("--limit", type=int, metavar="N", help="number of images; default: all")
    add("--seed", type=int, default=0, help="of samples and noise, default 0")
    save = "where to write the scores (default: evaluation.json in the workdir)"
    add("--out", type=storage.path, metavar="OUT.json", help=save)
    _add_judges(parser)
    _add_decoders(parser)
    generation = parser.add_argument_group("latent_diffusion runs, and l-DAE")
    add = generation.add_argument
    add("--num-samples", type=int, default=160, metavar="N", help="default 160")
    real = "real images of fd_efflite0, default 1024"
    add("--num-reference", type=int, default=1024, metavar="N", help=real)
    scale = "default: the config's; fd_efflite0 compares it with 1"
    add("--guidance-scale", type=float, metavar="S", help=scale)


def _add_judges(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distances to a reference").add_argument
    weights = "weights of the FID Inception, from torch-fidelity or pytorch-fid"
    add("--inception", default="", metavar="FILE", help=weights)
    reference = (
        "an .npz with mu, sigma (mu_s, sigma_s) as ADM's and/or arr_0, or a folder of "
        "images; for reconstructions the originals are the default"
    )
    add("--reference", default="", metavar="REF", help=reference)
    add("--efflite0", action="store_true", help="fd_efflite0: needs no weight file")
    encoder = "distance in a token of a pretrained encoder: hub id or folder"
    add("--encoder", default="", metavar="SRC", help=encoder)
    token = (
        "mean of the patch tokens (default), or the class token: with --encoder "
        "facebook/dinov2-large that is fd_dinov2, the FD-DINOv2 of papers"
    )
    add("--encoder-token", choices=TOKENS, default=TOKENS[0], help=token)
    save = "write the statistics of IMAGES in one network, for later use as --reference"
    add("--save-statistics", type=storage.path, metavar="OUT.npz", help=save)


def _add_decoders(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rae_decoder runs").add_argument
    images = "images to reconstruct, instead of the run's validation split"
    add("--images", type=storage.path, metavar="IMAGES", help=images)
    noise = "scores over noise on the latents, as robustness.json and .png"
    add("--robustness", action="store_true", help=noise)
    sigmas = "strengths of the noise, separated by commas (default: 0 to 1)"
    add("--sigmas", type=_numbers, metavar="S,S,...", help=sigmas)
    latents = "measure the images decoded from these latents: .npz (n, h, w, c)"
    add("--latents", type=storage.path, metavar="FILE.npz", help=latents)
    stats = "statistics that those latents were normalised by; default: raw latents"
    add("--latent-stats", default="", metavar="STATS", help=stats)


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes the scores as JSON."""
    from rae_jax.training import checkpoints

    if _is_autoencoder(args):
        return _autoencoder(args)
    is_run = (args.target / checkpoints.CONFIG_NAME).is_file()
    if not is_run and _is_images(args):
        return _images(args)
    config = configs.read_config(args.target / checkpoints.CONFIG_NAME)
    if args.save_statistics is not None:
        raise configs.ConfigError("--save-statistics: only for images, not for runs.")
    if config.trainer == "rae_decoder" and args.robustness:
        return _robustness(args)
    if config.trainer == "rae_decoder" and args.latents is not None:
        return _latents(args)
    if args.robustness or args.latents or args.images:
        _only("--robustness, --latents and --images", "rae_decoder", config)
    with _progress() as progress:
        scores, notes = _run_scores(args, config, progress)
    return _report(args.out or args.target / RESULT_NAME, scores, notes)


def _run_scores(
    args: argparse.Namespace, config: Any, progress: Any
) -> tuple[Mapping[str, float], Iterable[str]]:
    from rae_jax.trainers import decoder_scores, scores

    if config.trainer == "rae_decoder":
        found = decoder_scores.decoder_scores(args.target, _options(args, progress))
        hint = "rFID was not measured: give --inception FILE, or --efflite0 instead."
        return found.scores, found.notes if _has_judges(args) else (hint,)
    if config.trainer == "ldae":
        return _denoising(args, progress)
    if config.trainer != "latent_diffusion":
        return scores.run_scores(args.target), ()
    if args.reference or args.inception or args.encoder:
        found = scores.generation_quality(
            args.target,
            _judges(args),
            num_samples=args.num_samples,
            seed=args.seed,
            scale=args.guidance_scale,
            progress=progress,
        )
        return found.scores, found.notes
    found = scores.generation_scores(
        args.target,
        num_samples=args.num_samples,
        num_reference=args.num_reference,
        batch_size=args.batch_size or _BATCH_SIZE,
        seed=args.seed,
        scale=args.guidance_scale,
        progress=progress,
    )
    return found.scores, (*found.notes, _no_fid())


def _denoising(
    args: argparse.Namespace, progress: Any
) -> tuple[Mapping[str, float], Iterable[str]]:
    from rae_jax.trainers import denoising_scores

    found = denoising_scores.run_scores(
        args.target,
        _judges(args),
        num_samples=args.num_samples,
        num_reference=args.num_reference,
        batch_size=args.batch_size or _BATCH_SIZE,
        seed=args.seed,
        scale=args.guidance_scale,
        progress=progress,
    )
    return found.scores, found.notes


def _no_fid() -> str:
    from rae_jax.evaluation import inception_features

    return (
        "fd_efflite0 needs no downloads and is not comparable with gFID, which was "
        f"not measured. {inception_features.WHERE}\nSamples are then compared with "
        "--reference REF.npz, such as ADM's VIRTUAL_imagenet256_labeled.npz."
    )


def _is_autoencoder(args: argparse.Namespace) -> bool:
    """Returns whether the target is an autoencoder outside of a run."""
    from rae_jax.trainers import autoencoder

    is_images = args.target.suffix == ".npz"
    return not is_images and autoencoder.is_converted(str(args.target), args.target)


def _autoencoder(args: argparse.Namespace) -> int:
    """Measures converted weights, which have no workdir to write into."""
    if args.images is None and args.latents is None:
        raise configs.ConfigError(
            f"{args.target} has no validation split of its own: give --images."
        )
    if args.out is None:
        raise configs.ConfigError("Give --out OUT.json, where the scores go.")
    if args.robustness:
        return _robustness(args)
    if args.latents is not None:
        return _latents(args)
    with _progress() as progress:
        scores, notes = _run_scores(args, ConfigDict(DECODER), progress)
    return _report(args.out, scores, notes)


def _images(args: argparse.Namespace) -> int:
    from rae_jax.trainers import judges

    with _progress() as progress:
        found = judges.compare_images(
            args.target,
            _judges(args),
            limit=args.limit,
            save_statistics=args.save_statistics,
            progress=progress,
        )
    return _report(args.out, found.scores, found.notes)


def _robustness(args: argparse.Namespace) -> int:
    from rae_jax.evaluation import robustness
    from rae_jax.trainers import decoder_scores

    with _progress() as progress:
        curves, notes = decoder_scores.robustness_curves(
            args.target,
            robustness.SIGMAS if args.sigmas is None else args.sigmas,
            seed=args.seed,
            options=_options(args, progress),
        )
    out = args.out or args.target / f"{ROBUSTNESS_NAME}.json"
    table = Table(*curves)
    for values in zip(*curves.values(), strict=True):
        table.add_row(*map(_text, values))
    picture = out.with_suffix(".png")
    robustness.save_curves(picture, curves)
    _write(out, {"seed": args.seed} | curves)
    Console().print(table)
    _print_notes(notes)
    print(f"curves: {picture}")
    return 0


def _latents(args: argparse.Namespace) -> int:
    from rae_jax.trainers import decoder_scores

    out = args.out or args.target / f"{LATENTS_NAME}.json"
    with _progress() as progress:
        found = decoder_scores.latent_scores(
            args.target,
            args.latents,
            stats=args.latent_stats,
            options=_options(args, progress),
            picture=out.with_suffix(".png"),
        )
    return _report(out, found.scores, found.notes)


def _judges(args: argparse.Namespace) -> Any:
    from rae_jax.trainers import judges

    return judges.Judges(
        inception=args.inception,
        efflite0=args.efflite0,
        encoder=args.encoder,
        encoder_token=args.encoder_token,
        reference=args.reference,
        batch_size=args.batch_size or _BATCH_SIZE,
    )


def _options(args: argparse.Namespace, progress: Any) -> Any:
    from rae_jax.trainers import decoder_scores

    return decoder_scores.Options(
        batch_size=args.batch_size,
        limit=args.limit,
        images=args.images,
        judges=_judges(args),
        progress=progress,
    )


def _has_judges(args: argparse.Namespace) -> bool:
    return bool(args.inception or args.efflite0 or args.encoder)


def _is_images(args: argparse.Namespace) -> bool:
    """Returns whether the target is meant as images: a file, or a folder of them."""
    from rae_jax.data import images
    from rae_jax.training import checkpoints

    if args.target.is_file() or not args.target.is_dir():
        return args.target.is_file()
    if checkpoints.folder(args.target).is_dir():
        return False
    files = storage.files_below(args.target)
    return _has_judges(args) or any(
        name.lower().endswith(images.EXTENSIONS) for name in files
    )


def _only(option: str, trainer: str, config: Any) -> None:
    raise configs.ConfigError(
        f"{option}: only for runs of {trainer!r}, not of {config.trainer!r}."
    )


@contextmanager
def _progress() -> Iterator[Any]:
    """Shows how many images were done, and how fast; in a log file, line by line."""
    columns = (SpinnerColumn(), TextColumn("measured"), MofNCompleteColumn())
    fields = TextColumn("images {task.fields[speed]}")
    with Progress(*columns, fields, transient=True) as bar:
        task = bar.add_task("", total=None, speed="")
        rate, done, printed = rates.Rate(), 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, printed
            speed, done, now = rate(count), done + count, time.monotonic()
            bar.update(task, advance=count, speed=f"({speed})")
            if not bar.console.is_terminal and now - printed >= LINE_SECONDS:
                print(f"{done} images measured ({speed})", flush=True)
                printed = now

        yield advance


def _report(out: Path | None, scores: Mapping[str, float], notes: Iterable[str]) -> int:
    if out is not None:
        _write(out, scores)
    table = Table("score", "value")
    for name, value in sorted(scores.items()):
        table.add_row(name, _text(value))
    Console().print(table)
    _print_notes(notes)
    return 0


def _write(out: Path, content: Mapping[str, Any]) -> None:
    from rae_jax.training import distributed

    text = json.dumps(dict(content), indent=2, sort_keys=True)
    if distributed.is_main():
        storage.write_atomically(out, text.encode())


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"Note: {note}")


def _text(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
