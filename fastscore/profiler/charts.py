"""Graphics of a report as SVG, each with words that say what it shows."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from fastscore.profiler.report import Memory, Row
from fastscore.profiler.words import MICRO, megabytes, milliseconds, percent

ROW = 22
_FINE = 10
# user units across a drawing that is stretched to the page's width
_WIDE = 1000
# narrower than this, nothing would be seen
_LEAST = 0.05


def strip(shares: Sequence[tuple[str, float]], colours: Mapping[str, int], words: str) -> str:
    """One bar cut into shares."""
    parts, x = [], 0.0
    total = sum(share for _, share in shares) or 1.0
    for name, share in shares:
        width = _WIDE * share / total
        if width >= _LEAST:
            title = f"<title>{_text(name)}: {percent(share / total)}</title>"
            parts.append(_rect(x, 0, width, 32, colours[name], title))
        x += width
    return (
        f'<svg class="strip" viewBox="0 0 {_WIDE} 32" preserveAspectRatio="none" height="32" '
        f'role="img" aria-label="{_text(words)}">{"".join(parts)}</svg>'
    )


def timeline(rows: Sequence[Row], colours: Mapping[str, int], left_out: int) -> str:
    """A lane a row, all of one scale, in a view that can be made wider."""
    longest = max(row.end - row.start for row in rows)
    step = _nice(longest / 5)
    ticks = [step * i / _FINE for i in range(int(_FINE * longest / step) + 1)]
    high = ROW * len(rows)
    parts = [
        f'<line class="grid{_fine(i)}" x1="{_x(t, longest)}" x2="{_x(t, longest)}" y1="0" '
        f'y2="{high}"/>'
        for i, t in enumerate(ticks)
    ]
    for i, row in enumerate(rows):
        for name, start, end in row.phases:
            width = _WIDE * (end - start) / longest
            if width < _LEAST:
                continue
            title = f"<title>{_text(row.words)}: {_text(name)}, {milliseconds(end - start)}</title>"
            left = _WIDE * start / longest
            parts.append(_rect(left, i * ROW + 3, width, ROW - 6, colours[name], title))
    labels = "".join(f"<span>{_text(row.words)}</span>" for row in rows)
    axis = "".join(_label(t / longest, _tick(t), _fine(i)) for i, t in enumerate(ticks))
    gap = f" {left_out} evaluations in the middle are left out." if left_out else ""
    return (
        '<figure class="zooms"><div class="tools">'
        '<button type="button" value="in">Zoom in</button>'
        '<button type="button" value="out">Zoom out</button>'
        '<button type="button" value="whole">Whole</button>'
        '<span class="soft small">Shown: <output>whole</output></span></div>'
        f'<div class="lanes"><div class="names">{labels}</div>'
        '<div class="view" tabindex="0" role="region" aria-label="Timeline; plus and minus zoom, '
        'zero shows the whole, arrow keys move"><div class="inner">'
        f'<svg viewBox="0 0 {_WIDE} {high}" preserveAspectRatio="none" height="{high}" role="img" '
        'aria-label="Phases of every evaluation over time; the table above holds their sums">'
        f'{"".join(parts)}</svg><div class="axis" aria-hidden="true">{axis}</div>'
        "</div></div></div>"
        f"<figcaption>Every row begins where its evaluation begins.{gap} With the timeline in "
        "focus, + and &minus; zoom, 0 shows the whole, arrow keys move.</figcaption></figure>"
    )


def memory(found: Memory) -> str:
    """Bytes over time, with the peak marked by a line."""
    high = found.peak or 1
    top = _nice_bytes(high)
    points = " ".join(
        f"{_x(at, found.us)},{160 - 160 * count / top:.1f}" for at, count in _steps(found.curve)
    )
    peak = _x(found.peak_at, found.us)
    half = "".join(
        f'<line class="grid" x1="0" x2="{_WIDE}" y1="{y}" y2="{y}"/>' for y in (0.5, 80, 159.5)
    )
    words = (
        f"Bytes of tensors over {milliseconds(found.us)}: the peak of {megabytes(found.peak)} is "
        f"reached {milliseconds(found.peak_at)} after the start"
    )
    return (
        f'<figure><div class="curve"><div class="ys" aria-hidden="true"><span>{megabytes(top)}'
        f"</span><span>{megabytes(top / 2)}</span><span>0</span></div>"
        f'<svg viewBox="0 0 {_WIDE} 160" preserveAspectRatio="none" height="160" role="img" '
        f'aria-label="{_text(words)}">{half}'
        f'<line class="grid" x1="{peak}" x2="{peak}" y1="0" y2="160" stroke-dasharray="4 4"/>'
        f'<polygon class="area" points="0,160 {points} {_WIDE},160"/>'
        f'<polyline class="edge" points="{points}"/></svg><span></span>'
        f'<div class="axis" aria-hidden="true"><span style="left:0">0</span>'
        f'<span style="left:50%">{milliseconds(found.us / 2)}</span>'
        f'<span class="end" style="left:100%">{milliseconds(found.us)}</span></div></div>'
        f"<figcaption>{_text(words)} (dashed line).</figcaption></figure>"
    )


def bar(share: float, colour: int = 0) -> str:
    """A bar in a table's cell; the number beside it says the same."""
    width = max(0.0, min(100.0, 100 * share))
    return f'<span class="bar k{colour}" style="width:{width:.2f}%"></span>'


def _steps(curve: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Corners of a curve that stays where it is until the next point."""
    found = [curve[0]]
    for at, count in curve[1:]:
        found += [(at, found[-1][1]), (at, count)]
    return found


def _fine(index: int) -> str:
    """Class of what shows when there is room: nine of ten ticks."""
    return " fine" if index % _FINE else ""


def _label(place: float, words: str, kind: str) -> str:
    # near the end it would stand out of the drawing
    kind = f"end{kind}" if place > 0.94 else kind.strip()
    return f'<span class="{kind}" style="left:{100 * place:.2f}%">{words}</span>'


def _tick(us: float) -> str:
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if us >= scale:
            return f"{us / scale:g} {unit}"
    return f"{us:g} {MICRO}s" if us else "0"


def _rect(x: float, y: float, width: float, height: float, colour: int, inside: str) -> str:
    return (
        f'<rect class="k{colour}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}">'
        f"{inside}</rect>"
    )


def _x(at: float, whole: float) -> str:
    return f"{_WIDE * at / (whole or 1):.2f}"


def _nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value or 1))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= value * 0.999)


def _nice_bytes(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * m for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * m >= value)


def _text(words: str) -> str:
    return html.escape(words)
