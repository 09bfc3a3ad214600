"""The sections that show an l-DAE run's pictures: noise, patterns, denoised images."""

from pathlib import Path
from typing import Any

from rae_jax import storage
from rae_jax.reporting import claim_runs, markup, tiles

NOISE, PATTERNS, DENOISED = "latent_noise.png", "patterns.png", "denoised_levels.png"
LABELS_NAME = "pictures.json"

_ABOUT = {
    "pca": "principal components of image patches",
    "pixels": "the pixels of image patches",
    "patch_ae": "codes of a linear autoencoder of image patches",
    "patch_vae": "codes of a linear variational autoencoder of image patches",
    "conv_vae": "codes of a convolutional autoencoder",
    "sd_vae": "codes of a convolutional autoencoder",
}


def read(workdir: Path) -> dict[str, Any]:
    """Returns what is known of the pictures in a workdir, empty without any.

    Raises:
        ConfigError: The file is damaged.
    """
    path = storage.path(workdir) / LABELS_NAME
    return claim_runs.read_json(path) if path.is_file() else {}


def all_parts(workdir: Path) -> str:
    """Returns what can be shown of a workdir, as the body of a section."""
    found = read(workdir)
    return "".join(
        part(workdir, found)
        for part in (noise, patterns, denoised)
        if found.get("labels")
    )


def noise(workdir: Path, found: dict[str, Any]) -> str:
    """Noise on latents beside noise on pixels."""
    what = _ABOUT.get(found.get("tokenizer", ""), "latents")
    text = (
        f"Noise on {found.get('latent_dim', '')} {what} changes what a patch looks "
        "like, noise of the same energy on the pixels only covers it: neighbouring "
        "pixels still tell what is below. σ is in units of the latents' deviation."
    )
    return _sheet(workdir, found, NOISE, "Noise on latents and on pixels", text)


def patterns(workdir: Path, found: dict[str, Any]) -> str:
    """The patches that latent dimensions stand for."""
    size = found.get("patch_size", "")
    text = (
        f"Patches of {size} x {size} pixels that the latent dimensions stand for, in "
        "their order; those of principal components by falling variance. Grey is no "
        "change, and every pattern is shown at full contrast."
    )
    return _sheet(workdir, found, PATTERNS, "What spans the latents", text)


def denoised(workdir: Path, found: dict[str, Any]) -> str:
    """Images denoised at several levels."""
    text = (
        "Held-out images at several noise levels, as the network sees them, and what "
        "it predicts: the last checkpoint's averaged weights."
    )
    return _sheet(workdir, found, DENOISED, "Denoised at several levels", text)


def _sheet(workdir: Path, found: dict, name: str, title: str, text: str) -> str:
    labels, path = found.get("labels", {}).get(name), storage.path(workdir) / name
    if labels is None or not path.is_file():
        return ""
    picture = tiles.load(path)
    sheet = tiles.cut(picture)
    alt = f"Rows from above: {', '.join(labels)}"
    if sheet is None or len(sheet) != len(labels):
        body = f'<div class="body">{markup.whole(picture, alt=alt)}</div>'
    elif len({len(row) for row in sheet}) == 1:
        body = markup.stacks(sheet, labels)
    else:
        rows = "".join(
            markup.images(row, alt=label, columns=len(sheet[0]))
            for row, label in zip(sheet, labels, strict=True)
        )
        body = f'<div class="body strip">{rows}</div>'
    head = f"<h3>{markup.escape(title)}</h3>"
    return f'<div class="sheet">{head}{markup.paragraph(text)}{body}</div>'
