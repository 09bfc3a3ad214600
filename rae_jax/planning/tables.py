"""Plans as text: one column for each target, or one row for each choice of a search."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rae_jax.planning import predict

Report = dict[str, Any]


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """Returns the measures of plans, each a name and one value per plan."""
    unit = {"train": "step"}.get(reports[0]["what"], "batch")
    table = [[name, *map(value, reports)] for name, value in _measures(unit)]
    kinds = sorted({k for r in reports for k in r["collective_bytes_by_kind"] or {}})
    for kind in kinds:
        values = [_by_kind(report, kind) for report in reports]
        table.append([f"- {kind}", *values])
    return [row for row in table if any(cell != "-" for cell in row[1:])]


def _measures(unit: str) -> list[tuple[str, Callable[[Report], str]]]:
    held = "state" if unit == "step" else "weights"
    return [
        ("chips", lambda r: str(r["chips"])),
        ("mesh", _mesh),
        ("rematerialisation", lambda r: r["remat"] or "-"),
        ("batch", lambda r: str(r["batch_size"])),
        ("fits", _fits),
        (f"HBM per chip: {held}", lambda r: _gib(r["hbm_bytes_state"])),
        (
            "HBM: activations and other",
            lambda r: _gib(r["hbm_bytes_peak"] - r["hbm_bytes_state"]),
        ),
        ("HBM: peak", lambda r: _gib(r["hbm_bytes_peak"])),
        (
            f"model FLOPs per {unit}",
            lambda r: scaled(r["flops_per_step"], 1000, "FLOP"),
        ),
        (
            f"estimated cycles per {unit}",
            _cycles,
        ),
        (f"estimated time per {unit}", lambda r: _time(r["seconds_per_step"])),
        ("of which only collectives", lambda r: _time(r["exposed_seconds"])),
        (
            "predicted MFU",
            _mfu,
        ),
        (
            "images per second",
            lambda r: _number(r["images_per_second"], lambda n: f"{_bound(r)}{n:,.0f}"),
        ),
        (
            "the whole run" if unit == "step" else "50,000 images",
            lambda r: _number(
                r["hours"],
                lambda n: f"{n:,.4g} h, {r['chip_hours']:,.4g} chip-hours",
            ),
        ),
        (
            f"collectives per chip and {unit}",
            lambda r: _number(r["collective_bytes_per_step"], _gb),
        ),
    ]


def _cycles(report: Report) -> str:
    if report["basis"] != predict.COMPILER:
        return "-"
    return f"{report['cycles_per_step'] / 1e6:,.1f} M"


def _bound(report: Report) -> str:
    return "< " if report["basis"] == predict.ROOFLINE else ""


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _mesh(report: Report) -> str:
    return ", ".join(f"{k} {n}" for k, n in report["mesh"].items() if n > 1) or "1"


def _fits(report: Report) -> str:
    available = _available(report)
    return f"yes, in {available}" if report["fits"] else f"NO, {available} are there"


def scaled(value: float, base: int, unit: str) -> str:
    """Returns a number with the prefix that keeps it short: "1.5 GFLOP", "3 GiB"."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if base == 1024 else ["", *"kMGTPE"]
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.{4 if value >= 1000 else 3}g} {prefixes[power]}{unit}"


def _gib(count: float) -> str:
    return scaled(count, 1024, "B")


def _gb(count: float) -> str:
    return scaled(count, 1000, "B")


def _by_kind(report: Report, kind: str) -> str:
    found = report["collective_bytes_by_kind"]
    return "-" if found is None else _gb(found.get(kind, 0.0))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def markdown(reports: Sequence[Report]) -> str:
    """Returns the table of plans for a document."""
    head = ["", *(r["target"] for r in reports)]
    lines = [head, ["---"] * len(head), *rows(reports)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(reports: Sequence[Report], title: str, console: Console) -> None:
    """Prints the table of plans, what takes longest, and what it rests on."""
    table = Table(
        "", *(r["target"] for r in reports), title=title, title_justify="left"
    )
    for row in rows(reports):
        style = "bold" if row[0] in ("fits", "predicted MFU") else ""
        table.add_row(*row, style=style)
    console.print(table)
    for report in reports:
        if report["shortage"]:
            console.print(f"[bold]{report['target']}[/]: {report['shortage']}")
        if report["top"]:
            console.print(f"[bold]{report['target']}[/]: most time goes into")
        for line, share in report["top"] or []:
            console.print(f"  {share:6.1%}  {line}", highlight=False)
    notes = dict.fromkeys(note for r in reports for note in r["notes"] or [])
    for note in notes:
        console.print(note, style="dim", highlight=False)
    options = {
        f"{k}={v}" for r in reports for k, v in (r["compiler_options"] or {}).items()
    }
    if options:
        text = f"Compiled with {', '.join(sorted(options))}, as launch/env.sh sets."
        console.print(text, style="dim", highlight=False)


def summary(report: Report) -> str:
    """Returns one line on a plan."""
    if not report["fits"]:
        return f"does not fit: {_gib(report['hbm_bytes_peak'])} in {_available(report)}"
    rate = f"{report['images_per_second']:,.0f} images/s"
    return f"{rate}, {_time(report['seconds_per_step'])}, {_mfu(report)} MFU"


def _available(report: Report) -> str:
    return _gib(report["hbm_bytes_available"])


def _mfu(report: Report) -> str:
    return _number(report["predicted_mfu"], lambda n: f"{_bound(report)}{n:.1%}")


def show_ranking(reports: Sequence[Report], console: Console) -> None:
    """Prints the choices of a search, the fastest first."""
    names = ("", "batch", "mesh", "remat", "fits", "peak", "time", "MFU", "images/s")
    table = Table(*names, title=reports[0]["target"], title_justify="left")
    for place, report in enumerate(reports, 1):
        table.add_row(
            str(place),
            str(report["batch_size"]),
            _mesh(report),
            report["remat"] or "-",
            "yes" if report["fits"] else "NO",
            _gib(report["hbm_bytes_peak"]),
            _time(report["seconds_per_step"]),
            _mfu(report),
            _number(report["images_per_second"], lambda n: f"{n:,.0f}"),
            style="bold" if place == 1 and report["fits"] else "",
        )
    console.print(table)
