"""What one pre-training run scores, as the l-DAE paper's protocols say."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from rae_jax.reporting import ldae_rows, ldae_runs

TOP1, FID = "top-1", "FID"
_FID_KEYS = {"gfid": FID, "fd_efflite0": "fd_efflite0"}
Head = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """A measured value and what it is; accuracies are in per cent."""

    value: float
    metric: str


def of(run: ldae_runs.Run, score: str, entry: ldae_rows.Entry) -> Score | None:
    """Returns a run's value of one of the paper's figures, None if it has none.

    Several probes of one run, which differ in their own seed, are averaged.
    """
    if score == ldae_rows.FID:
        return _distance(run)
    if score == ldae_rows.FINETUNE:
        # The paper averages the weights; short runs are better without.
        values = [max(x["top1"], x.get("ema_top1", 0.0)) for x in run.finetunes]
    elif score == ldae_rows.BEST_PROBE:
        values = _best_of_probes(run, lambda head, probe: True)
    else:
        values = _best_of_probes(run, _chooser(run, entry))
    return Score(100 * statistics.fmean(values), TOP1) if values else None


def encoder_heads(probe: Head) -> dict[str, Head]:
    """Returns the heads of a probe that read the encoder, not something beside it."""
    heads = probe.get("heads", {})
    return {n: h for n, h in heads.items() if h.get("features", "encoder") == "encoder"}


def last_block(run: ldae_runs.Run, probe: Head) -> int | None:
    """Returns the encoder's last block, counted from 1."""
    if "encoder_depth" in run.config:
        return run.config["encoder_depth"]
    return max(
        (h["block"] for h in encoder_heads(probe).values() if h.get("block")),
        default=None,
    )


def by_block(run: ldae_runs.Run) -> dict[int, float]:
    """Returns the accuracy of the blocks of the network, at the protocol's time."""
    found = {}
    for entry in other_blocks(run):
        score = of(run, ldae_rows.PROBE, entry)
        if score is not None:
            found[entry.block] = score.value
    return found


def other_times(run: ldae_runs.Run) -> Iterator[ldae_rows.Entry]:
    """Yields the times and inputs that a run was probed with."""
    pairs = {(h.get("t"), bool(h.get("noisy"))) for h in _all_heads(run)}
    for t, noisy in sorted(p for p in pairs if p[0] is not None):
        label = ldae_rows.time_label(t, noisy)
        yield ldae_rows.Entry(label, run.row, None, "", t, noisy)


def other_blocks(run: ldae_runs.Run) -> Iterator[ldae_rows.Entry]:
    """Yields the blocks that a run was probed at."""
    for block in sorted({h["block"] for h in _all_heads(run) if h.get("block")}):
        label = ldae_rows.block_label(block, run.depth or ldae_rows.DEPTH)
        yield ldae_rows.Entry(label, run.row, None, block=block)


def _all_heads(run: ldae_runs.Run) -> list[Head]:
    return [h for probe in run.probes for h in encoder_heads(probe).values()]


def _chooser(
    run: ldae_runs.Run, entry: ldae_rows.Entry
) -> Callable[[Head, Head], bool]:
    """Returns whether a head of a probe is the one that an entry means."""
    time = ldae_rows.PROBE_TIME if entry.time is None else entry.time

    def chosen(head: Head, probe: Head) -> bool:
        block = last_block(run, probe) if entry.block is None else entry.block
        # Of networks that know no noise, as MAE's, heads have no time.
        same_time = head.get("t") in (time, None)
        same_block = head.get("block") in (block, None)
        return same_time and same_block and bool(head.get("noisy")) == entry.noisy

    return chosen


def _best_of_probes(run: ldae_runs.Run, choose: Callable[..., bool]) -> list[float]:
    """Returns the best of the chosen heads, over learning rates, of every probe."""
    found = []
    for probe in run.probes:
        heads = encoder_heads(probe).values()
        values = [h["top1"] for h in heads if choose(h, probe)]
        found += [max(values)] if values else []
    return found


def _distance(run: ldae_runs.Run) -> Score | None:
    for key, metric in _FID_KEYS.items():
        if key in run.generation:
            return Score(float(run.generation[key]), metric)
    return None
