"""Scores of the runs of configs/claims.py, as `reporting.claims` reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.evaluation import features, frechet, generate, quality, reconstruction
from rae_jax.models import rae
from rae_jax.reporting import claim_runs
from rae_jax.trainers import (
    autoencoder,
    decoder_scores,
    generation,
    inputs,
    judges,
    registry,
)
from rae_jax.training import checkpoints

SEED = 0  # Of samples, and of the noise on latents.
Note = Callable[[str], None]


def measure(
    folder: Path,
    *,
    num_samples: int = 160,
    batch_size: int = 32,
    note: Note = lambda text: None,
) -> None:
    """Measures the finished runs in a folder that have not been measured.

    Every run's scores are written beside it as soon as they are there.

    Args:
        folder: Its subfolders are the workdirs.
        num_samples: Samples of each diffusion run, and real images compared with.
        batch_size: Images at a time; no score depends on it.
        note: Called with what is being done.

    Raises:
        ConfigError: See `claim_runs.find`.
        ValueError: There are too few training images for so many samples.
    """
    runs = [run for run in claim_runs.find(folder) if run.is_finished]
    decoders = [run for run in runs if run.variant in claim_runs.DECODERS]
    real = _Real(num_samples, batch_size)
    for run in decoders:
        if "curves" not in run.scores:
            note(f"{run.path.name}: latents with noise")
            _save(run, {"curves": _curves(run, batch_size)})
    for run in runs:
        others = decoders if run.variant == "dit_dh" else []
        if run.variant not in claim_runs.DIFFUSION:
            continue
        if _is_measured(run, others, num_samples):
            continue
        note(f"{run.path.name}: {num_samples} samples")
        _save(run, _generation(run, others, real))
        jax.clear_caches()  # Programs of other networks only take memory.


def _is_measured(
    run: claim_runs.Run, decoders: list[claim_runs.Run], num_samples: int
) -> bool:
    known = run.scores.get("decoded", {}).keys() & run.scores.get("encoded", {}).keys()
    names = {decoder.path.name for decoder in decoders}
    return run.scores.get("num_samples") == num_samples and names <= known


def _save(run: claim_runs.Run, scores: dict[str, Any]) -> None:
    content = {"num_steps": run.num_steps} | scores
    text = json.dumps(content, indent=2)
    storage.write_atomically(run.path / claim_runs.SCORES_NAME, text.encode())


def _curves(run: claim_runs.Run, batch_size: int) -> dict[str, list[float]]:
    """Returns scores of reconstructions over the noise on their latents."""
    asked = judges.Judges(efflite0=True, batch_size=batch_size)
    curves, _ = decoder_scores.robustness_curves(
        run.path, seed=SEED, options=decoder_scores.Options(judges=asked)
    )
    return curves


def _generation(
    run: claim_runs.Run, decoders: list[claim_runs.Run], real: "_Real"
) -> dict[str, Any]:
    """Draws unguided samples of a run and measures them and their latents."""
    generator = generation.load(run.path)
    reference = real.measured(generator)
    labels = generate.balanced_labels(real.num_samples, generator.num_classes, SEED)
    options = dict(scale=1.0, seed=SEED, batch_size=real.batch_size)
    drawn = list(generator.batches(labels, latents=True, **options))
    z = np.concatenate([batch.latents for batch in drawn])
    images = np.concatenate([batch.images for batch in drawn])
    config = configs.read_config(run.path / checkpoints.CONFIG_NAME)
    by_decoder = {
        other.path.name: _decode(generator, autoencoder.load(other.path), z, real)
        for other in decoders
    }
    return {
        "num_samples": real.num_samples,
        "gflops_per_step": registry.model_flops(config) / 1e9,
        "fd_efflite0": reference.image_distance(images),
        "fd_tokens": reference.token_distance(z),
        "decoded": {k: reference.image_distance(x) for k, x in by_decoder.items()},
        # The same images as the encoder sees them.
        "encoded": {
            name: reference.token_distance(_encode(generator, x, real))
            for name, x in by_decoder.items()
        },
        "scales": reference.scales,
    }


def _decode(
    generator: generation.Generator,
    decoder: autoencoder.Autoencoder,
    z: np.ndarray,
    real: "_Real",
) -> np.ndarray:
    """Returns uint8 images (n, h, w, 3) of normalised latents."""

    @jax.jit
    def decode(params, stats, z):
        return reconstruction.to_uint8(
            decoder.decode(params, rae.denormalize(z, stats))
        )

    parts = np.split(z, range(real.batch_size, len(z), real.batch_size))
    images = [decode(decoder.params, generator.stats, part) for part in parts]
    return np.concatenate([np.asarray(x) for x in images])


class _Reference:
    """Real training images, and the distances of others to them.

    Attributes:
        scales: Distances of as many other training images as there will be samples,
            "real", and of noise, "noise": `fd_tokens` of latents, `fd_efflite0` of
            images, `fd_encoded` of the latents of those images.
    """

    def __init__(self, generator: generation.Generator, real: "_Real"):
        num = real.num_samples
        self._net = features.make_efflite0(real.batch_size)
        images = _training_images(generator)
        if len(images) < 2 * num:
            raise ValueError(
                f"{len(images)} training images are too few to compare {num} samples "
                f"with; lower --num-samples to at most {len(images) // 2}."
            )
        order = np.random.default_rng(SEED).permutation(len(images))
        held_out, others = images[order[:num]], images[order[num:]]
        self._images = self._measure(others)
        self._tokens = _token_moments(_encode(generator, others, real))
        noise = generate.sample_noise(SEED, np.arange(num), generator.latent_shape)
        noise = np.asarray(noise)
        decoded = _decode(generator, generator.decoder, noise, real)
        tokens = self.token_distance(_encode(generator, held_out, real))
        self.scales = {
            "fd_efflite0_real": self.image_distance(held_out),
            "fd_efflite0_noise": self.image_distance(decoded),
            "fd_tokens_real": tokens,
            "fd_tokens_noise": self.token_distance(noise),
            "fd_encoded_real": tokens,
            "fd_encoded_noise": self.token_distance(_encode(generator, decoded, real)),
        }

    def image_distance(self, images: np.ndarray) -> float:
        """Returns fd_efflite0 of uint8 images (n, h, w, 3)."""
        result = quality.compare(self._measure(images), self._images)
        return result.scores[self._net.name]

    def token_distance(self, z: np.ndarray) -> float:
        """Returns the distance of the tokens of normalised latents (n, h, w, c)."""
        return frechet.frechet_distance(_token_moments(z), self._tokens)

    def _measure(self, images: np.ndarray) -> quality.Measured:
        size = self._net.batch_size
        parts = np.split(images, range(size, len(images), size))
        return quality.measure(self._net, parts, "images")


class _Real:
    """The reference, made when it is first needed; all runs share it."""

    def __init__(self, num_samples: int, batch_size: int):
        self.num_samples, self.batch_size = num_samples, batch_size
        self._found: _Reference | None = None

    def measured(self, generator: generation.Generator) -> _Reference:
        if self._found is None:
            self._found = _Reference(generator, self)
        return self._found


def _training_images(generator: generation.Generator) -> np.ndarray:
    data = generator.config.data
    with inputs.eval_batches(data, data.split) as batches:
        return np.concatenate([b["image"][b["mask"] > 0] for b in batches])


def _encode(
    generator: generation.Generator, images: np.ndarray, real: "_Real"
) -> np.ndarray:
    """Returns the normalised latents of uint8 images (n, h, w, 3)."""
    loaded = generator.decoder

    @jax.jit
    def encode(params, stats, images):
        z = loaded.encode(params, inputs.to_float(images))
        return rae.normalize(z, stats)

    parts = np.split(images, range(real.batch_size, len(images), real.batch_size))
    found = [encode(loaded.params, generator.stats, part) for part in parts]
    return np.concatenate([np.asarray(z) for z in found])


def _token_moments(z: np.ndarray) -> frechet.Moments:
    """Returns the moments of all tokens of latents (n, h, w, c)."""
    width = z.shape[-1]
    return frechet.add(frechet.Moments.empty(width), z.reshape(-1, width))
