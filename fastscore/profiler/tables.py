"""Tables, pairs and bars of a report's page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from fastscore.profiler import charts
from fastscore.profiler.words import in_ms


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    sorts: bool = False,
    last: Sequence[Sequence[str]] = (),
) -> str:
    """A table in a box that scrolls by itself; all columns but words are numbers.

    ``last`` are rows that stay at the end however the others are sorted.
    """
    head = "".join(_heading(words, i, sorts) for i, words in enumerate(heads))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    foot = "".join(f"<tr>{''.join(row)}</tr>" for row in last)
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    kind = ' class="sorts"' if sorts else ""
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{text(caption)}"><table{kind}>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}"
        "</table></div>"
    )


_FIRST = ("Time, ms", "#Gap, ms")
_WORDS = ("After", "Before", "Phase", "Bound", "")


def _heading(words: str, index: int, sorts: bool) -> str:
    number = words.startswith("#") or (index > 0 and words not in _WORDS)
    kind = "n" if number else ("first" if index == 0 else "")
    shown = text(words.removeprefix("#"))
    if not shown:
        return "<td></td>"
    # as the rows come
    sorted_by = ' aria-sort="descending"' if index < 2 and words in _FIRST and sorts else ""
    return f'<th scope="col" class="{kind}"{sorted_by}>{shown}</th>'


def cell(inside: str, head: bool = False) -> str:
    """A cell of words, or the one that names its row."""
    kind = 'th scope="row" class="first"' if head else 'td class="w"'
    return f"<{kind}>{inside}</{kind[:2]}>"


def key(name: str, colour: int) -> str:
    """The cell that names a phase, with its colour."""
    return f'<th scope="row" class="key"><i class="k{colour}"></i>{text(name)}</th>'


def number(value: float, words: str) -> str:
    """A cell that sorts by its value."""
    return f'<td class="n" data-v="{value:.6g}">{words}</td>'


def time(us: float) -> str:
    """A cell of milliseconds."""
    return number(us, in_ms(us))


def bar(share: float, colour: int = 0) -> str:
    """A cell with a bar, for eyes alone: the number stands beside it."""
    return f'<td class="bars" aria-hidden="true">{charts.bar(share, colour)}</td>'


def pairs(known: Sequence[tuple[str, Any]]) -> str:
    """Names and values side by side."""
    found = "".join(
        f"<div><dt>{text(str(name))}</dt><dd>{text(str(value))}</dd></div>" for name, value in known
    )
    return f'<dl class="pairs">{found}</dl>'


def text(words: str) -> str:
    """Words as HTML."""
    return html.escape(words)


def code(name: str) -> str:
    """A name in code, on a line of its own."""
    return f'<span class="sub"><code>{text(name)}</code></span>'
