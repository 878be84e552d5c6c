"""Is any registered operation shape slower than the best of eager PyTorch, its compiler and SDPA?

    python bench/op_race.py --out bench/results/gpu/op_race.json
    TRITON_INTERPRET=1 python bench/op_race.py --out /tmp/op_race.json --device cpu --dry

A row a shape and dtype, the most important first. Everybody's answer is checked against float64
before a clock is read, then all are timed in turn: as replayed graphs of many calls, warm (one set
of operands) and cold (rotating sets, cache overwritten). Compiling takes seconds a shape: it is
left out where the time is needed for rows to come, which the row says, and made up for at the end
or by the same command. Ends with a table of the rows that another one won, and status 1 where one
failed or, but in a dry run, was lost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import Any

import torch
from contenders import Contender, contenders
from fastscore_kernels import resolve
from fastscore_kernels.backends import interpreting
from fastscore_kernels.gpu.launch import Device
from precompile import Compilers
from problems import NAMES, Problem, problems
from replays import STATES, Replay, lane, replay, sentence, sets, timed
from stage import Stage, parser
from tunables import device_here, launches

from fastscore.measure.operations import Case, case, exact
from fastscore.measure.results import Check
from fastscore.measure.timing import Timing, WrongAnswerError, check_equal, ratios

ROUNDS, DRY_ROUNDS = 21, 1
# seconds that a row and a compilation take until some have been seen
ROW_SECONDS, COMPILE_SECONDS = 2.0, 10.0
NO_TIME = "no time: "
# called with the seconds of a compilation
Told = Callable[[float], None]


class Clock:
    """Tells whether there is time to compile: what rows to come need is kept for them."""

    def __init__(self, stage: Stage, rows: int) -> None:
        self._stage, self.rows_left = stage, rows
        self.rows: list[float] = []
        self.compilations: list[float] = []

    @property
    def row(self) -> float:
        """About how long a row takes, compilations apart."""
        return statistics.mean(self.rows) if self.rows else ROW_SECONDS

    def obstacle(self) -> str:
        """Why nothing is compiled for this row; "" where it is."""
        seen = self.compilations
        seconds = statistics.mean(seen) if seen else COMPILE_SECONDS
        left, kept = self._stage.seconds_left, self.row * self.rows_left
        if left - kept > seconds:
            return ""
        return (
            f"{NO_TIME}{left:.0f} s are left, {kept:.0f} s of them for {self.rows_left} rows, and "
            f"compiling takes {seconds:.0f} s; run the same command again"
        )


def race(
    problem: Problem,
    runners: dict[str, Contender],
    device: torch.device,
    rounds: int,
    no_compile: str = "",
    told: Told = lambda seconds: None,
) -> dict[str, Any]:
    """The row of a problem: check everybody, then time them in turn; the first one is ours.

    ``no_compile`` says why nothing is compiled. A wrong answer, or ours that cannot run, fails the
    row; another one that cannot run is left out with the reason.
    """
    row: dict[str, Any] = {
        "operation": problem.op.op,
        "problem": problem.op.problem,
        "dtype": NAMES[problem.dtype],
        "batch": problem.op.batch,
    }
    ours, left_out = next(iter(runners)), {}
    expected = exact(problem.op, device, problem.dtype)
    cases = _cases(problem, device)
    replays: dict[str, dict[str, Replay]] = {state: {} for state in STATES}
    checks: dict[str, Check] = {}
    for name, runner in runners.items():
        if runner.compiles and no_compile:
            left_out[name] = no_compile
            continue
        start = time.perf_counter()
        try:
            found, checks[name] = _ready(name, runner, cases, expected, device)
        except WrongAnswerError as error:
            return row | {"failed": f"wrong answer: {error}"}
        # compilers and kernels have errors of many kinds; a lost device is raised again
        except Exception as error:
            left_out[name] = sentence(error)
            if name == ours:
                return row | {"failed": left_out[name]}
            continue
        for state in STATES:
            replays[state][name] = found[state]
        if runner.compiles:
            told(time.perf_counter() - start)
    count = len(cases)
    timings = {s: timed(replays[s], count, device, s, rounds) for s in STATES}
    row |= {"calls": count, "checks": {n: asdict(c) for n, c in checks.items()}}
    return row | {"not_measured": left_out, **verdict(timings, ours)}


def _cases(problem: Problem, device: torch.device) -> list[Case]:
    """Sets of operands; answers are checked on the first."""
    first = case(problem.op, device, problem.dtype)
    more = range(1, sets(first.arguments, device))
    return [first, *(case(problem.op, device, problem.dtype, seed) for seed in more)]


def _ready(
    name: str, runner: Contender, cases: list[Case], expected: Any, device: torch.device
) -> tuple[dict[str, Replay], Check]:
    """A contender's replays in both states, whose answers are right, and the check of them."""
    calls = [runner.build(one) for one in cases]
    found = {
        "warm": replay(calls[:1] * len(calls), device, runner.around),
        "cold": replay(calls, device, runner.around),
    }
    outputs = {"float64": expected}
    for state, one in found.items():
        one.run()
        outputs[f"{name}, {state}"] = runner.answer(cases[0], one.answer())
    return found, check_equal(outputs, cases[0].tolerance)


def verdict(timings: dict[str, dict[str, Timing]], ours: str) -> dict[str, Any]:
    """Microseconds a call, who won, and how many times as long the best of the others took."""
    found: dict[str, Any] = {"us": {}, "winner": {}, "ratio": {}}
    for state, each in timings.items():
        found["us"][state] = {
            n: [1e6 * q for q in (t.median, t.quantile(0.2), t.quantile(0.8))]
            for n, t in each.items()
        }
        found["winner"][state] = min(each, key=lambda n: each[n].median)
        others = {n: t for n, t in each.items() if n != ours}
        if not others:
            found["ratio"][state] = None
            continue
        best = min(others, key=lambda n: others[n].median)
        middle, low, high = ratios(each, best, ours)
        found["ratio"][state] = {"to": best, "median": middle, "p20": low, "p80": high}
    return found


def losers(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows and states that another one won; ``sure`` where four rounds of five say so."""
    found = []
    for name, row in rows.items():
        for state, ratio in row.get("ratio", {}).items():
            if ratio is not None and ratio["median"] < 1:
                found.append({"row": name, "state": state, "sure": ratio["p80"] < 1, **ratio})
    return sorted(found, key=lambda one: one["median"])


def summary(rows: dict[str, Any], expected: int) -> dict[str, Any]:
    """What the stage says in a few figures."""
    lost = losers(rows)
    left = {n: r["not_measured"] for n, r in rows.items() if r.get("not_measured")}
    return {
        "rows": len(rows),
        "of": expected,
        "failed": [name for name, row in rows.items() if row.get("failed")],
        "losers": lost,
        "slower": len({one["row"] for one in lost}),
        "surely_slower": len({one["row"] for one in lost if one["sure"]}),
        "without_compile": sum("compile" in reasons for reasons in left.values()),
    }


def table(found: dict[str, Any]) -> list[str]:
    """The summary as lines to print."""
    lines = [
        f"{found['rows']} of {found['of']} rows, {len(found['failed'])} failed, "
        f"{found['without_compile']} not compiled; another one was faster in {found['slower']} "
        f"rows, surely in {found['surely_slower']}"
    ]
    lines += [f"failed: {name}" for name in found["failed"]]
    lines += [
        f"{one['row']:44} {one['state']:5} {one['to']:15} {one['median']:6.3f} "
        f"[{one['p20']:.3f}, {one['p80']:.3f}]{' sure' if one['sure'] else ''}"
        for one in found["losers"]
    ]
    return lines


def unfinished(row: dict[str, Any]) -> bool:
    """Whether a row lacks a compilation for want of time."""
    return any(why.startswith(NO_TIME) for why in row.get("not_measured", {}).values())


def run(stage: Stage, args: argparse.Namespace) -> None:
    """All rows, then those again that were not compiled."""
    backend = backend_for(stage.device, args.dry)
    resolve(backend, stage.device.type)
    if args.dry:
        # threads gain nothing on tiny operands, and spin where other work needs the cores
        torch.set_num_threads(1)
    todo = problems(args.dry)
    if args.only:
        todo = [p for p in todo if args.only in p.name]
    rounds = DRY_ROUNDS if args.dry else ROUNDS
    stage.values["backend"] = backend
    clock = Clock(stage, sum(p.name not in stage.rows for p in todo))
    again = [p for p in todo if p.name in stage.rows and unfinished(stage.rows[p.name])]
    device = device_here(stage.device)
    with torch.no_grad(), lane(stage.device), Compilers(device) as compilers:
        begun = _compile_ahead([p for p in todo if p.name not in stage.rows], device, compilers)
        for problem in todo:
            if stage.wants(problem.name, clock.row):
                clock.rows_left -= 1
                wait(begun.get(problem.name, []))
                _add(stage, problem, backend, rounds, clock, args.no_compile)
                again += [problem] if unfinished(stage.rows[problem.name]) else []
        for problem in again:
            # one that still finds no time keeps its figures
            if not clock.obstacle() and clock.rows_left == 0:
                _add(stage, problem, backend, rounds, clock, args.no_compile)
    here = {p.name: stage.rows[p.name] for p in todo if p.name in stage.rows}
    stage.values["summary"] = summary(here, len(todo))
    stage.finish(expected=len(todo))


def _compile_ahead(
    todo: list[Problem], device: Device, compilers: Compilers
) -> dict[str, list[Future[str]]]:
    """Our kernels of all rows, in their order; a row waits for its own."""
    if not compilers.active:
        return {}
    return {p.name: compilers.start(launches(p, device)) for p in todo}


def _add(
    stage: Stage, problem: Problem, backend: str, rounds: int, clock: Clock, no_compile: bool
) -> None:
    start, before = time.perf_counter(), sum(clock.compilations)
    why = "--no-compile" if no_compile else clock.obstacle()
    told = clock.compilations.append
    runners = contenders(problem, backend)
    try:
        row = race(problem, runners, stage.device, rounds, why, told)
    except Exception as error:
        # one row must not take the others with it; a lost device is raised again
        row = {"failed": sentence(error)}
    taken = time.perf_counter() - start
    clock.rows.append(taken - (sum(clock.compilations) - before))
    stage.add(problem.name, row | {"seconds": taken})


def backend_for(device: torch.device, dry: bool) -> str:
    """Our kernels on a device: Triton's on a GPU, and interpreted in a dry run that can."""
    interpreted = dry and interpreting()
    return "triton" if device.type == "cuda" or interpreted else "native"


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; 0 where ours won every row, or in a dry run where none failed."""
    found = parser(__doc__)
    found.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    found.add_argument("--only", default="", help="rows whose names contain this")
    args = found.parse_args(arguments)
    try:
        with Stage.open("op_race", args) as stage:
            run(stage, args)
    except ValueError as error:
        print(f"op_race: {error}", file=sys.stderr)
        return 2
    lines = table(stage.values["summary"])
    print("\n".join(lines))
    lost = stage.values["summary"]["slower"] and not args.dry
    return int(bool(lost or stage.values["summary"]["failed"]))


if __name__ == "__main__":
    sys.exit(main())
