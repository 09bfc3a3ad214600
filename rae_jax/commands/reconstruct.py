"""`rae-jax reconstruct`: images through a trained autoencoder, side by side."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rae_jax import copies, storage

HELP = "Encode and decode images with a trained autoencoder, side by side."
SCORES_NAME = "scores.json"
_LABELS = {"psnr": "PSNR", "ssim": "SSIM", "lpips_vgg": "LPIPS"}
_LPIPS_SIZE = 32  # Smaller images vanish in the poolings of VGG.

Score = Callable[[np.ndarray, np.ndarray], list[dict[str, float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument(
        "images", type=storage.path, help="an image or a folder of images"
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--workdir", type=storage.path, help="folder of a rae_decoder run"
    )
    model.add_argument(
        "--autoencoder",
        metavar="SRC",
        help="converted or published weights: a folder, a file, a hub id, or a name "
        "such as rae-dinov2-b",
    )
    parser.add_argument(
        "--out",
        type=storage.path,
        required=True,
        help="folder for scores.json and one PNG per image: input, reconstruction and "
        "their difference, from black (none) to yellow (a quarter of the range)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")


def run(args: argparse.Namespace) -> int:
    """Writes one PNG per image and prints its PSNR, SSIM and LPIPS."""
    from rae_jax import config as configs
    from rae_jax.data import images, transforms

    if args.batch_size < 1:
        raise configs.ConfigError(
            f"--batch-size must be at least 1, got {args.batch_size}."
        )
    files = find_images(args.images)
    size, reconstruct = load(args)
    score = make_score(size)
    scores: dict[str, dict[str, float]] = {}
    for start in range(0, len(files), args.batch_size):
        part = files[start : start + args.batch_size]
        pixels = np.stack(
            [transforms.center_crop(images.decode(f), size) for f in part]
        )
        recon = reconstruct(pixels)
        write_rows(args.out, part, pixels, recon)
        for file, values in zip(part, score(pixels, recon), strict=True):
            scores[str(file)] = values
            text = ", ".join(f"{_LABELS[k]} {v:.3f}" for k, v in values.items())
            print(f"{file.name}: {text}")
    means = {k: float(np.mean([v[k] for v in scores.values()])) for k in values}
    content = json.dumps({"mean": means, "images": scores}, indent=2)
    storage.write_atomically(args.out / SCORES_NAME, content.encode())
    print(f"{len(files)} reconstructions: {args.out}")
    return 0


def make_score(size: int) -> Score:
    """Returns (images, reconstructions), uint8 (b, h, w, 3) -> scores per image.

    LPIPS, of the VGG network, is left out where its weights are not installed or the
    images are too small for it.
    """
    import jax

    from rae_jax.trainers import decoder_scores
    from rae_jax.training import sharding

    backbones = ("vgg",) if size >= _LPIPS_SIZE else ()
    mesh = sharding.make_mesh(1)
    try:
        function = decoder_scores.make_score(backbones, mesh)
    except ModuleNotFoundError as error:
        print(f"LPIPS is left out: {error}")
        function = decoder_scores.make_score((), mesh)

    def score(images, recon):
        found = jax.device_get(function(images, recon))
        return [{k: float(v[i]) for k, v in found.items()} for i in range(len(images))]

    return score


def load(
    args: argparse.Namespace,
) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Returns the image size of the autoencoder and the map of images through it."""
    from rae_jax.trainers import autoencoder, weights

    if args.workdir is not None:
        loaded = autoencoder.load(args.workdir)
        size = loaded.config.data.image_size
        return size, autoencoder.make_reconstruct(loaded)
    model = weights.load_autoencoder(args.autoencoder, remat="none")
    size = autoencoder.image_size(model)
    return size, autoencoder.make_converted_reconstruct(model)


def find_images(path: Path) -> list[Path]:
    """Returns the image itself, or the images of a folder and its subfolders.

    Raises:
        ValueError: If there is none.
    """
    from rae_jax.data import images

    path = copies.local(path)
    if path.is_file():
        return [path]
    found = [
        p for p in sorted(path.rglob("*")) if p.suffix.lower() in images.EXTENSIONS
    ]
    if not found:
        raise ValueError(
            f"{path}: no image there; expected a file or a folder with files of type "
            f"{', '.join(images.EXTENSIONS)}."
        )
    return found


def write_rows(
    out: Path, files: list[Path], pixels: np.ndarray, recon: np.ndarray
) -> None:
    """Writes input, reconstruction and error map of each file side by side."""
    from rae_jax.evaluation import pictures

    errors = pictures.error_map(pixels, recon)
    for i, file in enumerate(files):
        name = f"{file.stem}_{file.suffix[1:]}.png"
        row = np.stack([pixels[i], recon[i], errors[i]])
        pictures.save_rows(out / name, [row], zoom=1)
