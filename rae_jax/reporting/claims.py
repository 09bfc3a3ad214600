"""The paper's claims (arXiv:2510.11690), each beside what small runs measured.

A row compares runs of configs/claims.py that differ in one thing. A comparison holds,
or does not, only if all seeds agree and the score tells samples from noise; else it is
said to be unclear.
"""

import dataclasses
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rae_jax import storage
from rae_jax.reporting import claim_runs

TABLE_NAME = "claims.json"
PLOT_NAME = "claims.png"
YES, NO, UNCLEAR, NOT_RUN = "yes", "no", "unclear", "not run"
TOLERANCE = 0.1  # Above the floor of the theorem, relative to it.
NOISE = 0.01  # By which a mean of finitely many samples may be below it.
CONVERGED = 0.1  # Far below every floor that is tested.
BLIND = 0.9  # A distance of samples beyond this part of noise's decides nothing.
SIGMA = 0.8  # Noise on latents at which decoders are compared, the tau of one.
# Distances to real training crops, and of what.
SCALES = {
    "fd_efflite0": "features of images",
    "fd_tokens": "tokens of latents",
    "fd_encoded": "tokens of decoded images",
}
DISTANCES = ("fd_efflite0", "fd_tokens")
_RECONSTRUCTION = {"psnr": "PSNR", "lpips_alex": "LPIPS", "fd_efflite0": "fd_efflite0"}
# Floor: the final loss of the paper's network, and its d and n.
_PAPER_WIDTHS = {
    0.5: "0.50: 0.52 (384 of 768)",
    0.625: "0.625: 0.65 (384 of 1024)",
    0.25: "0.25: 0.27 (768 of 1024)",
}

Runs = list[claim_runs.Run]
Read = Callable[[claim_runs.Run], float | None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        claim: What is claimed, after the section of the paper.
        paper: The paper's figures.
        expected: What should be found at this size.
        measured: What was.
        holds: One of YES, NO, UNCLEAR and NOT_RUN.
        seeds: Of the runs behind it.
        missing: Commands that make what is missing.
    """

    claim: str
    paper: str
    expected: str
    measured: str
    holds: str
    seeds: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()


def table(folder: Path) -> list[Row]:
    """Returns the rows of a folder, complete or not.

    Raises:
        ConfigError: See `claim_runs.find`.
    """
    folder, runs = storage.path(folder), claim_runs.find(folder)
    rows = [_width(folder, runs, width) for width in claim_runs.WIDTHS]
    return rows + [_compared(folder, runs, claim) for claim in COMPARISONS]


def write(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes the table as JSON and, if there are any, the widths' curves as PNG."""
    folder, runs = storage.path(folder), claim_runs.find(folder)
    found = [dataclasses.asdict(row) for row in rows]
    text = json.dumps({"rows": found, "scales": scales(runs)}, indent=2)
    paths = [folder / TABLE_NAME]
    storage.write_atomically(paths[0], text.encode())
    runs = [run for run in runs if run.variant.startswith("width_")]
    if runs:
        paths.append(folder / PLOT_NAME)
        storage.write_atomically(paths[1], _plot(runs))
    return paths


def scales(runs: Runs) -> dict[str, float]:
    """Returns the distances of real images and of noise, which say what others mean."""
    return next((r.scores["scales"] for r in runs if "scales" in r.scores), {})


def missing(rows: Sequence[Row]) -> list[str]:
    """Returns the commands that make what is missing, each once, in order."""
    return list(dict.fromkeys(line for row in rows for line in row.missing))


def floor(width: int, tokens: int) -> float:
    """Returns what the loss of one latent cannot fall below, 0 from its width on.

    A network whose tokens pass through d dimensions predicts the noise in d of the n
    of the latent's tokens; in the others its variance of 1 is left (Theorem 1).
    """
    return max(0.0, 1 - width / tokens)


def _floor(run: claim_runs.Run) -> float:
    sizes = ("model.hidden_size", "encoder.sizes.hidden_size")
    return floor(*(run.config[name] for name in sizes))


def _width(folder: Path, runs: Runs, width: int) -> Row:
    variant = f"width_{width}"
    found = claim_runs.finished(runs, variant)
    claim = f"4.1 Theorem 1: one latent, width {width} of {claim_runs.TOKENS}"
    low = floor(width, claim_runs.TOKENS)
    paper = _PAPER_WIDTHS.get(low, "no floor: 0.001 to 0.036 (d >= n)")
    expected = f"{low:.3f} to {low * (1 + TOLERANCE):.3f}"
    if not low:
        expected = f"below {CONVERGED:g}"
    if not found:
        return _not_run(folder, claim, paper, expected, [variant])
    losses = [run.final_loss() for run in found]
    fits = [_fits(run.final_loss(), _floor(run)) for run in found]
    seeds = tuple(run.seed for run in found)
    measured = f"loss {_listed(losses)}"
    return Row(claim, paper, expected, measured, YES if all(fits) else NO, seeds)


def _fits(loss: float, low: float) -> bool:
    if not low:
        return loss < CONVERGED
    return low * (1 - NOISE) <= loss <= low * (1 + TOLERANCE)


def _plot(runs: Runs) -> bytes:
    """Draws losses over steps, floors dashed in the colours of their widths."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(7, 4), layout="constrained")
    axis = picture.subplots()
    widths = sorted({run.config["model.hidden_size"] for run in runs})
    for i, width in enumerate(widths):
        same = [r for r in runs if r.config["model.hidden_size"] == width]
        for number, run in enumerate(same):
            label = "_" if number else f"width {width}"
            axis.plot(*run.curve(), color=f"C{i}", linewidth=1.2, label=label)
        if low := _floor(same[0]):
            axis.axhline(low, color=f"C{i}", linewidth=0.8, linestyle="--")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.set_title("One latent: loss by width, and the floors of Theorem 1")
    axis.minorticks_off()
    axis.set_yticks([0.001, 0.01, 0.1, 0.25, 0.5, 1])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two that a claim compares.

    Attributes:
        name: What the table calls it.
        variant: Variant of its runs.
        read: Returns a run's score, None if it has not been measured.
    """

    name: str
    variant: str
    read: Read

    def scores(self, runs: Runs) -> dict[int, float]:
        """Returns the scores by seed."""
        found = claim_runs.finished(runs, self.variant)
        scores = {run.seed: self.read(run) for run in found}
        return {seed: x for seed, x in scores.items() if x is not None}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A claim that one side scores better than another.

    Attributes:
        claim: See `Row`.
        paper: See `Row`.
        score: What is compared.
        better: The side that is claimed to be better.
        worse: The other.
        higher: Whether a higher score is the better one.
        scale: Of `scales`, for distances of samples: whose "noise" they are held
            against; empty for other scores.
    """

    claim: str
    paper: str
    score: str
    better: Side
    worse: Side
    higher: bool = False
    scale: str = ""


def _compared(folder: Path, runs: Runs, claim: Comparison) -> Row:
    sides, sign = (claim.better, claim.worse), -1.0 if claim.higher else 1.0
    relation = " > " if claim.higher else " < "
    expected = f"{claim.score}: {relation.join(side.name for side in sides)}"
    scores = [side.scores(runs) for side in sides]
    if not all(scores):
        variants = dict.fromkeys(side.variant for side in sides)
        absent = [v for v in variants if not claim_runs.finished(runs, v)]
        return _not_run(folder, claim.claim, claim.paper, expected, absent)
    a, b = ([sign * x for x in found.values()] for found in scores)
    holds = YES if max(a) < min(b) else NO if min(a) > max(b) else UNCLEAR
    noise = scales(runs).get(f"{claim.scale}_noise")
    if noise is not None and min(a + b) > BLIND * noise:
        holds = UNCLEAR
    measured = "; ".join(
        f"{side.name} {_listed(list(found.values()))}"
        for side, found in zip(sides, scores, strict=True)
    )
    seeds = tuple(dict.fromkeys(seed for found in scores for seed in found))
    return Row(claim.claim, claim.paper, expected, measured, holds, seeds)


def _not_run(
    folder: Path, claim: str, paper: str, expected: str, variants: Sequence[str]
) -> Row:
    """Returns a row without figures: runs are missing, or else their scores."""
    lines = [
        f"rae-jax train --config configs/claims.py:{variant} --workdir "
        f"{shlex.quote(str(folder / variant))}"
        for variant in variants
    ]
    if not lines:
        place = shlex.quote(str(folder))
        lines = [f"rae-jax report --table claims --measure {place}"]
    return Row(claim, paper, expected, "", NOT_RUN, (), tuple(lines))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}" for x in values)


def _score(name: str) -> Read:
    return lambda run: run.scores.get(name)


def _disturbed(name: str, sigma: float) -> Read:
    """Reads a decoder's score of latents with noise of a strength."""

    def read(run: claim_runs.Run) -> float | None:
        curves = run.scores.get("curves", {"sigma": []})
        if sigma not in curves["sigma"] or name not in curves:
            return None
        return curves[name][curves["sigma"].index(sigma)]

    return read


def _decoded(key: str, decoder: str) -> Read:
    """Reads a distance of a run's samples that a decoder made."""
    return lambda run: run.scores.get(key, {}).get(decoder)


def _shifts() -> list[Comparison]:
    claim, paper = "4.2: times shifted by dimension", "gFID 23.08 -> 4.81 (DiT-XL)"
    return [
        Comparison(
            claim,
            paper,
            score,
            Side(name, variant, _score(score)),
            Side("none", "no_shift", _score(score)),
            scale=score,
        )
        for name, variant in (("formula", "paper_shift"), ("chosen", "dit_dh"))
        for score in DISTANCES
    ]


def _heads() -> list[Comparison]:
    paper = "gFID: DiT-XL 4.28, DiTDH-XL 2.16, DiTDH-B 3.38"
    reads = {name: _score(name) for name in DISTANCES}
    reads |= {"final loss": claim_runs.Run.final_loss}
    return [
        Comparison(
            "5: wide head, equal FLOPs",
            paper,
            score,
            Side("DiT-DH", "dit_dh", read),
            Side("DiT", "dit", read),
            scale=score,
        )
        for score, read in reads.items()
    ]


def _decoders() -> list[Comparison]:
    claim = "4.3: decoder trained on noisy latents"
    found = []
    for sigma, what in ((0.0, "exact latents"), (SIGMA, f"latents + {SIGMA:g} noise")):
        for key, score in _RECONSTRUCTION.items():
            read = _disturbed(key, sigma)
            noisy = Side("noisy", "decoder_noisy", read)
            clean = Side("clean", "decoder_clean", read)
            pair = (noisy, clean) if sigma else (clean, noisy)
            paper = "no figure" if sigma else "rFID 0.49 -> 0.57"
            higher = key == "psnr"
            row = Comparison(f"{claim}, {what}", paper, score, *pair, higher)
            found.append(row)
    paper = "gFID 4.81 -> 4.28 (DiT-XL)"
    for key, score in (("decoded", "fd_efflite0"), ("encoded", "fd_encoded")):
        sides = (
            Side(name, "dit_dh", _decoded(key, f"decoder_{name}"))
            for name in ("noisy", "clean")
        )
        row = Comparison(f"{claim}, samples", paper, score, *sides, scale=score)
        found.append(row)
    return found


COMPARISONS = (*_shifts(), *_heads(), *_decoders())
