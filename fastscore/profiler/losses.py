"""What a run loses against the roofline, largest first, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastscore.measure import roofline
from fastscore.measure.roofline import Peaks
from fastscore.profiler.groups import Gaps, Group
from fastscore.profiler.words import milliseconds, percent

# us of work, and of time, below which a call's cost is the call itself
_BRIEF, _SHORT = 1.0, 50.0


@dataclass(frozen=True)
class Bound:
    """The least time in us that work can take, and what sets it: "compute fp32", "bandwidth L2"."""

    us: float
    name: str


@dataclass(frozen=True)
class Loss:
    """Time ``saved`` in us, if ``what`` ran at its bound, and the sentence that says so."""

    what: str
    us: float
    saved: float
    share: float
    sentence: str
    remedy: str = ""


def bound(group: Group, peaks: Peaks) -> Bound | None:
    """Roofline of a group, call by call; None where nobody knows what it must compute or move."""
    total, names = 0.0, dict[str, float]()
    for (products, moved, dtype), count in group.pieces.items():
        known = dtype in peaks.macs
        if moved is None and not (products and known):
            return None
        least = roofline.bound(int(products) if known else 0, moved or 0, dtype, peaks)
        us = 1e6 * least["seconds"] * count
        total += us
        names[least["name"]] = names.get(least["name"], 0.0) + us
    if not total:
        return None
    return Bound(total, max(names, key=lambda name: names[name]))


def losses(
    groups: Sequence[Group],
    gaps: Gaps,
    run_us: float,
    added_us: float,
    peaks: Peaks,
    count: int = 5,
) -> list[Loss]:
    """The largest of what operations and the gaps between them lose.

    ``added_us`` is what the profiler added to the run. It counts against the gaps, where most of it
    falls, so theirs is the least that it can be.
    """
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(group.family, []).append(group)
    found = [_of_family(members, run_us, peaks) for members in families.values()]
    found.append(_of_gaps(gaps, run_us, added_us))
    worth = [loss for loss in found if loss is not None and loss.saved > 0]
    return sorted(worth, key=lambda loss: -loss.saved)[:count]


def _of_family(members: Sequence[Group], run_us: float, peaks: Peaks) -> Loss | None:
    """One kind of operation in one network: forward, pulled back and of all sizes."""
    bounds = [bound(group, peaks) for group in members]
    limits = [(g, least) for g, least in zip(members, bounds, strict=True) if least is not None]
    if not limits:
        return None
    us, calls = sum(g.us for g, _ in limits), sum(g.calls for g, _ in limits)
    least_us = sum(least.us for _, least in limits)
    worst, lowest = max(limits, key=lambda pair: pair[0].us - pair[1].us)
    name = worst.family[0].upper() + worst.family[1:]
    took = f"{milliseconds(us)} in {_times(calls)}, {percent(us / run_us)} of the run"
    where = (
        f" Most of the loss is at {worst.size}{_back(worst)}: {milliseconds(worst.us)} at "
        f"{percent(lowest.us / worst.us)} of the bound."
        if len(limits) > 1 and worst.size
        else ""
    )
    if least_us / calls < _BRIEF and us / calls < _SHORT:
        sentence = (
            f"{name}: {took}. A call takes {milliseconds(us / calls)} for "
            f"{milliseconds(least_us / calls)} of work: the calls are the cost.{where}"
        )
        remedy = "Fuse them into their neighbours, or draw more clips at once."
    else:
        sentence = (
            f"{name}: {took}, at {percent(least_us / us)} of the bound ({lowest.name}).{where}"
        )
        remedy = _REMEDIES[lowest.name.partition(" ")[0]]
    return Loss(name, us, us - least_us, least_us / us, sentence, remedy)


def _back(group: Group) -> str:
    return ", pulled back" if group.words.endswith(", pulled back") else ""


_REMEDIES = {
    "compute": "A faster kernel for this shape, more clips at once, or a narrower type.",
    "bandwidth": "Fewer passes over memory: fuse it with what comes before or after.",
}


def _of_gaps(gaps: Gaps, run_us: float, added_us: float) -> Loss | None:
    if not gaps.count:
        return None
    added = max(0.0, added_us)
    least = max(0.0, gaps.total - added)
    sentence = (
        f"Nothing is computed for {milliseconds(gaps.total)}, {percent(gaps.total / run_us)} of "
        f"the run, in {gaps.count} gaps between operations. "
    )
    if not added:
        sentence += "The run took no longer than it does without the profiler."
    elif least:
        sentence += (
            f"The profiler added {milliseconds(added)} to the run, most of it in gaps, so between "
            f"{milliseconds(least)} and {milliseconds(gaps.total)} are the program's own."
        )
    else:
        sentence += (
            f"The profiler added {milliseconds(added)} to the run, most of it in gaps, so this run "
            "cannot tell how much of it is the program's own."
        )
    remedy = "Fewer, larger operations; mode compile, or graphs on a GPU; more clips at once."
    return Loss("Gaps between operations", gaps.total, least, 0.0, sentence, remedy)


def _times(count: int) -> str:
    return f"{count} call" if count == 1 else f"{count} calls"
