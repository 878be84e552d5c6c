"""Launch parameters that beat the rule on this GPU, for the table of its architecture.

    python bench/tune.py --out bench/results/gpu/tune.json [--write]
    TRITON_INTERPRET=1 python bench/tune.py --out /tmp/tune.json --device cpu --dry

A row a choice of parameters, those first that take most of a guided step of `paper` at batch 1.
Around the rule's parameters some others are tried; every answer is checked before a clock is read.
Accepted is what is faster than the rule by 3 % and beyond the spread of the rounds, in two sittings
with operands of their own, and not slower with cold caches. --write merges what was accepted into
kernels/gpu/tables, where the rule's choice is replaced by it; the same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from candidates import Plan
from fastscore_kernels import resolve
from fastscore_kernels.gpu import launch
from fastscore_kernels.gpu.launch import Device
from launch_table import write
from precompile import Compilers
from replays import lane, sentence
from sittings import Bench, Sitting
from stage import Stage, parser
from tunables import Tunable, device_here, guided_step, launches, ordered, tunables
from variants import Variants, variants

from fastscore.measure.timing import Timing, WrongAnswerError, ratios

RULE = "rule"
# times faster than the rule that counts, and candidates that get a second sitting
GAIN, CONFIRMED = 1.03, 2
ROUNDS, DRY_ROUNDS, DRY_CANDIDATES = 21, 1, 1
# seconds that a row takes until some have been seen
ROW_SECONDS = 4.0
# rows whose candidates are compiled while one is timed
AHEAD = 4
# the row that the order comes from
SHARES = "shares"

Sit = Callable[[Mapping[str, Plan], Sequence[str]], Sitting]


def tuned(tunable: Tunable, plans: Mapping[str, Plan], sit: Sit) -> dict[str, Any]:
    """The row of a tunable: ``plans`` by name in two sittings, the rule first in both.

    A wrong answer fails the row.
    """
    rule = dict(tunable.choice.rule)
    row: dict[str, Any] = {
        "op": tunable.choice.op,
        "key": tunable.choice.key,
        "rule": rule,
        "problem": tunable.problem.name,
    }
    try:
        first = sit({RULE: rule, **plans}, ["warm"])
        warm = first.timings["warm"]
        row |= {"candidates": _figures(warm, plans), "skipped": first.skipped, "accepted": None}
        promising = sorted((n for n in warm if beats(warm, n)), key=lambda n: warm[n].median)
        promising = promising[:CONFIRMED]
        if promising:
            chosen = {name: plans[name] for name in promising}
            second = sit({RULE: rule, **chosen}, ["warm", "cold"])
            row |= {"confirmation": {s: _figures(t, chosen) for s, t in second.timings.items()}}
            name = next((n for n in promising if confirmed(second, n)), None)
            row["accepted"] = None if name is None else chosen[name]
    except WrongAnswerError as error:
        # nothing of it may reach a table
        row.pop("accepted", None)
        return row | {"failed": f"wrong answer: {error}"}
    return row


def beats(timings: Mapping[str, Timing], name: str) -> bool:
    """Whether a plan is faster than the rule by more than the noise of this sitting."""
    if name == RULE:
        return False
    middle, low, _ = ratios(dict(timings), RULE, name)
    return middle >= GAIN and low > 1.0


def confirmed(sitting: Sitting, name: str) -> bool:
    """Whether it is so again, and cold caches do not turn it round."""
    if name not in sitting.timings["warm"]:
        return False
    cold = ratios(sitting.timings["cold"], RULE, name)
    return beats(sitting.timings["warm"], name) and cold[2] >= 1.0


def _figures(timings: Mapping[str, Timing], plans: Mapping[str, Plan]) -> dict[str, Any]:
    """Microseconds a call, and of a candidate how many times faster it is, [p20, p80]."""
    found: dict[str, Any] = {}
    for name, timing in timings.items():
        found[name] = {"us": 1e6 * timing.median}
        if name != RULE:
            middle, low, high = ratios(dict(timings), RULE, name)
            found[name] |= {"plan": plans[name], "faster": middle, "p20": low, "p80": high}
    return found


def shares(
    found: Sequence[Tunable], stage: Stage, rounds: int, compilers: Compilers
) -> dict[str, Any]:
    """Seconds that the calls of each take of a guided step of `paper` at batch 1, in bf16."""
    device = device_here(stage.device)
    counts = guided_step(device)
    taking = [one for one in found if one.name in counts]
    for one in taking:
        compilers.start(launches(one.problem, device))
    taken: dict[str, Any] = {}
    for one in taking:
        calls = counts[one.name]
        try:
            sitting = Bench(one, stage.device, rounds)({RULE: dict(one.choice.rule)}, ["warm"])
        except Exception as error:
            # its row will fail and say so: here it only comes later
            taken[one.name] = {"calls": calls, "none": sentence(error)}
            continue
        seconds = calls * sitting.timings["warm"][RULE].median
        taken[one.name] = {"calls": calls, "seconds": seconds}
    return taken


def run(stage: Stage, args: argparse.Namespace) -> None:
    """All rows, by their share of a step."""
    resolve("triton", stage.device.type)
    if args.dry:
        # threads gain nothing on tiny operands, and spin where other work needs the cores
        torch.set_num_threads(1)
    device = device_here(stage.device)
    stage.values["architecture"] = device.arch
    rounds = DRY_ROUNDS if args.dry else ROUNDS
    found = [one for one in tunables(device, args.dry) if args.only in one.name]
    seconds: list[float] = []
    with torch.no_grad(), lane(stage.device), Compilers(device) as compilers:
        if SHARES not in stage.rows:
            stage.add(SHARES, shares(found, stage, rounds, compilers))
        each = {n: s.get("seconds", 0.0) for n, s in stage.rows[SHARES].items()}
        todo = [one for one in ordered(found, each) if one.name not in stage.rows]
        for one, ready in _ahead(todo, device, compilers, args.dry):
            about = statistics.mean(seconds) if seconds else ROW_SECONDS
            if not stage.wants(one.name, about):
                break
            start = time.perf_counter()
            stage.add(one.name, _row(one, ready, stage.device, rounds))
            seconds.append(time.perf_counter() - start)
    stage.values["summary"] = summary(stage.rows, len(found))
    stage.finish(expected=len(found) + 1)


def _ahead(
    todo: Sequence[Tunable], device: Device, compilers: Compilers, dry: bool
) -> Iterator[tuple[Tunable, Variants]]:
    """Each with its variants, while those of the next ones are being compiled."""
    begun: list[tuple[Tunable, Variants]] = []
    for one in todo:
        begun.append((one, variants(one, device, compilers, DRY_CANDIDATES if dry else None)))
        if len(begun) > AHEAD:
            yield begun.pop(0)
    yield from begun


def _row(one: Tunable, ready: Variants, device: torch.device, rounds: int) -> dict[str, Any]:
    try:
        row = tuned(one, ready.ready(), Bench(one, device, rounds))
    except Exception as error:
        # one row must not take the others with it; a lost device is raised again
        return {"op": one.choice.op, "key": one.choice.key, "failed": sentence(error)}
    row["skipped"] = ready.refused | row.get("skipped", {})
    return row


def summary(rows: Mapping[str, Any], expected: int) -> dict[str, Any]:
    """What the stage says in a few figures."""
    tried = {n: r for n, r in rows.items() if n != SHARES}
    return {
        "rows": len(tried),
        "of": expected,
        "failed": [n for n, r in tried.items() if r.get("failed")],
        "accepted": {
            n: {"plan": r["accepted"], "faster": gain(r)}
            for n, r in tried.items()
            if r.get("accepted") is not None
        },
    }


def gain(row: Mapping[str, Any]) -> float:
    """Times faster than the rule in the second sitting, of the plan that was accepted."""
    again = row["confirmation"]["warm"].values()
    return next(one["faster"] for one in again if one.get("plan") == row["accepted"])


def table(found: dict[str, Any]) -> list[str]:
    """The summary as lines to print."""
    lines = [
        f"{found['rows']} of {found['of']} rows, {len(found['failed'])} failed, "
        f"{len(found['accepted'])} times something beats the rule"
    ]
    lines += [f"failed: {name}" for name in found["failed"]]
    return lines + [
        f"{one['faster']:6.3f}  {name}: {one['plan']}" for name, one in found["accepted"].items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; 0 where no row failed."""
    found = parser(__doc__)
    found.add_argument("--only", default="", help="rows whose names contain this")
    found.add_argument(
        "--write", action="store_true", help="merge what was accepted into kernels/gpu/tables"
    )
    args = found.parse_args(arguments)
    try:
        if args.device == "cpu" and (args.write or not args.dry):
            raise ValueError(
                "--device cpu: an interpreter tells nothing of a GPU; add --dry and leave out "
                "--write"
            )
        with Stage.open("tune", args) as stage:
            run(stage, args)
        if args.write:
            rows = {n: r for n, r in stage.rows.items() if n != SHARES}
            write(launch.TABLES / f"{stage.values['architecture']}.json", rows)
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(stage.values["summary"])))
    return int(bool(stage.values["summary"]["failed"]))


if __name__ == "__main__":
    sys.exit(main())
