"""What a run loses against the roofline, largest first, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastscore.measure import roofline
from fastscore.measure.roofline import Peaks
from fastscore.profiler.groups import Gaps, Group
from fastscore.profiler.words import milliseconds, percent


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
    found = [_of_group(g, bound(g, peaks), run_us) for g in groups]
    found.append(_of_gaps(gaps, run_us, added_us))
    worth = [loss for loss in found if loss is not None and loss.saved > 0]
    return sorted(worth, key=lambda loss: -loss.saved)[:count]


def _of_group(group: Group, least: Bound | None, run_us: float) -> Loss | None:
    share = group.us / run_us
    name = group.words[0].upper() + group.words[1:]
    took = f"{milliseconds(group.us)} in {_times(group.calls)}, {percent(share)} of the run"
    if least is None:
        return None
    if group.calls and least.us / group.calls < 1.0 and group.us / group.calls < 50.0:
        # a microsecond of work a call: what it costs is the call itself
        sentence = (
            f"{name}: {took}; the work itself needs {milliseconds(least.us)}. Each call takes "
            f"{milliseconds(group.us / group.calls)} for "
            f"{milliseconds(least.us / group.calls)} of work, so the calls are the cost."
        )
        remedy = "Fuse them into their neighbours, or draw more clips at once."
    else:
        sentence = (
            f"{name}: {took}, at {percent(least.us / group.us)} of its bound ({least.name}); "
            f"{milliseconds(group.us - least.us)} could be saved at most."
        )
        remedy = _REMEDIES[least.name.partition(" ")[0]]
    return Loss(name, group.us, group.us - least.us, least.us / group.us, sentence, remedy)


_REMEDIES = {
    "compute": "A faster kernel for this shape, more clips at once, or a narrower type.",
    "bandwidth": "Fewer passes over memory: fuse it with what comes before or after.",
}


def _of_gaps(gaps: Gaps, run_us: float, added_us: float) -> Loss | None:
    if not gaps.count:
        return None
    least = max(0.0, gaps.total - added_us)
    sentence = (
        f"Nothing is computed for {milliseconds(gaps.total)}, {percent(gaps.total / run_us)} of "
        f"the run, in {gaps.count} gaps between operations. The profiler itself added "
        f"{milliseconds(added_us)} to the run, most of it in gaps, so "
        + (
            f"between {milliseconds(least)} and {milliseconds(gaps.total)} are the program's."
            if least
            else "how much of it is the program's this run cannot tell."
        )
    )
    remedy = "Fewer, larger operations; mode compile, or graphs on a GPU; more clips at once."
    return Loss("Gaps between operations", gaps.total, least, 0.0, sentence, remedy)


def _times(count: int) -> str:
    return f"{count} call" if count == 1 else f"{count} calls"
