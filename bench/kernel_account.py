"""Replays of a graph taken apart: time by kernel, idle gaps, and what keeps a step from its bound.

Knows Kineto's traces and the counted work of a step, not how either was had. Times are
microseconds of one replay, means over all that a trace holds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastscore.measure.roofline import Peaks
from fastscore.measure.work import Work
from fastscore.profiler.words import plain

# the mark around each call, for work that no graph launched
CALL = "hot kernels: call"
GAPS, KERNELS = 12, 40
PRODUCTS, NORMS, TAPS = "convolutions and linear layers", "norms", "tap path"
POINTWISE, COPIES, OTHERS = "pointwise and sums", "copies and layouts", "others"
GROUPS = (PRODUCTS, NORMS, TAPS, POINTWISE, COPIES, OTHERS)
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# what the words for a kernel hold, and its group
_SIGNS = (
    ("taps", TAPS), ("tap norm", TAPS), ("convolution", PRODUCTS), ("matrix product", PRODUCTS),
    ("linear layer", PRODUCTS), ("norm", NORMS), ("attention", TAPS), ("layout", COPIES),
    ("copy", COPIES), ("fill", COPIES), ("concatenation", COPIES), ("stacking", COPIES),
    ("repetition", COPIES), ("patches", COPIES), ("pixels", COPIES), ("change of type", COPIES),
    ("element by element", POINTWISE), ("sum", POINTWISE), ("mean", POINTWISE),
    ("added", POINTWISE), ("cotangents", POINTWISE),
)  # fmt: skip
# kinds of operations of `fastscore.measure.work`
_KINDS = {
    "conv": PRODUCTS, "conv_vjp": PRODUCTS, "linear": PRODUCTS, "linear_vjp": PRODUCTS,
    "norm_act": NORMS, "norm_act_vjp": NORMS, "group_norm": NORMS,
    "tap_path": TAPS, "tap_fuse": TAPS,
}  # fmt: skip


class Ran(NamedTuple):
    """A kernel, copy or fill on a GPU, or an outermost operator on a CPU; times in us."""

    name: str
    start: float
    end: float


def group(name: str) -> str:
    """The group of a kernel or operator."""
    words = plain(name)
    return next((found for sign, found in _SIGNS if sign in words), OTHERS)


def replays(raw: Mapping[str, Any]) -> list[list[Ran]]:
    """What each launch of a graph ran, in order; on a CPU, each marked call. Whole ones only.

    ValueError where the trace holds neither.
    """
    spans = [e for e in raw["traceEvents"] if e.get("ph") == "X"]
    device = [e for e in spans if e.get("cat") in _ON_DEVICE]
    found = _by_graph(spans, device) if device else _by_mark(spans)
    if not found:
        raise ValueError("the trace holds no replay of a graph and no marked call; record it again")
    # a launch whose kernels the profiler lost in part would count as a faster one
    usual = statistics.mode(len(one) for one in found)
    return [sorted(one, key=lambda r: r.start) for one in found if len(one) == usual]


def _by_graph(spans: Iterable[Mapping], device: Iterable[Mapping]) -> list[list[Ran]]:
    launches = {
        e["args"].get("correlation"): e["ts"]
        for e in spans
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "GraphLaunch" in e["name"]
    }
    found: dict[Any, list[Ran]] = defaultdict(list)
    for event in device:
        key = event["args"].get("correlation")
        if key in launches:
            found[key].append(_ran(event))
    return [found[key] for key in sorted(found, key=launches.__getitem__)]


def _by_mark(spans: Sequence[Mapping]) -> list[list[Ran]]:
    marks = [_ran(e) for e in spans if e.get("name") == CALL and e.get("cat") == "user_annotation"]
    operators = sorted(
        (_ran(e) for e in spans if e.get("cat") == "cpu_op" and e["name"] != CALL),
        key=lambda r: (r.start, -r.end),
    )
    found = []
    for mark in marks:
        inside, end = [], mark.start
        for one in operators:
            # operators within another one are its own
            if one.start >= end and one.end <= mark.end:
                inside.append(one)
                end = one.end
        if inside:
            found.append(inside)
    return found


def _ran(event: Mapping[str, Any]) -> Ran:
    start = float(event["ts"])
    return Ran(event["name"], start, start + float(event.get("dur", 0)))


def kernels(found: Sequence[Sequence[Ran]]) -> list[dict[str, Any]]:
    """Time by name, the hottest first: ``us`` and ``count`` a replay, ``share``, ``mean_us``."""
    sums: dict[str, list[float]] = defaultdict(list)
    for one in found:
        for ran in one:
            sums[ran.name].append(ran.end - ran.start)
    total = sum(map(sum, sums.values()))
    rows = [
        {
            "name": name,
            "group": group(name),
            "count": len(times) / len(found),
            "us": sum(times) / len(found),
            "share": sum(times) / total,
            "mean_us": statistics.fmean(times),
        }
        for name, times in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def idle(found: Sequence[Sequence[Ran]]) -> dict[str, Any]:
    """``span_us`` of a replay, what ran in it, and the gaps in between by what is around them.

    ``overlap_us`` is time in which two ran at once, counted twice in ``sum_us``.
    """
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    span = busy = total = 0.0
    for one in found:
        last, reached = one[0], one[0].start
        for ran in one:
            if ran.start > reached:
                sums[last.name, ran.name].append(ran.start - reached)
            busy += max(0.0, ran.end - max(reached, ran.start))
            total += ran.end - ran.start
            if ran.end > reached:
                last, reached = ran, ran.end
        span += reached - one[0].start
    gaps = sorted(sums.items(), key=lambda pair: -sum(pair[1]))
    count = len(found)
    return {
        "replays": count,
        "span_us": span / count,
        "sum_us": total / count,
        "idle_us": (span - busy) / count,
        "overlap_us": (total - busy) / count,
        "gaps": sum(map(len, sums.values())) / count,
        "longest": [
            {"after": a, "before": b, "us": sum(g) / count, "count": len(g) / count}
            for (a, b), g in gaps[:GAPS]
        ],
    }


def account(
    rows: Sequence[Mapping[str, Any]], gaps: Mapping[str, Any], work: Work, peaks: Peaks
) -> dict[str, Any]:
    """The way from the bound of a step to its time, line by line; the lines add up to it.

    A group's line is what it took, what its operations must take one by one at the measured peaks,
    and the difference. Further lines: gaps, overlap, and what the operations must move one by one
    beyond what the step as a whole must.
    """
    needs = dict.fromkeys(GROUPS, 0.0)
    for op in work.ops:
        needs[_KINDS[op.name]] += 1e6 * op.bound(peaks, work.working_set)["seconds"]
    took = dict.fromkeys(GROUPS, 0.0)
    for row in rows:
        took[row["group"]] += row["us"]
    limit = work.bound(peaks)
    bound = 1e6 * limit["seconds"]
    lines = [
        {"line": name, "took_us": took[name], "must_us": needs[name],
         "over_us": took[name] - needs[name]}
        for name in GROUPS
    ]  # fmt: skip
    lines += [
        {"line": "idle between kernels", "over_us": gaps["idle_us"]},
        {"line": "kernels side by side", "over_us": -gaps["overlap_us"]},
        {"line": "operations one by one", "over_us": sum(needs.values()) - bound},
    ]
    return {
        "bound_us": bound,
        "bound_name": limit["name"],
        "span_us": gaps["span_us"],
        "gap_us": gaps["span_us"] - bound,
        "share": bound / gaps["span_us"],
        "lines": lines,
    }
