"""Scores of a linear probe: every head's accuracy, and nearest neighbours."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import storage
from rae_jax.data import loader
from rae_jax.evaluation import neighbours, reconstruction
from rae_jax.trainers import frozen, inputs, probe_heads
from rae_jax.training import distributed, sharding

RESULT_NAME = "probe.json"
EPS = 1e-6  # Of the batch normalisation, as in MAE.
_NOISE_SEED = 0


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Maps normalised features (views, b, d) to class scores (heads, b, classes).

    `params` holds as many heads for every view, those of a view one after the other.
    """
    heads, width, classes = params["kernel"].shape
    kernel = params["kernel"].reshape(len(x), heads // len(x), width, classes)
    scores = jnp.einsum("vbd,vhdc->vhbc", x, kernel)
    return scores.reshape(heads, -1, classes) + params["bias"][:, None, :]


def moments(x: jax.Array) -> dict[str, jax.Array]:
    """Returns mean and variance (views, d) of features (views, b, d)."""
    return {"mean": jnp.mean(x, axis=1), "var": jnp.var(x, axis=1)}


def normalize(x: jax.Array, moments: dict[str, jax.Array]) -> jax.Array:
    """Normalises features (views, b, d) by moments (views, d)."""
    scale = jax.lax.rsqrt(moments["var"] + EPS)
    return (x - moments["mean"][:, None, :]) * scale[:, None, :]


def make_evaluate(config: ConfigDict, mesh: Mesh):
    """Returns (state, networks, workdir) -> scores; it also writes `probe.json`.

    Nearest neighbours do not depend on the heads, so they are found once.
    """
    heads = probe_heads.heads(config)
    encoder_def, _ = frozen.encoder(config.encoder)
    extract = partial(probe_heads.extract, config, encoder_def)
    rows = sharding.batch_sharding(mesh)
    key, known = jax.random.key(_NOISE_SEED), {}

    @jax.jit
    def hits_of(state, networks, batch):
        features = extract(networks, batch["image"], batch["index"], key)
        found = {}
        for name, x in features.items():
            scores = logits(state.params[name], normalize(x, state.stats[name]))
            hits = jnp.argmax(scores, axis=-1) == batch["label"][None, :]
            for i, head in enumerate(heads[name]):
                found[f"top1_{head.name}"] = hits[i].astype(jnp.float32)
        return found

    def evaluate(state: Any, networks: Any, workdir: Path) -> dict[str, float]:
        scores = reconstruction.ReconstructionScores()
        with inputs.validation_batches(config.data) as batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                hits = hits_of(state, networks, arrays)
                hits, mask = distributed.to_host((hits, arrays["mask"]))
                scores = scores.add(hits, mask)
        if config.knn.neighbours and not known:
            known.update(find_neighbours(config, networks, extract, mesh))
        _write(config, workdir, scores.means(), known)
        return scores.means() | known

    return evaluate


def find_neighbours(
    config: ConfigDict, networks: Any, extract: Any, mesh: Mesh
) -> dict[str, float]:
    """Returns the accuracy of nearest neighbours, by name, of every view of features.

    Training images are centre-cropped, as those of the validation are.

    Raises:
        ConfigError: Fewer training images than neighbours.
    """
    rows, knn = sharding.batch_sharding(mesh), config.knn
    key, most = jax.random.key(_NOISE_SEED), max(knn.neighbours)

    @jax.jit
    def features_of(networks, batch):
        return extract(networks, batch["image"], batch["index"], key)

    def passes(batches):
        with batches:
            for batch in batches:
                arrays = loader.to_global(batch, rows)
                found = features_of(networks, arrays), arrays["label"], arrays["mask"]
                yield distributed.to_host(found)

    queries, labels = [], []
    for found, label, mask in passes(inputs.validation_batches(config.data)):
        keep = mask > 0
        queries.append({name: x[:, keep] for name, x in found.items()})
        labels.append(label[keep])
    searches = {
        name: [
            neighbours.Neighbours(view, most)
            for view in np.concatenate([part[name] for part in queries], axis=1)
        ]
        for name in queries[0]
    }
    for found, label, mask in passes(
        inputs.eval_batches(config.data, config.data.split)
    ):
        for name, views in searches.items():
            for view, search in enumerate(views):
                search.add(found[name][view], label, mask)
    scores, labels = {}, np.concatenate(labels)
    for name, views in searches.items():
        for label, search in zip(_view_names(config, name), views, strict=True):
            top1 = search.top1(
                labels, config.num_classes, knn.neighbours, knn.temperature
            )
            scores |= {f"knn{k}_{label}": value for k, value in top1.items()}
    return scores


def _view_names(config: ConfigDict, name: str) -> list[str]:
    """Returns the names of the views of a kind of features: those of heads, no rate."""
    heads = probe_heads.heads(config)[name]
    count = max(len(config.sweep.lrs), 1)
    names = [head.name for head in heads[::count]]
    if not config.sweep.lrs:
        return names
    suffix = f"lr{heads[0].lr:g}"
    return [n.removesuffix(suffix).rstrip("_") or name for n in names]


def _write(
    config: ConfigDict, workdir: Path, scores: dict[str, float], knn: dict[str, float]
) -> None:
    """Writes what was measured with what it was measured of."""
    if not distributed.is_main():
        return
    sizes, found = config.encoder.sizes, {}
    for name, heads in probe_heads.heads(config).items():
        for head in heads:
            view = head.view
            found[head.name] = {
                "features": name,
                "block": view.block if view else sizes.depth,
                "t": view.t if view else None,
                "noisy": view.noisy if view else False,
                "lr": head.lr,
                "optimizer": config.optimizer.name,
                "top1": scores[f"top1_{head.name}"],
            }
    of_encoder = [n for n, h in found.items() if h["features"] == "encoder"]
    content = {
        "row": config.get("row", ""),
        "tier": config.get("tier", ""),
        "encoder": config.encoder.weights,
        "heads": found,
        "best": max(of_encoder or found, key=lambda n: found[n]["top1"]),
        "knn": knn,
    }
    text = json.dumps(content, indent=2) + "\n"
    storage.write_atomically(workdir / RESULT_NAME, text.encode())
