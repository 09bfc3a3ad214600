"""Line charts as inline SVG whose colours follow the page, light or dark."""

import dataclasses
import io
import math
import re
from collections.abc import Sequence

import numpy as np

NUM_COLORS = 4
LOG_RATIO = 5.0  # A wider range of positive values gets a logarithmic axis.
_SMOOTH_PARTS = 10  # The smoothing window covers this part of the points.
# matplotlib wants colours; the page's variables replace these when it is drawn.
_COLORS = {f"#0000f{i}": f"var(--c{i})" for i in range(1, NUM_COLORS + 1)}
_TEXT, _RULE = "#0000e1", "#0000e2"
_COLORS |= {_TEXT: "var(--muted)", _RULE: "var(--rule)"}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rae_jax",
    "font.size": 8.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _TEXT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One named curve: steps (n,) and values (n,)."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(
    name: str, lines: Sequence[Line], *, size: tuple[float, float], smooth: bool
) -> str:
    """Draws curves over steps.

    Args:
        name: Of the chart, unique on its page and fit for an HTML id.
        lines: At most `NUM_COLORS` curves; points that are not finite are left out.
        size: Width and height in inches.
        smooth: Whether to draw the smoothed curve over the pale raw one; if not,
            the points are marked.

    Returns:
        An `<svg>` element for an HTML page that defines the colours as variables.

    Raises:
        ValueError: There are more curves than colours.
    """
    if len(lines) > NUM_COLORS:
        raise ValueError(f"{len(lines)} curves, but only {NUM_COLORS} colours.")
    import matplotlib
    from matplotlib.figure import Figure

    curves = [_finite(line) for line in lines]
    log = is_log(np.concatenate([values for _, values in curves]))
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for color, (steps, values) in zip(_COLORS, curves, strict=False):
            _draw(axes, steps, values, color, smooth=smooth, log=log)
        _label(axes, log)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name)


def is_log(values: np.ndarray) -> bool:
    """Returns whether values are positive and so far apart that ratios matter."""
    return bool(
        values.size and values.min() > 0 and values.max() > LOG_RATIO * values.min()
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Averages (n,) with a centred triangular window that shrinks at the ends."""
    reach = max(1, len(values) // _SMOOTH_PARTS)
    offsets = np.abs(np.arange(len(values))[:, None] - np.arange(len(values))[None, :])
    weights = np.clip(reach - offsets, 0, None).astype(float)
    return weights @ values / weights.sum(axis=1)


def _finite(line: Line) -> tuple[np.ndarray, np.ndarray]:
    points = zip(line.steps, line.values, strict=True)
    kept = [(s, v) for s, v in points if math.isfinite(v)]
    array = np.asarray(kept, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _draw(axes, steps, values, color, *, smooth: bool, log: bool) -> None:
    if not smooth or len(steps) < 2:
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=4)
        return
    axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.35)
    mean = np.exp(smoothed(np.log(values))) if log else smoothed(values)
    axes.plot(steps, mean, color=color, linewidth=1.8)


def _label(axes, log: bool) -> None:
    from matplotlib import ticker

    axes.set_xlabel("step")
    nice = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=nice))
    axes.margins(x=0.02, y=0.08)
    axes.set_xlim(left=0)
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_ylim(low, high)
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=nice))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.4g}"))
    axes.yaxis.grid(True)
    axes.set_axisbelow(True)


def _inline(svg: str, name: str) -> str:
    """Makes a stand-alone SVG file an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Identifiers are unique in a file, not in a page of many charts.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\n\s*", "\n", svg)
