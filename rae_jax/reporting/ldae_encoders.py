"""What an l-DAE encoder is worth in RAE: decoders and generators behind three encoders.

Runs tell by their config which encoder is theirs, and by `evaluation.json`, which
`rae-jax evaluate` writes, what they score.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rae_jax import config as configs
from rae_jax.reporting import claim_runs, ldae_runs
from rae_jax.training import checkpoints

LDAE, RANDOM, PIXELS = "l-DAE", "random", "pixels"
UNCLEAR = "unclear"
Values = dict[str, list[tuple[int, float]]]
EVALUATION_NAME = "evaluation.json"
# Trainer: what is compared, its name in the file, and whether more is better.
SCORES = {
    "rae_decoder": (("LPIPS", "lpips_alex", False), ("PSNR", "psnr", True)),
    "latent_diffusion": (("fd_efflite0", "fd_efflite0_samples", False),),
}
# Of an untrained generator: a distance beyond this part of it decides nothing.
_CEILING, BLIND = "fd_efflite0_untrained", 0.9
_WHAT = {"rae_decoder": "reconstruction", "latent_diffusion": "generation"}


def kind(config: dict[str, Any]) -> str:
    """Returns whether a flat config's encoder is LDAE, RANDOM or PIXELS, or ""."""
    name, weights = config.get("encoder.name"), config.get("encoder.weights")
    if name == "pixels":
        return PIXELS
    if name == "ldae":
        return RANDOM if weights == "random" else LDAE
    return ""


def comparisons(
    folders: Sequence[Path], judge: Callable[..., str]
) -> Iterator[dict[str, Any]]:
    """Yields the fields of an ordering for each score that two encoders have.

    Args:
        folders: Where the runs lie.
        judge: Says whether all values of one side are above all of the other.
    """
    for trainer, scores in SCORES.items():
        for name, key, higher in scores:
            found = _values(folders, trainer, key)
            ceiling = _values(folders, trainer, _CEILING)
            for other in (RANDOM, PIXELS):
                if found[LDAE] and found[other]:
                    fields = _fields(trainer, name, higher, found, other, judge)
                    if _is_blind(found, ceiling, other):
                        noise = min(x for _, x in ceiling[LDAE] + ceiling[other])
                        fields |= dict(holds=UNCLEAR)
                        fields["measured"] += f"; untrained {noise:.4g}"
                    yield fields


def _is_blind(found: Values, ceiling: Values, other: str) -> bool:
    """Whether a distance does not tell any of the samples from noise."""
    scores, noise = (
        [value for side in (LDAE, other) for _, value in values[side]]
        for values in (found, ceiling)
    )
    return bool(noise) and min(scores) > BLIND * min(noise)


def _fields(
    trainer: str, name: str, higher: bool, found: dict, other: str, judge: Callable
) -> dict[str, Any]:
    sides = [[value for _, value in found[side]] for side in (LDAE, other)]
    sign = 1 if higher else -1
    seeds = [seed for side in (LDAE, other) for seed, _ in found[side]]
    measured = (", ".join(f"{x:.4g}" for x in side) for side in sides)
    return dict(
        claim=f"l-DAE as RAE encoder, {_WHAT[trainer]}: better than {other}",
        tier="photos",
        paper="",
        expected=f"{name}: {LDAE} {'>' if higher else '<'} {other}",
        measured="; ".join(measured),
        seeds=tuple(dict.fromkeys(seeds)),
        holds=judge(*([sign * x for x in side] for side in sides)),
    )


def _values(folders: Sequence[Path], trainer: str, key: str) -> Values:
    """Returns seeds and scores of the runs of a trainer, by encoder."""
    found = {name: [] for name in (LDAE, RANDOM, PIXELS)}
    for path in ldae_runs.workdirs(folders):
        if not (path / EVALUATION_NAME).is_file():
            continue
        config = configs.flatten(claim_runs.read_json(path / checkpoints.CONFIG_NAME))
        scores = claim_runs.read_json(path / EVALUATION_NAME)
        if config.get("trainer") == trainer and kind(config) and key in scores:
            found[kind(config)].append((config["seed"], float(scores[key])))
    return found
