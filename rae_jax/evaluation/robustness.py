"""How a decoder's images decay as its latents are disturbed.

Decoders with equal reconstructions differ in what they make of generated latents,
which are never exact (arXiv:2510.11690 section 4.3). Noise on the latents shows it
before anything is generated.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from rae_jax import storage
from rae_jax.evaluation import generate

SIGMAS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_COLUMNS = 3
_HIDDEN = {"sigma", "num_images", "inception_score_std"}


def disturbed(z: jax.Array, sigma: jax.Array, seed: int, index: jax.Array) -> jax.Array:
    """Returns z + sigma eps for latents (b, h, w, c).

    The noise of an image is a function of the seed and its index alone, the same for
    every sigma, so curves are smooth and repeatable.

    Args:
        z: Latents; sigma is in their units.
        sigma: Strength, a scalar.
        seed: Of the noise.
        index: Index of each image (b,).
    """
    return z + sigma * generate.sample_noise(seed, index, z.shape[1:])


def check_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Returns the strengths in increasing order.

    Raises:
        ValueError: One is negative or not finite, one repeats, or there are none.
    """
    found = tuple(sorted(float(sigma) for sigma in sigmas))
    good = all(0 <= sigma < float("inf") for sigma in found)
    if not found or not good or len(set(found)) < len(found):
        raise ValueError(
            f"Noise strengths must be different numbers from 0 upwards, got {sigmas}."
        )
    return found


def save_curves(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Draws every score over sigma into a PNG, atomically.

    Args:
        path: The file.
        curves: "sigma" and, by name, scores of the same length.
    """
    from matplotlib import figure

    names = [name for name in curves if name not in _HIDDEN]
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    picture = figure.Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False)
    axes = list(axes.flat)
    for name, axis in zip(names, axes, strict=False):
        axis.plot(curves["sigma"], curves[name], marker="o")
        axis.set(title=name, xlabel="sigma of the noise on raw latents")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=100)
    storage.write_atomically(path, buffer.getvalue())
