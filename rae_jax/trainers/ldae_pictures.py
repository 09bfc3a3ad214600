"""Pictures of any l-DAE run, drawn from its newest checkpoint.

As the paper's figures 4, 7 and 8 (arXiv:2401.14404): noise on latents beside noise on
pixels, the patterns that span the latent space, and images denoised at several levels.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.diffusion import schedules
from rae_jax.evaluation import latent_noise, pictures
from rae_jax.models import tokenizers
from rae_jax.reporting import ldae_sheets
from rae_jax.trainers import inputs, ldae, tokenizing
from rae_jax.training import checkpoints, state

COLUMNS = 10
NUM_PATTERNS = 40
SIGMAS = (0.25, 3**-0.5, 1.0)  # That between is the paper's only one, if it is one.
LEVELS = (0.1, 0.35, 0.6, 0.9)  # Shares of the noise levels.
_SIDE = 64  # Patterns are enlarged to about this many pixels.


def draw(workdir: Path) -> bool:
    """Draws the pictures of an l-DAE run unless they are of its newest checkpoint.

    Returns:
        Whether there is a checkpoint.

    Raises:
        ValueError, OSError: The run's images are not here.
    """
    workdir = storage.path(workdir)
    step = checkpoints.finished_step(workdir)
    if step is None:
        return False
    if ldae_sheets.read(workdir).get("step") == step:
        return True
    config = configs.read_config(workdir / checkpoints.CONFIG_NAME)
    tokenizer = tokenizing.load(workdir, config)
    images = inputs.examples(config.data, "validation", COLUMNS)
    labels = {
        ldae_sheets.NOISE: _draw_noise(workdir, tokenizer, images),
        ldae_sheets.DENOISED: _draw_denoised(workdir, tokenizer, images, config),
    }
    if tokenizing.name(config) in tokenizers.PATCHWISE:
        labels[ldae_sheets.PATTERNS] = _draw_patterns(workdir, tokenizer)
    found = {"step": step, "tokenizer": tokenizing.name(config), "labels": labels}
    found |= {"latent_dim": tokenizer.latent_dim, "patch_size": tokenizer.patch_size}
    text = json.dumps(found, indent=2)
    storage.write_atomically(workdir / ldae_sheets.LABELS_NAME, text.encode())
    return True


def _draw_noise(workdir: Path, tokenizer: Any, images: np.ndarray) -> list[str]:
    draw_one = jax.jit(latent_noise.side_by_side)
    rows, labels = [images], ["Image"]
    for sigma in SIGMAS:
        key = jax.random.key(0)
        rows += draw_one(tokenizer, inputs.to_float(images), sigma, key)
        labels += [f"On pixels, σ {sigma:.2f}", f"On latents, σ {sigma:.2f}"]
    pictures.save_rows(workdir / ldae_sheets.NOISE, rows)
    return labels


def _draw_denoised(
    workdir: Path, tokenizer: Any, images: np.ndarray, config: ConfigDict
) -> list[str]:
    params = checkpoints.load_params(workdir)
    graphdef = state.abstract_model(ldae.make_model(config))
    noise = config.noise
    sigmas = schedules.noise_schedule(noise.schedule, noise.num_levels)[1]

    @partial(jax.jit, static_argnums=3)
    def predict(params, tokenizer, images, level):
        model = nnx.merge(graphdef, params)
        return ldae.denoise(model, tokenizer, inputs.to_float(images), config, level)

    rows, labels = [images], ["Image"]
    for share in LEVELS:
        level = int(share * noise.num_levels)
        rows += predict(params, tokenizer, images, level)
        labels += [f"With noise, σ {sigmas[level]:.2f}", "Denoised"]
    pictures.save_rows(workdir / ldae_sheets.DENOISED, rows)
    return labels


def _draw_patterns(workdir: Path, tokenizer: Any) -> list[str]:
    found = np.asarray(latent_noise.patterns(tokenizer, NUM_PATTERNS))
    zoom = max(1, _SIDE // tokenizer.patch_size)
    path = workdir / ldae_sheets.PATTERNS
    pictures.save_grid(path, found, COLUMNS, zoom=zoom)
    starts = range(0, len(found), COLUMNS)
    return [f"{i + 1} to {min(i + COLUMNS, len(found))}" for i in starts]
