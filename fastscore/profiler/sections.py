"""The sections of a report's page, each from the report to HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from fastscore.measure.roofline import Peaks
from fastscore.profiler import charts
from fastscore.profiler.groups import Group
from fastscore.profiler.losses import Bound
from fastscore.profiler.phases import (
    BOTH,
    CLASS,
    FORWARD,
    GRAPH,
    JEM,
    PRECONDITIONING,
    SOLVER,
    SUBNET,
    TAPS,
    UNDIVIDED,
    UNET,
    VOCODER,
    WHOLE,
)
from fastscore.profiler.report import Report
from fastscore.profiler.tables import bar, cell, code, key, number, pairs, table, text, time
from fastscore.profiler.words import DASH, megabytes, milliseconds, percent
from fastscore.profiler.words import operations as macs_words

_COLOURS = {FORWARD: 0, UNDIVIDED: 0, BOTH: 1, JEM: 2, CLASS: 3, SUBNET: 4, UNET: 4, WHOLE: 4}
_COLOURS |= {GRAPH: 4, TAPS: 5, SOLVER: 6, VOCODER: 7, PRECONDITIONING: 8}
_HOST = 8
_LIMITS = ("MMACs", "MB", "Bound", "Of bound")
# rows that a table shows; what is beyond is one row
_ROWS = 18


def colours(report: Report) -> dict[str, int]:
    """A colour for every phase."""
    names = {p.name for p in report.phases} | {n for r in report.rows for n, _, _ in r.phases}
    return {name: _COLOURS.get(name, 9 if name != "" else _HOST) for name in names}


def fix(report: Report) -> str:
    """The largest losses."""
    if report.peaks is None:
        return "<p>No roofline was measured, so nothing is compared with it.</p>"
    if not report.losses:
        return "<p>Nothing here loses time against the roofline.</p>"
    items = "".join(
        f"<li><div><h3>{text(loss.what)}</h3><p>{text(_rest(loss.sentence, loss.what))}</p>"
        f'<p class="fix">{text(loss.remedy)}</p></div>'
        f'<div class="saved"><b>{milliseconds(loss.saved)}</b> could be saved at most</div></li>'
        for loss in report.losses
    )
    return (
        "<p>The largest losses against what this machine was measured to do. What could be saved "
        "is what the operations took beyond their bound: a ceiling, not a forecast.</p>"
        f'<ol class="losses">{items}</ol>'
    )


def _rest(sentence: str, what: str) -> str:
    words = sentence.removeprefix(f"{what}: ")
    return words[0].upper() + words[1:]


def phases(report: Report) -> str:
    """A bar of shares and the table of phases."""
    colour = colours(report)
    weight = (lambda p: p.busy) if report.on_device else (lambda p: p.wall)
    shown = [p for p in report.phases if weight(p) > 0]
    total = sum(weight(p) for p in shown)
    words = "Shares of the run: " + ", ".join(
        f"{p.name} {percent(weight(p) / total)}" for p in shown
    )
    strip = charts.strip([(p.name, weight(p)) for p in shown], colour, words)
    rows = [
        [
            key(p.name, colour[p.name]),
            number(weight(p), percent(weight(p) / total)),
            time(p.wall),
            time(p.busy),
            *([] if report.on_device else [time(p.wall - p.busy)]),
        ]
        for p in shown
    ]
    clock = "Host, ms" if report.on_device else "On the clock, ms"
    between = [] if report.on_device else ["Between operations, ms"]
    heads = [
        "Phase",
        "Share",
        clock,
        "GPU, ms" if report.on_device else "In operations, ms",
        *between,
    ]
    found = table("Phases of the profiled run", heads, rows)
    return f"<figure>{strip}</figure>{found}{_rows_note(report)}"


def _rows_note(report: Report) -> str:
    names = {p.name: p for p in report.phases}
    notes = []
    if BOTH in names:
        half = (names[BOTH].busy if report.on_device else names[BOTH].wall) / 2
        notes.append(
            "In a guided evaluation the cotangents of the JEM density and of the class go back "
            "through the classifier in one batched pass, down to the shallowest tap. It is one "
            f"phase, “{BOTH}”: by rows half of it, {milliseconds(half)}, belongs to each. Below "
            f"the shallowest tap only the class's goes on, which is “{CLASS}”; "
            f"“{JEM}” is that of unguided evaluations."
        )
    if not report.on_device:
        notes.append(
            "Between operations nothing is computed: it is the time of Python, of PyTorch's "
            "dispatcher, of making room for tensors, and of the profiler."
        )
    return "".join(f'<p class="small soft">{text(n)}</p>' for n in notes)


def timeline(report: Report) -> str:
    """Evaluations over time."""
    colour = colours(report)
    order = [p.name for p in report.phases]
    legend = "".join(
        f'<li><i class="k{colour[name]}"></i>{text(name)}</li>' for name in order if name
    )
    figure = charts.timeline(report.rows, colour, report.left_out)
    return f'<ul class="legend">{legend}</ul>{figure}'


def operations(report: Report) -> str:
    """Operations by kind and place, with what they must compute and move."""
    heads = ["Operation and place", "Time, ms", "Share", "Calls", *_LIMITS]
    rows = [
        [
            cell(text(group.words), head=True),
            *_times(group, report),
            number(group.calls, str(group.calls)),
            *_work(group, least),
        ]
        for group, least in report.operations[:_ROWS]
    ]
    last = _others(report.operations[_ROWS:], report, 2)
    note = (
        "MB are what must be read and written at least once, MMACs those of the plain "
        "definition, in millions. For 3&times;3 convolutions by Winograd's filtering the bound "
        "counts the 16 products of 36 that it takes. A dash: nobody knows."
    )
    found = table("Operations by kind and place", heads, rows, True, last)
    return f'{found}<p class="small soft">{note}</p>'


def kernels(report: Report) -> str:
    """Kernels by name."""
    heads = ["Kernel", "Time, ms", "Share", "Launches", "Each, \N{MICRO SIGN}s", *_LIMITS]
    rows = [
        [
            cell(text(group.words) + code(group.name[:120]), head=True),
            *_times(group, report),
            number(group.launches, str(group.launches)),
            number(group.us / group.launches, f"{group.us / group.launches:.1f}"),
            *_work(group, least),
        ]
        for group, least in report.kernels[:_ROWS]
    ]
    last = _others(report.kernels[_ROWS:], report, 3, launches=True)
    what = (
        "Kernels that ran on the GPU."
        if report.on_device
        else "On a CPU: calls of the compiled library, and PyTorch's outermost operators."
    )
    words = (
        f"{what} MMACs and MB are given where one kernel does a layer's work, or where its "
        "operands tell them."
    )
    found = table("Kernels by name", heads, rows, True, last)
    return f"<p>{words}</p>{found}"


def gaps(report: Report) -> str:
    """How long nothing ran, in a histogram and the longest gaps."""
    found = report.gaps
    if not found.count:
        return "<p>There is none.</p>"
    what = "GPU idle" if report.on_device else "nothing computed"
    words = (
        f"{found.count} gaps with {what}, {milliseconds(found.total)} together, "
        f"{percent(found.total / report.us)} of the run. The profiler added "
        f"{milliseconds(max(0.0, report.added_us))} to the run in all, most of it here."
    )
    most = max(us for _, _, us in found.histogram) or 1.0
    bars = [
        [
            cell(text(length), head=True),
            number(count, str(count)),
            time(us),
            bar(us / most),
        ]
        for length, count, us in found.histogram
    ]
    histogram = table("Gaps by length", ["Length", "Gaps", "Together, ms", ""], bars)
    longest = [
        [
            time(g.us),
            time(g.start),
            cell(text(g.before) + (code(g.left) if g.left else "")),
            cell(text(g.after) + (code(g.right) if g.right else "")),
            cell(text(g.phase)),
        ]
        for g in found.longest
    ]
    heads = ["#Gap, ms", "#At, ms", "After", "Before", "Phase"]
    return f"<p>{text(words)}</p>{histogram}{table('The longest gaps', heads, longest, sorts=True)}"


def memory(report: Report) -> str:
    """Bytes of tensors over the run."""
    found = report.memory
    place = "the GPU" if found.device == "cuda" else "the CPU"
    where = f", in the phase {found.peak_phase}" if found.peak_phase else ""
    resident = (
        f" The process held at most {megabytes(found.resident)} of resident memory, libraries and "
        "warm-up included."
        if found.resident
        else ""
    )
    words = (
        f"Tensors on {place} above what there was at the start; {found.count} allocations, at most "
        f"{megabytes(found.peak)} at once{where}. Weights, {megabytes(found.weights)}, come on top."
        f"{resident} From a run of its own, because noting allocations takes time."
    )
    return f"<p>{text(words)}</p>{charts.memory(found)}"


def engine(report: Report) -> str:
    """What the engine compiled, recorded and replayed."""
    counts = report.engine
    if counts["mode"] == "eager":
        words = (
            "Mode eager: 0 compilations, 0 recompilations, 0 graph replays. The first run, warm-up "
            f"included, took {milliseconds(1e6 * report.facts.warm_up)}."
        )
        return f"<p>{text(words)}</p>"
    verdict = {
        "compile": "Mode compile: one program for each batch size, guided and not.",
        "graphs": "Mode graphs: a whole trajectory is one CUDA graph.",
        "compiled-graphs": "Mode compiled-graphs: a whole trajectory is one CUDA graph, of one "
        "compiled denoiser for each batch size, guided and not.",
    }[counts["mode"]]
    if counts["compilations_during"] or counts["recorded_during"]:
        verdict += (
            f" {counts['compilations_during']} compilations and {counts['recorded_during']} "
            "recordings fell into the profiled runs: they were not warm."
        )
    counted = [
        ("Compilations", counts["compilations"]),
        ("Recompilations: more than one a shape", counts["recompilations"]),
        ("Compilations during the profiled runs", counts["compilations_during"]),
        ("Graphs recorded", counts["recorded"]),
        ("Graph replays during the profiled runs", counts["replays_during"]),
        ("Graphs thrown out for others", counts["evicted"]),
        ("Memory of graphs", megabytes(counts["graph_memory"])),
        ("First run, compiling included", milliseconds(1e6 * report.facts.warm_up)),
    ]
    if report.on_device:
        counted += [("Launches from the host", report.launches)]
        counted += [("of them whole graphs", report.graph_launches)]
    return f"<p>{text(verdict)}</p>{pairs(counted)}"


def macs(report: Report) -> str:
    """Multiply-accumulates of a clip, by module."""
    if not report.macs:
        return "<p>Not known for this model.</p>"
    total = sum(report.macs.values())
    most = max(report.macs.values())
    rows = [
        [
            cell(f"<code>{text(name)}</code>", head=True),
            number(count, f"{count / 1e6:.1f}"),
            number(count, percent(count / total)),
            bar(count / most, _module_colour(name)),
        ]
        for name, count in report.macs.items()
        if count >= total / 1000
    ]
    parts = ", ".join(
        f"{_PARTS.get(name, name)} {percent(count / total)}"
        for name, count in report.macs_parts.items()
    )
    words = (
        f"{macs_words(total)} a clip: {parts}. Convolutions, matrix products and attention of all "
        "evaluations, pulled-back cotangents included; by their definition, whatever algorithm "
        "computes them. Modules below 0.1 % are left out; the vocoder is not counted."
    )
    heads = ["Module", "MMACs", "Share", ""]
    return f"<p>{text(words)}</p>{table('Multiply-accumulates of one clip', heads, rows)}"


_PARTS = {"forward": "classifier forward", "jem_vjp": "JEM VJP", "class_vjp": "class VJP"}
_PARTS |= {"subnet": "ScoreSubnet", "unet": "U-Net"}


def _module_colour(name: str) -> int:
    return 0 if name.startswith("classifier") else 4


def method(report: Report) -> str:
    """How the figures came about, and what on."""
    facts = report.facts
    plain = ", ".join(milliseconds(1e6 * s) for s in facts.plain)
    profiled = ", ".join(milliseconds(1e6 * s) for s in facts.profiled)
    peaks = f"<p>{text(_peaks(report.peaks))}</p>" if report.peaks is not None else ""
    words = (
        "After warming up, the same call was drawn without and with PyTorch's profiler in turn: "
        f"{plain} without, {profiled} with. Shown is the profiled run of median length. Its waves "
        "are those of the plain one to the bit, which was checked. Phases and layers are marked "
        "from outside while profiling; the plain path carries none of it."
    )
    record = html.escape(json.dumps(report.provenance, indent=1, ensure_ascii=False))
    return (
        f'<p>{text(words)}</p>{peaks}<p>Again: <code class="line">{text(facts.command)}</code></p>'
        f"{pairs(_machine(report.provenance))}"
        f'<details><summary>Everything known about the machine</summary><div class="box" '
        f'tabindex="0" role="region" aria-label="Provenance"><pre class="small">{record}</pre>'
        "</div></details>"
    )


def _peaks(peaks: Peaks) -> str:
    rates = ", ".join(f"{name} {macs_words(rate)}/s" for name, rate in peaks.macs.items())
    levels = ", ".join(f"{one.name} {megabytes(one.bandwidth)}/s" for one in peaks.levels)
    threads = "1 thread" if peaks.threads == 1 else f"{peaks.threads} threads"
    where = "on the GPU" if peaks.device.startswith("cuda") else f"with {threads}"
    return (
        f"The roofline was measured here, {where}: matrix products {rates}; copying and reading "
        f"{levels}. A call's bytes come from the nearest level that holds them."
    )


def _machine(provenance: dict[str, Any]) -> list[tuple[str, Any]]:
    commit, processor = provenance.get("commit") or {}, provenance.get("processor") or {}
    versions, gpu = provenance.get("versions") or {}, provenance.get("gpu") or {}
    load = provenance.get("load") or []
    mark = commit.get("id")
    changed = " with changes" if commit.get("dirty") else ""
    found = [
        ("Date", provenance.get("date")),
        ("Commit", f"{mark[:12]}{changed}" if mark else "not known"),
        ("fastscore", versions.get("fastscore")),
        ("PyTorch", versions.get("torch")),
        ("Processor", processor.get("model")),
        ("Instruction sets", ", ".join(processor.get("extensions") or []) or None),
        ("Cores, threads", f"{processor.get('cores')}, {provenance.get('threads')}"),
        ("GPU", gpu.get("name")),
        ("Load before", ", ".join(f"{v:.2f}" for v in load) or None),
    ]
    return [(name, value) for name, value in found if value]


def _times(group: Group, report: Report) -> list[str]:
    return [
        time(group.us),
        number(group.us, percent(group.us / report.us)),
    ]


def _work(group: Group, least: Bound | None) -> list[str]:
    cells = [
        number(group.macs, f"{group.macs / 1e6:.1f}") if group.macs else number(0, DASH),
        number(group.bytes, f"{group.bytes / 1e6:.2f}") if group.bytes else number(0, DASH),
    ]
    if least is None or not least.us:
        return [*cells, f"<td>{DASH}</td>", number(-1, DASH)]
    share = least.us / group.us
    return [*cells, f'<td class="lim">{least.name}</td>', number(share, percent(share))]


def _others(
    rest: Sequence[tuple[Group, Bound | None]], report: Report, empty: int, launches: bool = False
) -> list[list[str]]:
    """One row of all that a table does not show."""
    if not rest:
        return []
    us = sum(group.us for group, _ in rest)
    count = sum(group.launches if launches else group.calls for group, _ in rest)
    return [
        [
            cell(f"{len(rest)} others together", head=True),
            time(us),
            number(us, percent(us / report.us)),
            number(count, str(count)),
            *[number(-1, DASH)] * empty,
            cell(DASH),
            number(-1, DASH),
        ]
    ]
