"""Reads a trace in the format of Kineto, PyTorch's profiler: what ran when, where, and for whom.

Knows nothing of how the trace was taken. Times are microseconds from the beginning of the run.
"""

from __future__ import annotations

import gzip
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastscore.profiler.phases import EVALUATION, GRAPH, LAYER, NATIVE, PHASE

_MARKS = (PHASE, LAYER, EVALUATION)
# what happens on a GPU, and what starts it there
_DEVICE = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "fill"}
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time on a thread or stream: ``start`` and ``end`` in us, ``args`` of Kineto."""

    name: str
    start: float
    end: float
    kind: str
    track: Any
    args: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def us(self) -> float:
        """Length in us."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Item:
    """Work that ran: an operation on a CPU or a kernel on a GPU, and what it was part of.

    ``layer`` is the name of the innermost layer's mark, ``call`` tells calls of it apart;
    ``evaluation`` counts from 0, -1 outside. ``op`` is the operator that ran or launched it, which
    alone has ``args`` with shapes. ``graph`` is set where a replayed graph ran it.
    """

    name: str
    start: float
    end: float
    phase: str
    layer: str
    call: int
    evaluation: int
    op: str
    args: Mapping[str, Any] = field(default_factory=dict, compare=False)
    graph: bool = False

    @property
    def us(self) -> float:
        """Length in us."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Allocation:
    """Bytes taken (or given back, negative) at a time, on "cpu" or "cuda"."""

    at: float
    bytes: int
    device: str


@dataclass
class Trace:
    """One run: ``items`` in order of their start, ``phases`` as lanes without gaps or overlap.

    On a GPU ``phases`` are those of the host; ``lanes`` are what is to be drawn, those of kernels.
    """

    us: float
    items: list[Item]
    phases: list[Span]
    lanes: list[Span]
    evaluations: list[Span]
    allocations: list[Allocation]
    launches: int
    graph_launches: int
    on_device: bool


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Trace file, plain or gzipped; ValueError where it is none."""
    data = Path(path).read_bytes()
    try:
        found = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        found["traceEvents"]
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Kineto trace ({error}); record it again") from None
    return found


def parse(raw: Mapping[str, Any], run: str) -> Trace:
    """What happened within the mark named ``run``; ValueError where the trace does not hold it."""
    events = [e for e in raw["traceEvents"] if e.get("ph") in ("X", "i") and "ts" in e]
    whole = next((e for e in events if e.get("name") == run and _is_mark(e)), None)
    if whole is None:
        raise ValueError(f"the trace holds no mark {run!r}: the run was cut short; record it again")
    zero, thread = float(whole["ts"]), (whole["pid"], whole["tid"])
    end = float(whole["dur"])
    spans = [_span(e, zero) for e in events if e["ph"] == "X"]
    spans = [s for s in spans if s is not None and s.end >= 0]
    own = [s for s in spans if s.track == thread and s.kind in ("op", "mark") and s.start <= end]
    tree = _Tree(own)
    kernels = [s for s in spans if s.kind in ("kernel", "copy", "fill")]
    launches = [s for s in spans if s.kind == "launch" and s.start <= end]
    if kernels:
        items = list(_kernels(kernels, launches, tree))
        end = max(end, *(k.end for k in kernels))
    else:
        items = list(_operations(tree))
    items.sort(key=lambda i: i.start)
    marks = [s for s in own if s.kind == "mark"]
    phases = lanes([s for s in marks if s.name.startswith(PHASE)])
    evaluations = [s for s in marks if s.name.startswith(EVALUATION)]
    return Trace(
        us=end,
        items=items,
        phases=phases,
        lanes=_device_lanes(items) if kernels else phases,
        evaluations=_device_evaluations(items, evaluations) if kernels else evaluations,
        allocations=[_allocation(e, zero) for e in events if e.get("name") == "[memory]"],
        launches=sum(1 for s in launches if "Launch" in s.name),
        graph_launches=sum(1 for s in launches if "GraphLaunch" in s.name),
        on_device=bool(kernels),
    )


def lanes(phases: Sequence[Span]) -> list[Span]:
    """Nested phases as stretches one after the other, each that of the innermost phase."""
    found: list[Span] = []
    open_: list[Span] = []
    now = 0.0

    def until(time: float) -> None:
        nonlocal now
        if open_ and time > now:
            found.append(replace(open_[-1], start=now, end=time))
        now = max(now, time)

    for span in sorted(phases, key=lambda s: (s.start, -s.end)):
        while open_ and open_[-1].end <= span.start:
            until(open_[-1].end)
            open_.pop()
        until(span.start)
        now = max(now, span.start)
        open_.append(span)
    while open_:
        until(open_[-1].end)
        open_.pop()
    return _joined(found)


def _device_lanes(items: Sequence[Item]) -> list[Span]:
    """Kernels on a GPU as stretches of phases; of two at once the second begins later."""
    found, now = [], 0.0
    for item in items:
        if item.end > now:
            start = max(now, item.start)
            found.append(Span(PHASE + item.phase, start, item.end, "mark", "gpu"))
            now = item.end
    return _joined(found)


def _device_evaluations(items: Sequence[Item], marks: Sequence[Span]) -> list[Span]:
    """Evaluations from their first kernel to their last one."""
    ends: dict[int, tuple[float, float]] = {}
    for item in items:
        if item.evaluation >= 0:
            start, end = ends.get(item.evaluation, (item.start, item.end))
            ends[item.evaluation] = min(start, item.start), max(end, item.end)
    return [replace(marks[i], start=a, end=b) for i, (a, b) in sorted(ends.items())]


def _joined(spans: Iterable[Span]) -> list[Span]:
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and last.name == span.name and span.start - last.end < 1e-3:
            found[-1] = replace(last, end=span.end)
        else:
            found.append(span)
    return found


def _is_mark(event: Mapping[str, Any]) -> bool:
    return event.get("ph") == "X" and event.get("cat") in ("user_annotation", "cpu_op")


def _span(event: Mapping[str, Any], zero: float) -> Span | None:
    category, name = event.get("cat"), event.get("name", "")
    start = float(event["ts"]) - zero
    end = start + float(event.get("dur", 0))
    args = event.get("args") or {}
    if category in ("cpu_op", "user_annotation"):
        kind = "mark" if name.startswith(_MARKS) else "op"
        track: Any = (event["pid"], event["tid"])
        if category == "user_annotation" and kind == "op":
            return None
    elif category in _DEVICE:
        kind, track = _DEVICE[category], ("gpu", args.get("device"), args.get("stream"))
    elif category in _LAUNCHES:
        kind, track = "launch", (event["pid"], event["tid"])
    else:
        return None
    return Span(name, start, end, kind, track, args)


def _allocation(event: Mapping[str, Any], zero: float) -> Allocation:
    args = event["args"]
    device = "cuda" if args.get("Device Type") == 1 else "cpu"
    return Allocation(float(event["ts"]) - zero, int(args["Bytes"]), device)


class _Tree:
    """Spans of one thread by how they nest."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = sorted(spans, key=lambda s: (s.start, -s.end))
        self.starts = [s.start for s in self.spans]
        self.parent: list[int] = []
        self.children: list[list[int]] = [[] for _ in self.spans]
        stack: list[int] = []
        for i, span in enumerate(self.spans):
            while stack and self.spans[stack[-1]].end <= span.start:
                stack.pop()
            self.parent.append(stack[-1] if stack else -1)
            if stack:
                self.children[stack[-1]].append(i)
            stack.append(i)
        self._calls = {
            i: n for n, i in enumerate(j for j, s in enumerate(self.spans) if _of(s, LAYER))
        }
        found = (j for j, s in enumerate(self.spans) if _of(s, EVALUATION))
        self._evaluations = {i: n for n, i in enumerate(found)}

    def at(self, time: float) -> int:
        """Innermost span over a time, -1 where there is none."""
        i = bisect_right(self.starts, time) - 1
        while i >= 0 and self.spans[i].end < time:
            i = self.parent[i]
        return i

    def above(self, index: int) -> Iterator[int]:
        """A span and those around it, from the inside."""
        while index >= 0:
            yield index
            index = self.parent[index]

    def place(self, index: int) -> dict[str, Any]:
        """Phase, layer and evaluation around a span."""
        place: dict[str, Any] = {"phase": "", "layer": "", "call": -1, "evaluation": -1}
        for i in self.above(index):
            span = self.spans[i]
            if _of(span, LAYER) and place["call"] < 0:
                place |= {"layer": span.name, "call": self._calls[i]}
            elif _of(span, PHASE) and not place["phase"]:
                place["phase"] = span.name.removeprefix(PHASE)
            elif i in self._evaluations:
                place["evaluation"] = self._evaluations[i]
        return place

    def operation(self, index: int) -> Span | None:
        """Outermost operator around a span, within its innermost mark."""
        found = None
        for i in self.above(index):
            if self.spans[i].kind == "mark":
                break
            found = self.spans[i]
        return found


def _of(span: Span, prefix: str) -> bool:
    return span.kind == "mark" and span.name.startswith(prefix)


def _operations(tree: _Tree) -> Iterator[Item]:
    """What ran on the CPU: calls of the compiled library, and PyTorch's outermost operators.

    An operator of our own around a call of the library is its Python, and no work.
    """
    native = {i for i, s in enumerate(tree.spans) if s.name.startswith(NATIVE)}
    around = {a for i in native for a in tree.above(i)}
    for i, span in enumerate(tree.spans):
        if span.kind != "op" or (i in around and i not in native) or span.start < 0:
            continue
        parent = tree.parent[i]
        inside = parent >= 0 and tree.spans[parent].kind == "op" and parent not in around
        if i not in native and inside:
            continue
        name = span.name.removeprefix(NATIVE) if i in native else span.name
        yield Item(name, span.start, span.end, **tree.place(i), op=span.name, args=span.args)


def _kernels(kernels: Sequence[Span], launches: Sequence[Span], tree: _Tree) -> Iterator[Item]:
    """What ran on the GPU, with the phase and layer of the thread that launched it."""
    launched = {s.args.get("correlation"): s for s in launches if "correlation" in s.args}
    for kernel in kernels:
        launch = launched.get(kernel.args.get("correlation"))
        index = -1 if launch is None else tree.at(launch.start)
        place = tree.place(index) if index >= 0 else tree.place(-1)
        operation = tree.operation(index) if index >= 0 else None
        graph = launch is not None and "GraphLaunch" in launch.name
        if graph:
            place["phase"] = GRAPH
        op = operation.name if operation is not None and not graph else ""
        args = operation.args if operation is not None and not graph else {}
        if kernel.kind == "copy":
            args = {**args, "bytes": kernel.args.get("bytes", 0)}
        yield Item(kernel.name, kernel.start, kernel.end, **place, op=op, args=args, graph=graph)
