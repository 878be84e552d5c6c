"""Sums over a trace: by phase, by operation and place, by kernel, and the gaps between them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastscore.profiler.events import Item, Span, Trace
from fastscore.profiler.phases import LAYER, NATIVE, PHASE
from fastscore.profiler.words import TIMES, operator_bytes, plain, trivial
from fastscore.profiler.work import Work

# products that Winograd's F(2 x 2, 3 x 3) takes of those of the plain sum
_WINOGRAD = 16 / 36


@dataclass
class Group:
    """Work of one kind: ``us`` of time in ``calls``, ``launches`` kernels.

    ``family`` is what it is, wherever it is: forward or pulled back, of any ``size``.
    ``macs`` are those of the plain definition; ``pieces`` counts calls by the products that the
    algorithm in use takes, the bytes (None: nobody knows) and the type.
    """

    words: str
    name: str = ""
    family: str = ""
    size: str = ""
    us: float = 0.0
    calls: int = 0
    launches: int = 0
    macs: int = 0
    pieces: Counter[tuple[float, int | None, str]] = field(default_factory=Counter)

    @property
    def bytes(self) -> int | None:
        """Bytes of all calls; None where those of one are unknown."""
        counts = [(moved, count) for (_, moved, _), count in self.pieces.items()]
        if any(moved is None for moved, _ in counts):
            return None
        return sum((moved or 0) * count for moved, count in counts)


@dataclass(frozen=True)
class PhaseTime:
    """A phase: ``wall`` us on the clock, and ``busy`` us of operations or, on a GPU, kernels."""

    name: str
    wall: float
    busy: float


@dataclass(frozen=True)
class Gap:
    """Time ``us`` at ``start`` in which nothing was computed, between two operations.

    ``left`` and ``right`` are the layers of both, where they have one.
    """

    start: float
    us: float
    before: str
    after: str
    phase: str
    left: str = ""
    right: str = ""


@dataclass
class Gaps:
    """All gaps: their sum, a histogram by length, and the longest."""

    total: float
    count: int
    histogram: list[tuple[str, int, float]] = field(default_factory=list)
    longest: list[Gap] = field(default_factory=list)


def by_phase(trace: Trace) -> list[PhaseTime]:
    """Phases, the longest first. On a GPU ``busy`` is that of the kernels a phase launched."""
    wall: dict[str, float] = defaultdict(float)
    busy: dict[str, float] = defaultdict(float)
    for span in trace.phases:
        name = span.name.removeprefix(PHASE)
        wall[name] += span.us
    for item in trace.items:
        busy[item.phase] += 0.0 if trivial(item.name) else item.us
    names = {*wall, *(name for name in busy if name)}
    found = [PhaseTime(n, wall[n], busy[n]) for n in names]
    key = (lambda p: -p.busy) if trace.on_device else (lambda p: -p.wall)
    return sorted(found, key=key)


def by_place(items: Sequence[Item], ledger: Mapping[str, Work]) -> list[Group]:
    """Operations by kind and place: layers with their work, the rest by phase; longest first."""
    found: dict[tuple, Group] = {}
    calls: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        if item.layer in ledger:
            calls[item.layer, item.call].append(item)
            continue
        words = plain(item.name)
        where = f" in {item.phase}" if item.phase else ""
        group = found.setdefault((words, item.phase), Group(words + where, family=words + where))
        _count(group, [item])
        group.pieces[0.0, operator_bytes(item.op, item.args), "fp32"] += 1
    for (name, _), ran in calls.items():
        work = ledger[name]
        key = work.kind, work.part, work.size, work.direction
        group = found.setdefault(key, _layer_group(work))
        _count(group, ran)
        _add_work(group, work, ran)
    return sorted(found.values(), key=lambda g: -g.us)


def by_kernel(items: Sequence[Item], ledger: Mapping[str, Work]) -> list[Group]:
    """Kernels by name; a layer's work goes to the kernel that does it, where one alone does."""
    doing: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        if item.layer in ledger and not trivial(item.name):
            doing[item.layer, item.call].append(item)
    found: dict[str, Group] = {}
    for item in items:
        group = found.setdefault(item.name, Group(plain(item.name), item.name))
        _count(group, [item])
        if _worker(doing.get((item.layer, item.call), [])) is item:
            _add_work(group, ledger[item.layer], [item])
        else:
            group.pieces[0.0, operator_bytes(item.op, item.args), "fp32"] += 1
    return sorted(found.values(), key=lambda g: -g.us)


def _worker(items: Sequence[Item]) -> Item | None:
    """The item that does a layer's work: the compiled library's, or the only one."""
    native = [item for item in items if item.op.startswith(NATIVE)]
    alone = native or items
    return alone[0] if len(alone) == 1 else None


def _count(group: Group, ran: Sequence[Item]) -> None:
    group.us += sum(item.us for item in ran)
    group.calls += 1
    group.launches += len(ran)


def _add_work(group: Group, work: Work, ran: Sequence[Item]) -> None:
    group.macs += work.macs
    quick = any(item.name == "winograd" for item in ran)
    products = work.macs * (_WINOGRAD if quick else 1)
    group.pieces[products, work.bytes, work.dtype] += 1


_PARTS = {"subnet": "ScoreSubnet", "unet": "the U-Net", "classifier": "the classifier"}


def _layer_group(work: Work) -> Group:
    if work.kind == "program":
        return Group(f"the denoiser as one program, {work.direction}", family="the denoiser")
    part = _PARTS.get(work.part, f"the {work.part}")
    back = ", pulled back" if work.direction == "pull-back" else ""
    size = f" at {work.size}" if work.size else ""
    family = f"{work.kind} of {part}"
    return Group(_times(family + size + back), family=_times(family), size=_times(work.size))


def _times(words: str) -> str:
    return re.sub(r"(?<=\d)( ?)x( ?)(?=\d)", rf"\1{TIMES}\2", words)


# lengths in us at which a histogram's bars begin
_EDGES = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)


def gaps(trace: Trace, longest: int = 12) -> Gaps:
    """Time between what computes: operations on a CPU, kernels on a GPU."""
    found, last, end = [], None, None
    for item in (i for i in trace.items if not trivial(i.name)):
        if end is not None and item.start > end:
            assert last is not None
            phase = _phase_at(trace.phases, end) if not trace.on_device else item.phase
            names = plain(last.name), plain(item.name), phase, _path(last), _path(item)
            found.append(Gap(end, item.start - end, *names))
        if end is None or item.end > end:
            last, end = item, item.end
    histogram = []
    for low, high in zip(_EDGES, (*_EDGES[1:], float("inf")), strict=True):
        inside = [g.us for g in found if low <= g.us < high]
        words = f"{low} to {high} µs" if high < float("inf") else f"{low} µs and more"
        histogram.append((words, len(inside), sum(inside)))
    while histogram and not histogram[-1][1]:
        histogram.pop()
    most = sorted(found, key=lambda g: -g.us)[:longest]
    return Gaps(sum(g.us for g in found), len(found), histogram, most)


def _path(item: Item) -> str:
    return item.layer.removeprefix(LAYER).partition(" ")[0]


def _phase_at(phases: Sequence[Span], time: float) -> str:
    import bisect

    i = bisect.bisect_right([s.start for s in phases], time) - 1
    return phases[i].name.removeprefix(PHASE) if i >= 0 else ""
