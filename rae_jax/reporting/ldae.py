"""The tables of the l-DAE paper, each figure beside what was measured."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from rae_jax import config as configs
from rae_jax import storage
from rae_jax.reporting import ldae_orderings, ldae_rows, ldae_runs
from rae_jax.reporting import ldae_scores as scores

HEADS = ("figure", "row", "paper", "ours", "epochs", "tier", "seeds", "remark")
FORMATS = (".md", ".json")
Runs = list[ldae_runs.Run]


@dataclasses.dataclass(frozen=True)
class Line:
    """One figure in one tier, or a figure that was not measured.

    Attributes:
        label: What it is.
        row: Pre-training run, as its variant is called.
        paper: The paper's figure, None where there is none.
        values: Ours, one per run; empty if there are none.
        metric: What ours are: "top-1" in per cent, "FID", or another distance.
        epochs: Passes over the training images, one per run, None if not known.
        steps: Steps, one per run.
        tier: Size of the runs.
        seeds: Of the runs, as far as they are known.
        remark: What has to be known to compare.
    """

    label: str
    row: str
    paper: float | None
    values: tuple[float, ...] = ()
    metric: str = ""
    epochs: tuple[float | None, ...] = ()
    steps: tuple[int, ...] = ()
    tier: str = ""
    seeds: tuple[int, ...] = ()
    remark: str = ""

    def cells(self) -> tuple[str, ...]:
        """Returns the texts under `HEADS`."""
        return (
            self.label,
            self.row,
            "" if self.paper is None else f"{self.paper:.1f}",
            f"{spread(self.values)}{self._metric()}",
            self._length(),
            self.tier,
            ", ".join(map(str, self.seeds)),
            self.remark,
        )

    def _metric(self) -> str:
        plain = not self.values or self.metric in (scores.TOP1, scores.FID)
        return "" if plain else f" ({self.metric})"

    def _length(self) -> str:
        if self.epochs and None not in self.epochs:
            return _range([f"{x:.3g}" for x in self.epochs])
        known = [f"{x:,} steps" for x in self.steps if x]
        return _range(known) if known else ""


def spread(values: Sequence[float]) -> str:
    """Returns the mean and, of several values, their standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.1f}"


def tables(runs: Runs) -> dict[str, list[Line]]:
    """Returns the lines of every table by its name, those without figures too."""
    found = {}
    for table in ldae_rows.TABLES:
        lines = [line for e in table.entries for line in _lines(table, e, runs)]
        found[table.name] = lines + _more_heads(table, runs)
    return found


def markdown(folders: Sequence[Path]) -> str:
    """Returns all tables and orderings as Markdown."""
    runs, parts = ldae_runs.find(folders), []
    found = tables(runs)
    for table in ldae_rows.TABLES:
        rows = [line.cells() for line in found[table.name]]
        parts.append(f"## {table.title}\n\n{_markdown(HEADS, rows)}")
    rows = [row.cells() for row in ldae_orderings.rows(folders, runs)]
    title = "Orderings"
    if rows:
        parts.append(f"## {title}\n\n{_markdown(ldae_orderings.HEADS, rows)}")
    return "\n\n".join(parts) + "\n"


def write(folders: Sequence[Path], path: Path) -> None:
    """Writes all tables to a .md or .json file.

    Raises:
        ConfigError: Its name ends otherwise, or see `ldae_runs.find`.
    """
    check_format(path)
    text = markdown(folders) if path.suffix == ".md" else _json(folders)
    storage.write_atomically(path, text.encode())


def check_format(path: Path) -> None:
    """Raises a ConfigError for a file that cannot be written."""
    if path.suffix not in FORMATS:
        raise configs.ConfigError(
            f"--out {path}: with --table ldae it must end in {' or '.join(FORMATS)}."
        )


def _json(folders: Sequence[Path]) -> str:
    runs = ldae_runs.find(folders)
    found = {
        name: [dataclasses.asdict(line) for line in lines]
        for name, lines in tables(runs).items()
    }
    rows = [dataclasses.asdict(row) for row in ldae_orderings.rows(folders, runs)]
    return json.dumps({"tables": found, "orderings": rows}, indent=2)


def _lines(table: ldae_rows.Table, entry: ldae_rows.Entry, runs: Runs) -> list[Line]:
    row = ldae_rows.SAME_RUN.get(entry.row, entry.row)
    mine = [run for run in runs if run.row in (row, entry.row) and _fits(run, entry)]
    found = []
    for tier, same in _by_tier(mine):
        pairs = [(run, scores.of(run, table.score, entry)) for run in same]
        found += _line(entry, tier, [(r, s) for r, s in pairs if s is not None])
    blank = Line(entry.label, entry.row, entry.paper, remark=entry.note)
    return found or [blank]


def _fits(run: ldae_runs.Run, entry: ldae_rows.Entry) -> bool:
    """Whether a block is counted in a network of the depth that the label says."""
    depth = run.depth or ldae_rows.DEPTH
    known = None if entry.block is None else ldae_rows.block_label(entry.block, depth)
    return known in (None, entry.label)


def _line(
    entry: ldae_rows.Entry,
    tier: str,
    pairs: Sequence[tuple[ldae_runs.Run, scores.Score]],
) -> list[Line]:
    """Returns one line per metric of what runs of a tier have."""
    found = []
    for metric in dict.fromkeys(score.metric for _, score in pairs):
        same = [(run, score) for run, score in pairs if score.metric == metric]
        runs = [run for run, _ in same]
        remarks = (entry.note if tier == "paper" else "", *map(_setting, runs))
        line = Line(
            label=entry.label,
            row=entry.row,
            paper=entry.paper,
            values=tuple(score.value for _, score in same),
            metric=metric,
            epochs=tuple(run.epochs() for run in runs),
            steps=tuple(run.steps for run in runs),
            tier=tier,
            seeds=tuple(r.seed for r in runs if r.seed is not None),
            remark="; ".join(dict.fromkeys(filter(None, remarks))),
        )
        found.append(line)
    return found


def _setting(run: ldae_runs.Run) -> str:
    """Returns what a run of another tier than the paper's has smaller."""
    names = {
        "data.image_size": "{} px",
        "tokenizer.latent_dim": "d = {}",
        "model.depth": "{} blocks",
        "model.hidden_size": "width {}",
    }
    if run.tier == "paper":
        return ""
    known = [t.format(run.config[k]) for k, t in names.items() if k in run.config]
    return ", ".join(known)


def _more_heads(table: ldae_rows.Table, runs: Runs) -> list[Line]:
    """Returns lines of appendix A for times and blocks that the paper has not."""
    read = {
        "appendix_a_times": scores.other_times,
        "appendix_a_blocks": scores.other_blocks,
    }.get(table.name)
    if read is None:
        return []
    mine = [run for run in runs if run.row == "t3_orig_image"]
    known = {entry.label for entry in table.entries}
    entries = {e.label: e for run in mine for e in read(run) if e.label not in known}
    found = [_lines(table, entry, mine) for entry in entries.values()]
    return [line for lines in found for line in lines]


def _by_tier(runs: Iterable[ldae_runs.Run]) -> list[tuple[str, Runs]]:
    tiers: dict[str, Runs] = {}
    for run in runs:
        tiers.setdefault(run.tier, []).append(run)
    return list(tiers.items())


def _range(texts: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(texts))


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
