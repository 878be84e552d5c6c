"""A report as one self-contained HTML page."""

from __future__ import annotations

import html
import re
from pathlib import Path

from fastscore.profiler import sections
from fastscore.profiler.report import Report
from fastscore.profiler.words import MICRO, TIMES, megabytes, milliseconds, operations, percent

# what a page may weigh; ours weigh a tenth of it
LIMIT = 5_000_000
_SECTIONS = (
    ("fix", "What to fix first", sections.fix),
    ("phases", "Where the time goes", sections.phases),
    ("timeline", "Timeline", sections.timeline),
    ("operations", "Operations and their bounds", sections.operations),
    ("kernels", "Kernels", sections.kernels),
    ("gaps", "Gaps between operations", sections.gaps),
    ("memory", "Memory over time", sections.memory),
    ("engine", "Compiling and graphs", sections.engine),
    ("macs", "Compute by module", sections.macs),
    ("method", "How this was measured", sections.method),
)


def to_html(report: Report) -> str:
    """The page; ValueError where it would be larger than `LIMIT`."""
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words, _ in _SECTIONS)
    body = "".join(
        f'<section id="{name}"{first} aria-labelledby="{name}-h"><h2 id="{name}-h">{words}</h2>'
        f"{make(report)}</section>"
        for first, (name, words, make) in zip(
            (' class="first"', *[""] * len(_SECTIONS)), _SECTIONS, strict=False
        )
    )
    facts = report.facts
    title = f"Profile: {facts.preset}, {facts.label}, {_clips(facts.batch)}"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_own('page.css')}</style></head><body>"
        '<a class="skip" href="#content">Skip to the findings</a>'
        f'<header>{_whole(_head(report))}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="content" tabindex="-1">{_whole(body)}</main>'
        f"<footer>{_foot()}</footer><script>{_own('page.js')}</script></body></html>\n"
    )
    if len(page.encode()) > LIMIT:
        raise ValueError(
            f"the report would be {len(page.encode()) / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; "
            "take fewer evaluations"
        )
    return page


def _head(report: Report) -> str:
    facts = report.facts
    setup = ", ".join(html.escape(value) for value in facts.setup.values())
    return (
        "<h1>Profile of one sampling run</h1>"
        f'<p class="soft">{html.escape(facts.preset)}, label {html.escape(facts.label)}, '
        f"{_clips(facts.batch)}; {setup}{_made(report)}</p>"
        f'<p class="lead">{_verdict(report)}</p>{_tiles(report)}{_skew(report)}'
        + "".join(f'<div class="note"><p>{html.escape(n)}</p></div>' for n in report.notes)
    )


def _made(report: Report) -> str:
    found = report.provenance
    commit = (found.get("commit") or {}).get("id")
    on = (found.get("gpu") or {}).get("name") or (found.get("processor") or {}).get("model")
    known = [on, found.get("date"), f"commit {commit[:12]}" if commit else None]
    return "<br>" + html.escape("; ".join(k for k in known if k))


def _verdict(report: Report) -> str:
    facts = report.facts
    speech = f"{facts.audio_seconds:.3g} s of speech"
    times = 1 / facts.rtf
    pace = (
        f"{times:.3g} times as fast as it is spoken"
        if times >= 1
        else f"{facts.rtf:.3g} times as long as it lasts"
    )
    most = max(report.phases, key=lambda p: p.busy if report.on_device else p.wall)
    share = (most.busy if report.on_device else most.wall) / report.us
    words = (
        f"{speech} takes {milliseconds(1e6 * facts.seconds)}, {pace}. The largest share, "
        f"{percent(share)}, goes to the phase <b>{html.escape(most.name)}</b>"
    )
    if report.peaks is None:
        return f"{words}."
    part = report.bound_us / (1e6 * facts.seconds)
    return (
        f"{words}. At its measured limits of arithmetic and memory the machine could do the same "
        f"operations in {milliseconds(report.bound_us)}: the run is at <b>{percent(part)} of its "
        "bound</b>."
    )


def _tiles(report: Report) -> str:
    facts, memory = report.facts, report.memory
    spread = f"{milliseconds(1e6 * min(facts.plain))} to {milliseconds(1e6 * max(facts.plain))}"
    runs = len(facts.plain)
    macs = sum(report.macs_parts.values())
    tiles = [
        (
            "Latency",
            milliseconds(1e6 * facts.seconds),
            f"median of {runs} runs, {spread}" if runs > 1 else "one run",
        ),
        ("Real-time factor", f"{facts.rtf:.3g}", "seconds of computing a second of speech"),
        (
            "Evaluations",
            str(facts.nfe),
            f"{facts.guided} of them guided; {html.escape(facts.sampler)}",
        ),
        (
            "Compute",
            operations(macs) if macs else "unknown",
            f"a clip, {operations(macs / facts.nfe)} an evaluation" if macs else "",
        ),
        (
            "Memory",
            megabytes(memory.weights + memory.peak),
            f"weights {megabytes(memory.weights)}, other tensors at most {megabytes(memory.peak)}",
        ),
    ]
    if report.peaks is not None:
        share = report.bound_us / (1e6 * facts.seconds)
        tiles.append(("Of the bound", percent(share), "roofline of all operations over latency"))
    cells = "".join(
        f'<div><dt>{name}</dt><dd><div class="big">{_units(value)}</div>'
        f'<div class="under">{under}</div></dd></div>'
        for name, value, under in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _units(value: str) -> str:
    number, _, unit = value.partition(" ")
    return f"{number} <small>{unit}</small>" if unit else number


def _skew(report: Report) -> str:
    plain = 1e6 * report.facts.seconds
    change = report.added_us / plain
    if change > 0:
        words = (
            f"Under the profiler the run took <b>{milliseconds(report.us)}</b>, "
            f"{percent(change)} longer than the {milliseconds(plain)} without it."
        )
    else:
        words = (
            f"Under the profiler the run took <b>{milliseconds(report.us)}</b>, no longer than the "
            f"{milliseconds(plain)} without it: other work on the machine weighed more."
        )
    return (
        f'<div class="note"><p>{words} The figures above are those without; everything below is '
        "the profiled run as it was, nothing scaled. Short operations and the gaps between them "
        "look longer than they are.</p></div>"
    )


def _foot() -> str:
    return (
        "Written by <code>fastscore profile</code>. The trace beside this file opens in Perfetto "
        "or in chrome://tracing."
    )


def _whole(body: str) -> str:
    """Numbers kept on one line with their units."""
    units = f"%|[m{MICRO}]?s|[kMG]?B|[kMGT]?MACs|{TIMES} [0-9]"
    return re.sub(f"(?<=[0-9]) (?=(?:{units})(?![a-z]))", "&nbsp;", body).replace(
        f"&nbsp;{TIMES} ", f"&nbsp;{TIMES}&nbsp;"
    )


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips at once"


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
