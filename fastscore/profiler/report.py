"""Everything a page shows, worked out of a recording: plain values and no graphics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastscore.measure.roofline import Peaks
from fastscore.profiler import groups as sums
from fastscore.profiler.events import Span, Trace
from fastscore.profiler.groups import Gaps, Group, PhaseTime
from fastscore.profiler.losses import Bound, Loss, bound, losses
from fastscore.profiler.phases import PHASE, VOCODER
from fastscore.profiler.work import Work

# points of the memory curve
_POINTS = 600


@dataclass(frozen=True)
class Facts:
    """What was asked for and how fast it was; seconds without the profiler unless named so."""

    command: str
    preset: str
    label: str
    batch: int
    nfe: int
    sampler: str
    setup: Mapping[str, str]
    plain: Sequence[float]
    profiled: Sequence[float]
    audio_seconds: float
    warm_up: float
    guided: int

    @property
    def seconds(self) -> float:
        """Median without the profiler."""
        return sorted(self.plain)[len(self.plain) // 2]

    @property
    def rtf(self) -> float:
        """Seconds of computing a second of speech."""
        return self.seconds / self.audio_seconds


@dataclass(frozen=True)
class Row:
    """One evaluation, or what is before and after them all: its phases, from ``start``, in us."""

    words: str
    start: float
    end: float
    phases: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors over the run above those at its start, ``curve`` of (us, bytes)."""

    curve: list[tuple[float, int]]
    peak: int
    peak_at: float
    peak_phase: str
    us: float
    count: int
    weights: int
    resident: int | None
    device: str


@dataclass
class Report:
    """A profile, ready to be shown."""

    facts: Facts
    us: float
    added_us: float
    on_device: bool
    phases: list[PhaseTime]
    rows: list[Row]
    left_out: int
    operations: list[tuple[Group, Bound | None]]
    kernels: list[tuple[Group, Bound | None]]
    gaps: Gaps
    memory: Memory
    losses: list[Loss]
    macs: dict[str, int]
    macs_parts: dict[str, int]
    peaks: Peaks | None
    engine: dict[str, Any]
    launches: int
    graph_launches: int
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def bound_us(self) -> float:
        """Roofline of everything that has one."""
        return sum(least.us for _, least in self.operations if least is not None)


def make(
    facts: Facts,
    trace: Trace,
    memory: Trace,
    ledger: Mapping[str, Work],
    peaks: Peaks | None,
    **rest: Any,
) -> Report:
    """The report of a trace and of another one with allocations.

    ``rest`` are the fields of `Report` that no trace tells, and weights and resident of `Memory`.
    """
    weights, resident = rest.pop("weights"), rest.pop("resident")
    operations = sums.by_place(trace.items, ledger)
    kernels = sums.by_kernel(trace.items, ledger)
    gaps = sums.gaps(trace)
    added = trace.us - 1e6 * facts.seconds
    least = (lambda g: bound(g, peaks)) if peaks is not None else (lambda g: None)
    rows, left_out = timeline(trace)
    return Report(
        facts=facts,
        us=trace.us,
        added_us=added,
        on_device=trace.on_device,
        phases=sums.by_phase(trace),
        rows=rows,
        left_out=left_out,
        operations=[(g, least(g)) for g in operations],
        kernels=[(g, least(g)) for g in kernels],
        gaps=gaps,
        memory=_memory(memory, weights, resident, trace.on_device),
        losses=[] if peaks is None else losses(operations, gaps, trace.us, added, peaks),
        peaks=peaks,
        launches=trace.launches,
        graph_launches=trace.graph_launches,
        **rest,
    )


def timeline(trace: Trace, most: int = 60) -> tuple[list[Row], int]:
    """Rows of a timeline: what comes first, every evaluation until the next, and the rest.

    Beyond ``most`` evaluations those in the middle are left out; how many comes second.
    """
    starts = [span.start for span in trace.evaluations]
    if not starts:
        return [_row("the whole run", 0.0, trace.us, trace.lanes)], 0
    # the solver's step belongs to its evaluation; the last one ends where its answer is there
    ends = [*starts[1:], _last_end(trace)]
    kinds = [span.name.split()[-1] for span in trace.evaluations]
    rows = [_row("before", 0.0, starts[0], trace.lanes)]
    for number, (start, end, kind) in enumerate(zip(starts, ends, kinds, strict=True), 1):
        rows.append(_row(f"{number} {kind}", start, end, trace.lanes))
    rows.append(_row("after", ends[-1], trace.us, trace.lanes))
    extra = max(0, len(rows) - 2 - most)
    if extra:
        half = 1 + most // 2
        rows = [*rows[:half], *rows[half + extra :]]
    return rows, extra


def _last_end(trace: Trace) -> float:
    """Where what belongs to the last evaluation ends and the vocoder begins."""
    last = trace.evaluations[-1]
    later = [s.start for s in trace.lanes if s.name == PHASE + VOCODER and s.start >= last.end]
    return min(later, default=last.end)


def _row(words: str, start: float, end: float, phases: Sequence[Span]) -> Row:
    found = [
        (s.name.removeprefix(PHASE), max(s.start, start) - start, min(s.end, end) - start)
        for s in phases
        if s.end > start and s.start < end
    ]
    return Row(words, start, end, found)


def _memory(trace: Trace, weights: int, resident: int | None, on_device: bool) -> Memory:
    device = "cuda" if on_device else "cpu"
    events = sorted(
        (a for a in trace.allocations if a.device == device and 0 <= a.at <= trace.us),
        key=lambda a: a.at,
    )
    curve, now, peak, peak_at = [(0.0, 0)], 0, 0, 0.0
    for event in events:
        now += event.bytes
        curve.append((event.at, now))
        if now > peak:
            peak, peak_at = now, event.at
    phase = next((s.name for s in trace.phases if s.start <= peak_at < s.end), "")
    return Memory(
        curve=_thinned(curve, trace.us),
        peak=peak,
        peak_at=peak_at,
        peak_phase=phase.removeprefix(PHASE),
        us=trace.us,
        count=sum(1 for a in events if a.bytes > 0),
        weights=weights,
        resident=resident,
        device=device,
    )


def _thinned(curve: list[tuple[float, int]], us: float) -> list[tuple[float, int]]:
    """Least and most of every stretch of the curve, so that no peak is lost."""
    if len(curve) <= 2 * _POINTS:
        return curve
    cells: dict[int, list[tuple[float, int]]] = {}
    for point in curve:
        cells.setdefault(int(point[0] / us * _POINTS), []).append(point)
    found = []
    for _, points in sorted(cells.items()):
        low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        found += sorted({low, high})
    return found
