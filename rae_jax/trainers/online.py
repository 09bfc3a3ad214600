"""Scores and pictures of a decoder while it is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax.evaluation import (
    autoencoding,
    pictures,
    reconstruction,
)
from rae_jax.trainers import inputs, judges
from rae_jax.training import sharding

PICTURE_COLUMNS = 10


def make_evaluate(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    reconstruct: Callable[..., jax.Array],
    score: Callable[..., dict[str, jax.Array]] | None,
) -> Callable[[Any, Any, Path], dict[str, float]]:
    """Returns the evaluation of a decoder run: (state, frozen, workdir) -> scalars.

    The EMA weights reconstruct the validation images, and a row of them becomes
    `reconstructions.png`. Where `config.evaluation` names networks, distances such as
    "rfid_50k" are measured, too; networks and references are loaded before training
    starts, so that a wrong path costs no time.

    Args:
        config: Config of the run.
        workdir: Folder of the run, from which paths count.
        mesh: Devices.
        reconstruct: (decoder params, encoder params, uint8 images) -> images in
            [0, 1].
        score: (LPIPS params, uint8 images, reconstructions) -> scores (b,) by name;
            None for PSNR and SSIM alone.
    """
    judging = judges.configured(config, workdir)
    networks = judging.networks(mesh)
    references = judging.references(networks)
    rows = sharding.batch_sharding(mesh)

    def evaluate(run_state: Any, frozen: Any, workdir: Path) -> dict[str, float]:
        params, encoder = run_state.ema_params, frozen["encoder"]
        _save_examples(config, workdir, lambda x: reconstruct(params, encoder, x))

        def versions(arrays):
            yield "", reconstruct(params, encoder, arrays["image"])

        def scores(images, recon):
            if score is None:
                return reconstruction.image_scores(images, recon)
            return score(frozen["perceptual"], images, recon)

        with inputs.validation_batches(config.data) as batches:
            found = autoencoding.score_versions(
                batches,
                rows,
                versions,
                scores,
                networks=networks,
                references=references,
            )[""]
        return {k: v for k, v in found.scores.items() if k != "num_images"}

    return evaluate


def _save_examples(config: ConfigDict, workdir: Path, reconstruct) -> None:
    images = inputs.examples(config.data, "validation", PICTURE_COLUMNS)
    recon = reconstruct(images)
    pictures.save_rows(workdir / "reconstructions.png", [images, recon])
