"""`rae-jax reconstruct`: images through a trained autoencoder, side by side."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

HELP = "Encode and decode images with a trained autoencoder, side by side."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("images", type=Path, help="an image or a folder of images")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="folder of a rae_decoder run")
    model.add_argument(
        "--autoencoder",
        metavar="SRC",
        help="converted or published weights: a folder, a file, a hub id, or a name "
        "such as rae-dinov2-b",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for PNGs: input, reconstruction"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")


def run(args: argparse.Namespace) -> int:
    """Writes one PNG per image and prints its PSNR and SSIM."""
    from rae_jax.data import images, transforms

    files = find_images(args.images)
    size, reconstruct = load(args)
    for start in range(0, len(files), args.batch_size):
        part = files[start : start + args.batch_size]
        pixels = np.stack(
            [transforms.center_crop(images.decode(f), size) for f in part]
        )
        write_pairs(args.out, part, pixels, reconstruct(pixels))
    print(f"{len(files)} reconstructions: {args.out}")
    return 0


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


def write_pairs(
    out: Path, files: list[Path], pixels: np.ndarray, recon: np.ndarray
) -> None:
    """Writes input and reconstruction of each file and prints their scores."""
    import jax.numpy as jnp

    from rae_jax.evaluation import pictures, reconstruction

    scores = reconstruction.image_scores(jnp.asarray(pixels), jnp.asarray(recon))
    for i, file in enumerate(files):
        name = f"{file.stem}_{file.suffix[1:]}.png"
        pictures.save_rows(out / name, [np.stack([pixels[i], recon[i]])], zoom=1)
        psnr, ssim = float(scores["psnr"][i]), float(scores["ssim"][i])
        print(f"{file.name}: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}")
