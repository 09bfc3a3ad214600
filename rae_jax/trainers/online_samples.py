"""Scores of samples while a diffusion transformer is trained."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.evaluation import extractors, generate, quality
from rae_jax.trainers import chains, judges, sampling

# Of `config.evaluation`, beside those of `judges.Judges`.
DEFAULTS = dict(num_samples=10_000, guidance=(), online_weights=False, best="")


def make_evaluate(
    config: ConfigDict, workdir: Path, chain: chains.Chain, mesh: Mesh
) -> Callable[[Any], dict[str, float]]:
    """Returns the scores of a run's samples: state -> scalars.

    The EMA weights draw `evaluation.num_samples` samples of balanced classes for each
    scale in `evaluation.guidance`; an empty one means no guidance and, if it differs,
    `sampling.guidance_scale`. With `evaluation.online_weights` the weights that are
    trained do the same. Names are those of `quality.compare`, "gfid_10k" among them,
    with "_cfg1.5" for a guidance scale of 1.5 and "_online" for the trained weights.

    Networks and reference are loaded at once, so that a wrong path costs no time.
    Without networks there are no scores.

    Args:
        config: Config of a `latent_diffusion` run; its `evaluation` block, or parts of
            it, may be missing.
        workdir: Folder of the run, from which paths count.
        chain: From noise to image; its own "dit" is not used.
        mesh: Devices.

    Raises:
        ConfigError: There is no reference, or too few samples are asked for.
        FileNotFoundError, ValueError: Networks or reference cannot be read.
    """
    block = DEFAULTS | dict(config.get("evaluation") or {})
    judging = judges.configured(config, workdir)
    networks = judging.networks(mesh)
    if not networks:
        return lambda run_state: {}
    _check(block, judging)
    references = judging.references(networks, keep=True)
    labels = generate.balanced_labels(
        block["num_samples"], chain.num_classes, config.seed
    )
    usual = sampling.complete(config.sampling).guidance_scale
    scales = tuple(block["guidance"]) or tuple(dict.fromkeys((1.0, usual)))
    options = dict(seed=config.seed, batch_size=judging.batch_size)

    def evaluate(run_state: Any) -> dict[str, float]:
        weights = {"": run_state.ema_params}
        if block["online_weights"]:
            weights["_online"] = run_state.params
        scores = {}
        for (suffix, params), scale in itertools.product(weights.items(), scales):
            guided = "" if scale == 1 else f"_cfg{scale:g}"
            current = dataclasses.replace(chain, params=chain.params | {"dit": params})
            found = measure(
                current, networks, references, labels, scale=scale, **options
            ).scores
            scores |= {f"{k}{guided}{suffix}": v for k, v in found.items()}
        return scores

    return evaluate


def _check(block: Mapping[str, Any], judging: judges.Judges) -> None:
    if not judging.reference:
        raise configs.ConfigError(
            "evaluation.reference is empty: scores of samples need an .npz with "
            "statistics or images, or a folder of images."
        )
    if block["num_samples"] < 2:
        raise configs.ConfigError("evaluation.num_samples must be at least 2.")


def measure(
    chain: chains.Chain,
    networks: tuple[extractors.Extractor, ...],
    references: Mapping[str, quality.Measured],
    labels: np.ndarray,
    *,
    scale: float,
    seed: int,
    batch_size: int,
    progress: quality.Progress = lambda count: None,
) -> quality.Result:
    """Draws samples and compares them with references, batch by batch.

    Args:
        chain: From noise to image.
        networks: What samples are measured with.
        references: What they are compared with, by the networks' names.
        labels: Class of every sample.
        scale: Guidance scale; 1 for none.
        seed: Of the samples.
        batch_size: Samples at a time.
        progress: Called with the number of images just done.
    """
    sets = [
        quality.Collector(net, "the samples", keep=judges.is_inception(net))
        for net in networks
    ]
    drawn = chain.images(labels, scale=scale, seed=seed, batch_size=batch_size)
    for images in drawn:
        for collector in sets:
            collector.add(images)
        progress(len(images))
    scores: dict[str, float] = {}
    notes: list[str] = []
    for collector in sets:
        reference = references[collector.extractor.name]
        result = quality.compare(collector.finish(), reference, prefix="g")
        scores |= result.scores
        notes += [note for note in result.notes if note not in notes]
    return quality.Result(scores, tuple(notes))
