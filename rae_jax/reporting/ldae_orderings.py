"""Which of the l-DAE paper's orderings small runs repeat.

An ordering holds, or does not, only if all runs of one side are better than all of the
other, whatever their seeds, and by more than what accuracies on so many validation
images are known to; else it is said to be unclear.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rae_jax.reporting import ldae_encoders, ldae_rows, ldae_runs
from rae_jax.reporting import ldae_scores as scores

YES, NO, UNCLEAR = "yes", "no", ldae_encoders.UNCLEAR
HEADS = ("ordering", "tier", "paper", "expected", "measured", "seeds", "holds")
Values = Sequence[float]


@dataclasses.dataclass(frozen=True)
class Ordering:
    """One ordering in one tier.

    Attributes:
        claim: What the paper found.
        tier: Size of the runs.
        paper: Its figures.
        expected: What should be found.
        measured: What was, with all runs.
        seeds: Of the runs.
        holds: One of YES, NO and UNCLEAR.
    """

    claim: str
    tier: str
    paper: str
    expected: str
    measured: str
    seeds: tuple[int, ...]
    holds: str

    def cells(self) -> tuple[str, ...]:
        """Returns the texts under `HEADS`."""
        seeds = ", ".join(map(str, self.seeds))
        first = (self.claim, self.tier, self.paper, self.expected, self.measured)
        return (*first, seeds, self.holds)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An ordering of two rows: claim, better row, worse row, and if a tie will do."""

    claim: str
    better: str
    worse: str
    ties: bool = False


# Rows of configs/ldae.py; those with x_ are not in the paper: its comparison with
# the patch PCA in the place of the conv VAE, which needs no trained tokenizer.
PAIRS = (
    Pair("pixels with large d below PCA", "t2_ppca_d32", "f5_pix_256_p16"),
    Pair("no classes at least as good", "t1_no_cls", "t1_dit_baseline", True),
    Pair("no classes at least as good (PCA)", "t2_ppca_d32", "x_ppca_cls", True),
    Pair("linear gamma^2 above DDPM's", "t1_linear_g2", "t1_no_adv"),
    Pair("linear gamma^2 above DDPM's (PCA)", "t2_ppca_d32", "x_ppca_ddpm"),
    Pair("many noise levels above one", "t3_orig_image", "x_single_sigma"),
)


def judge(better: Values, worse: Values, error: float = 0.0) -> str:
    """Returns whether all values of one side are above all of the other.

    Args:
        better: Values of the side that should be above.
        worse: Those of the other.
        error: Differences up to this say nothing.
    """
    if min(better) > max(worse) + error:
        return YES
    return NO if max(better) < min(worse) - error else UNCLEAR


def standard_error(runs: Sequence[ldae_runs.Run], values: Values) -> float:
    """Returns the standard error in per cent of accuracies on the runs' images."""
    sizes = [run.config.get("data.validation_size") for run in runs]
    share = statistics.fmean(values) / 100
    if not all(sizes):
        return 0.0
    return 100 * math.sqrt(max(share * (1 - share), 0.0) / min(sizes))


def rows(folders: Sequence[Path], runs: Sequence[ldae_runs.Run]) -> list[Ordering]:
    """Returns the orderings that the runs say something about."""
    found = []
    for tier in dict.fromkeys(run.tier for run in runs):
        same = [run for run in runs if run.tier == tier]
        found += [_curve(tier, same, name) for name in ldae_rows.TOKENIZERS]
        found += [_pair(tier, same, pair) for pair in PAIRS]
        found += [_middle(tier, same), _noisy(tier, same)]
    found += [
        Ordering(**fields) for fields in ldae_encoders.comparisons(folders, judge)
    ]
    return [row for row in found if row is not None]


def listed(values: Values) -> str:
    """Returns values side by side."""
    return ", ".join(f"{x:.1f}" for x in values)


def _probed(runs: Sequence[ldae_runs.Run], row: str) -> dict[ldae_runs.Run, float]:
    """Returns the runs of a row and their protocol's accuracy."""
    names = {row, ldae_rows.SAME_RUN.get(row, row)}
    entry = ldae_rows.Entry("", row, None)
    found = [
        (run, scores.of(run, ldae_rows.PROBE, entry))
        for run in runs
        if run.row in names
    ]
    return {run: score.value for run, score in found if score is not None}


def _paper(row: str) -> str:
    name = ldae_rows.SAME_RUN.get(row, row)
    figure = ldae_rows.ACCURACIES.get(name)
    return "" if figure is None else f"{figure:.1f}"


def _seeds(runs: Sequence[ldae_runs.Run]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(run.seed for run in runs if run.seed is not None))


def _curve(tier: str, runs: Sequence[ldae_runs.Run], name: str) -> Ordering | None:
    """An inverted U over latent dimensions."""
    dims: dict[int, list[float]] = {}
    used = []
    for nominal in ldae_rows.LATENT_DIMS:
        for run, value in _probed(runs, f"t2_{name}_d{nominal}").items():
            dim = run.config.get("tokenizer.latent_dim", nominal)
            dims.setdefault(dim, []).append(value)
            used.append(run)
    if len(dims) < 3:
        return None
    title, figures = ldae_rows.TOKENIZERS[name]
    return Ordering(
        claim=f"inverted U over d: {title}",
        tier=tier,
        paper=" ".join(map(str, figures)),
        expected="best d within, not at an end",
        measured="; ".join(f"d {d}: {listed(v)}" for d, v in sorted(dims.items())),
        seeds=_seeds(used),
        holds=judge_curve(dims, error=_error(used, dims)),
    )


def judge_curve(
    values: Mapping[int, Values], best: int | None = None, error: float = 0.0
) -> str:
    """Returns whether one of more than two settings is above both ends.

    Args:
        values: Accuracies by setting.
        best: The setting within that should be; None for the best of those within.
        error: Differences up to this say nothing.
    """
    keys = sorted(values)
    inner, ends = keys[1:-1], (keys[0], keys[-1])
    top = max(keys, key=lambda k: statistics.fmean(values[k]))
    if best is None:
        best = max(inner, key=lambda k: statistics.fmean(values[k]))
    found = [judge(values[best], values[end], error) for end in ends]
    if NO in found:
        return NO
    return YES if found == [YES, YES] and top == best else UNCLEAR


def _error(runs: Sequence[ldae_runs.Run], values: Mapping[int, Values]) -> float:
    return standard_error(runs, [x for group in values.values() for x in group])


def _pair(tier: str, runs: Sequence[ldae_runs.Run], pair: Pair) -> Ordering | None:
    sides = [_probed(runs, row) for row in (pair.better, pair.worse)]
    if not all(sides):
        return None
    better, worse = (list(side.values()) for side in sides)
    runs = [run for side in sides for run in side]
    error = standard_error(runs, better + worse)
    holds = judge(better, worse, error)
    if pair.ties and holds == UNCLEAR and min(better) >= max(worse) - error:
        holds = YES
    return Ordering(
        claim=pair.claim,
        tier=tier,
        paper=" / ".join(filter(None, map(_paper, (pair.better, pair.worse)))),
        expected=f"{pair.better} {'>=' if pair.ties else '>'} {pair.worse}",
        measured=f"{listed(better)}; {listed(worse)}",
        seeds=_seeds(runs),
        holds=holds,
    )


def _middle(tier: str, runs: Sequence[ldae_runs.Run]) -> Ordering | None:
    """The best block to probe is the middle one."""
    curves = {
        run: scores.by_block(run)
        for run in runs
        if run.row == "t3_orig_image" and run.depth
    }
    curves = {run: curve for run, curve in curves.items() if len(curve) > 2}
    blocks = sorted({block for curve in curves.values() for block in curve})
    middle = next((run.depth // 2 for run in curves), 0)  # Of one tier, so of all.
    if middle not in blocks[1:-1]:
        return None
    values = {b: [c[b] for c in curves.values() if b in c] for b in blocks}
    return Ordering(
        claim="probe peaks at the middle block",
        tier=tier,
        paper="block 12 of 24: 64.5; 9: 58.5; 15: 59.7",
        expected=f"block {middle} best, above first and last",
        measured="; ".join(f"{b}: {listed(v)}" for b, v in values.items()),
        seeds=_seeds(list(curves)),
        holds=judge_curve(values, middle, _error(list(curves), values)),
    )


def _noisy(tier: str, runs: Sequence[ldae_runs.Run]) -> Ordering | None:
    """Noisy probe inputs are at least as good as clean ones, at their best times."""
    best: dict[bool, list[float]] = {False: [], True: []}
    used = []
    for run in runs:
        if run.row != "t3_orig_image":
            continue
        found: dict[bool, list[float]] = {False: [], True: []}
        for entry in scores.other_times(run):
            score = scores.of(run, ldae_rows.PROBE, entry)
            if score is not None:
                found[entry.noisy].append(score.value)
        if all(found.values()):
            used.append(run)
            for noisy, values in found.items():
                best[noisy].append(max(values))
    if not used:
        return None
    return Ordering(
        claim="noisy probe inputs above clean ones, best times",
        tier=tier,
        paper="65.0 / 64.5",
        expected="noisy > clean",
        measured=f"{listed(best[True])}; {listed(best[False])}",
        seeds=_seeds(used),
        holds=judge(best[True], best[False], _error(used, best)),
    )
