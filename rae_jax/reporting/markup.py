"""Pieces of HTML. All text that comes in is escaped here."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from rae_jax.reporting import tiles

NOTHING = "–"


def decimals(value: Any, digits: int) -> str:
    """Formats a number, or a dash if there is none."""
    return NOTHING if _absent(value) else f"{value:,.{digits}f}"


def significant(value: Any) -> str:
    """Formats a number with three digits, whole from 100 on."""
    if _absent(value):
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def percent(share: Any) -> str:
    """Formats a share of one."""
    return NOTHING if _absent(share) else f"{100 * share:.1f}\u00a0%"


def duration(seconds: Any) -> str:
    """Formats seconds as hours, minutes and seconds."""
    if _absent(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _absent(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, float))


def section(name: str, title: str, *parts: str) -> str:
    """A titled part of the page; empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>\n{body}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def missing(what: str, files: Sequence[str] = ()) -> str:
    """Says what the folder does not hold (yet)."""
    names = ", ".join(files)
    return paragraph(f"{what}{': ' if names else ''}{names}.", "missing")


def images(
    row: Sequence[np.ndarray], *, alt: str, columns: int = 0, label: str = ""
) -> str:
    """Images side by side, described as one picture; 0 columns: the style decides."""
    style = f' style="--n:{columns}"' if columns else ""
    return (
        f'<div class="tiles" role="img" aria-label="{escape(alt)}" '
        f'data-label="{escape(label)}"{style}>{_images(row)}</div>'
    )


def stacks(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str]) -> str:
    """Images that belong together above each other, the rows named on the left."""
    names = "".join(f"<li>{escape(label)} </li>" for label in labels)
    columns = "".join(f"<div>{_images(x)}</div>" for x in zip(*rows, strict=True))
    alt = escape(f"From above: {', '.join(labels)}")
    return (
        f'<div class="body rowed"><ol>{names}</ol><div class="stacks" role="img" '
        f'aria-label="{alt}">{columns}</div></div>'
    )


def _images(row: Sequence[np.ndarray]) -> str:
    return "".join(f'<img src="{tiles.data_uri(x)}" alt="">' for x in row)


def whole(pixels: np.ndarray, *, alt: str) -> str:
    """A picture as it is."""
    uri = tiles.data_uri(pixels)
    return f'<img class="whole" src="{uri}" alt="{escape(alt)}">'


def bar_table(
    heads: tuple[str, str], rows: Sequence[tuple[str, str, float | None, str, bool]]
) -> str:
    """A table of values with a bar each.

    Args:
        heads: Titles of the name and of the value.
        rows: Name, remark, value, its text, and whether the row stands out.
    """
    top = max((v for _, _, v, _, _ in rows if not _absent(v)), default=0) or 1
    body = ""
    for name, remark, value, text, strong in rows:
        width = 0 if _absent(value) else max(0.0, 100 * value / top)
        kind = ' class="strong"' if strong else ""
        body += (
            f"<tr{kind}><td>{escape(name)}<small>{escape(remark)}</small></td>"
            f'<td class="n">{escape(text)}</td>'
            f'<td class="bar"><span style="width:{width:.1f}%"></span></td></tr>\n'
        )
    head = f'<th>{escape(heads[0])}</th><th class="n">{escape(heads[1])}</th>'
    return _table(f'{head}<th class="bar"></th>', body)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    kinds = ["", *[' class="n"'] * (len(heads) - 1)]
    head = "".join(
        f"<th{k}>{escape(x)}</th>" for k, x in zip(kinds, heads, strict=True)
    )
    body = ""
    for row in rows:
        cells = zip(kinds, row, strict=True)
        body += f"<tr>{''.join(f'<td{k}>{escape(x)}</td>' for k, x in cells)}</tr>\n"
    return _table(head, body)


def _table(head: str, body: str) -> str:
    return (
        f'<div class="body scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def chart(title: str, svg: str, remark: str = "", legend: Sequence[str] = ()) -> str:
    """A chart under its title, with a legend if it has several curves."""
    swatches = "".join(
        f'<span class="legend"><i style="background:var(--c{i})"></i>{escape(x)}</span>'
        for i, x in enumerate(legend, 1)
    )
    below = f"<small>{swatches or escape(remark)}</small>"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{below}</figcaption>'
        f"{svg}</figure>"
    )


def config_details(title: str, config: Mapping[str, Any]) -> str:
    """A config that unfolds into sorted lines."""
    lines = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(_value(value))}</dd></div>"
        for key, value in sorted(config.items())
    )
    return (
        f"<details><summary>{escape(title)}<small>{len(config)} values</small>"
        f'</summary><dl class="config">{lines}</dl></details>'
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Short named values side by side."""
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs
    )
    return f'<dl class="facts">{items}</dl>'
