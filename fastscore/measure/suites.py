"""Running a suite: gate, timing in turn, instruments, and a result file that is whole after each.

Rows of one group (a problem on all backends; a model and its baselines) are timed in turn, in
sittings: operands, weights and the fixed computation beside them are built anew a few times, since
where they come to lie in memory moves a time by several per cent for as long as they live.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastscore_kernels import available, resolve

from fastscore.measure import costs, energy, memory, models, roofline, subjects
from fastscore.measure.provenance import Watch
from fastscore.measure.results import Check, ResultFile, Results, Rounds, Row, Time, none
from fastscore.measure.subjects import Built
from fastscore.measure.timing import (
    Pace,
    Stopwatch,
    Timing,
    WrongAnswerError,
    check_equal,
    interleaved,
    paces,
    reference_work,
    rounds_within,
)
from fastscore.measure.workloads import Modelled, Workload, chosen

# sittings of a row, rounds that one has at least, and rounds of a row whose calls are slow
SITTINGS, SITTING, SLOW_ROUNDS = 10, 6, 12
QUICK = 0.5
# seconds of timing a row by suite
BUDGETS = {"ops": 1.0}
BUDGET = 3.0
# groups whose sittings alternate: what disturbs a machine for a second or two, as long as short
# rows take, then spoils a sitting of each and not all sittings of one
TOGETHER = {"ops": 8}
# floats of the largest piece of memory that lies between old operands and new, and pieces
_PADDING, _PIECES = 400_000, 6

# called with (rows done so far, a fraction included; name of the group)
Progress = Callable[[float, str], Any]


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    ``rounds`` None is as many as take some seconds a row. ``instruments`` False only times.
    ``energy_seconds`` None measures no energy: it takes long to be told.
    """

    device: torch.device
    rounds: int | None = None
    instruments: bool = True
    energy_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("energy_seconds", 0.1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")


def rows(suite: str, only: Sequence[str] = ()) -> tuple[Workload, ...]:
    """Workloads that a run measures; ValueError for an unknown suite, or a name that is none."""
    return chosen(suite, only)


@torch.no_grad()
def run(
    suite: str,
    workloads: Sequence[Workload],
    settings: Settings,
    out: Path,
    command: str,
    progress: Progress = lambda done, name: None,
) -> ResultFile:
    """Measure ``workloads`` and write ``out`` anew after every group of them, or some small ones.

    KeyboardInterrupt leaves the rows that are finished in the file. ValueError where it cannot be
    written.
    """
    watch = Watch(settings.device)
    # found out before anything is measured
    results = Results.start(out, suite, command, watch.record)
    if settings.instruments:
        watch.record["peaks"] = roofline.peaks(settings.device).describe()
    grouped = [(name, list(g)) for name, g in itertools.groupby(workloads, key=lambda w: w.group)]
    done, together = 0, TOGETHER.get(suite, 1)
    # what was imported is not looked through at each sitting
    gc.freeze()
    try:
        for first in range(0, len(grouped), together):
            chunk = grouped[first : first + together]
            size, name = sum(len(members) for _, members in chunk), chunk[0][0]

            def tell(share: float, done: int = done, size: int = size, name: str = name) -> None:
                progress(done + share * size, name)

            tell(0.0)
            for row in _measured([_Group(m, settings, suite) for _, m in chunk], tell):
                results.add(row)
            done += size
            watch.sample(f"after {chunk[-1][0]}")
    finally:
        gc.unfreeze()
    watch.end()
    progress(len(workloads), "")
    return results.finish()


def _measured(groups: list[_Group], tell: Callable[[float], Any]) -> Iterator[Row]:
    """Rows of groups whose sittings alternate: a row is spread over the time of all of them."""
    for group in groups:
        group.gate()
    turns = [group.sittings() for group in groups]
    for turn in range(SITTINGS):
        for i, one in enumerate(turns):
            next(one, None)
            tell(0.9 * (turn + (i + 1) / len(turns)) / SITTINGS)
    for group in groups:
        yield from group.rows()


class _Group:
    """Workloads that are timed in turn."""

    def __init__(
        self,
        workloads: list[Workload],
        settings: Settings,
        suite: str,
    ) -> None:
        self._workloads = {w.name: w for w in workloads}
        self._settings, self._device, self._suite = settings, settings.device, suite
        self._rounds: dict[str, Rounds] = {}
        self._built: dict[str, Built] = {}
        self._build_seconds = 0.0
        self._checks: dict[str, Check] = {}
        self._refused: dict[str, tuple[str, str, Check | None]] = {}
        self._expected: dict[str, subjects.Expected] = {}

    def gate(self) -> None:
        """Build all of them and check their answers."""
        for name, workload in self._workloads.items():
            self._gate(name, workload)
        self._expected.clear()

    def rows(self) -> Iterator[Row]:
        """A row for each of them, in order."""
        for name in self._workloads:
            yield self._row(name, self._rounds.get(name))
            # one after the other, so that no other row's weights count
            self._built.pop(name, None)

    def _gate(self, name: str, workload: Workload) -> None:
        """Build it and check its answer: kept for timing, or refused with the reason."""
        if why := obstacle(workload, self._device):
            self._refused[name] = ("skipped", why, None)
            return
        try:
            if workload.problem not in self._expected:
                self._expected[workload.problem] = subjects.expected(workload, self._device)
            against, answer = self._expected[workload.problem]
            start = time.perf_counter()
            built = subjects.build(workload, self._device)
            # what compiles or records is not built again
            self._build_seconds += time.perf_counter() - start if built.again else 0.0
            outputs = {against: answer, name: built.answer(built.run())}
            self._checks[name] = check_equal(outputs, subjects.tolerance(workload, self._device))
            self._built[name] = built
        except WrongAnswerError as error:
            self._refused[name] = ("failed", str(error), error.check)
        # a row that cannot run takes no other with it; Triton's errors are of no common kind
        except Exception as error:
            self._refused[name] = ("failed", _sentence(error), None)

    def sittings(self) -> Iterator[None]:
        """Time all that passed the gate, one sitting at each step."""
        if not self._built:
            return
        pace = paces(self._runs(), self._watch())
        total, sittings = _plan(pace, self._settings.rounds, self._suite, self._build_seconds)
        parts: dict[str, list[Timing]] = {name: [] for name in self._built}
        for sitting in range(sittings):
            if sitting:
                self._rebuild()
            found = interleaved(
                self._runs(),
                -(-total // sittings),
                watch=self._watch(),
                reference=reference_work(self._device),
                known=pace,
            )
            for name, timing in found.items():
                parts[name].append(timing)
            self._rounds = {
                name: _joined([t.rounds() for t in timings], self._built[name].again)
                for name, timings in parts.items()
            }
            yield

    def _rebuild(self) -> None:
        """Let what can be built quickly lie elsewhere in memory."""
        again = [name for name, built in self._built.items() if built.again]
        for name in again:
            del self._built[name]
        with _elsewhere():
            fresh = {n: subjects.build(self._workloads[n], self._device) for n in again}
        # in the order of the first sitting
        self._built = {
            n: fresh.get(n) or self._built[n] for n in self._workloads if n not in self._refused
        }

    def _runs(self) -> dict[str, Callable[[], Any]]:
        return {name: built.run for name, built in self._built.items()}

    def _watch(self) -> Stopwatch:
        first = next(iter(self._built.values()))
        return Stopwatch(self._device, wall=first.wall, flush=first.flush)

    def _row(self, name: str, rounds: Rounds | None) -> Row:
        workload = self._workloads[name]
        described = workload.describe() | {"command": reproduce(workload, self._device)}
        if rounds is None:
            status, reason, check = self._refused[name]
            nothing = none(f"the row was {status}")
            return Row(name, described, status, reason, check, None, None, *[nothing] * 2,
                       bound=nothing)  # fmt: skip
        built, when = self._built[name], Time.of(rounds.values)
        described |= _sizes(workload, built)
        row = Row(name, described, "ok", "", self._checks[name], rounds, when)
        if not self._settings.instruments:
            return row
        return _instrumented(row, workload, built, self._settings)


def obstacle(workload: Workload, device: torch.device) -> str:
    """Why a workload cannot run on a device, here and now; "" if it can."""
    if device.type == "cpu" and (why := workload.only_on_gpu()):
        return why
    if workload.backend in ("native", "triton") and workload.backend not in available(device):
        try:
            resolve(workload.backend, device.type)
        except ValueError as error:
            return str(error)
    return ""


def reproduce(workload: Workload, device: torch.device) -> str:
    """The command that measures this row alone."""
    return (
        f"fastscore bench {workload.suite} --only {workload.name} --device {device} "
        f"--threads {torch.get_num_threads()}"
    )


def _plan(
    pace: dict[str, Pace], asked: int | None, suite: str, build_seconds: float
) -> tuple[int, int]:
    """Rounds of a row, and into how many sittings they are divided."""
    if asked is not None:
        return asked, max(1, min(SITTINGS, asked // SITTING))
    slow = max(p.once * p.repeats for p in pace.values()) > QUICK
    budget = BUDGETS.get(suite, BUDGET)
    total = rounds_within(pace, budget, SLOW_ROUNDS if slow else 8 * SITTINGS)
    # building takes no longer than timing, but for a second time
    affordable = max(2, int(budget * len(pace) / max(build_seconds, 1e-9)))
    return total, max(1, min(SITTINGS, total // SITTING, affordable))


def _joined(parts: list[Rounds], again: bool) -> Rounds:
    """Sittings as one; of what was never built anew they are one sitting."""
    found = Rounds.joined(parts)
    return found if again else Rounds(found.values, found.reference, 1)


def _sizes(workload: Workload, built: Built) -> dict[str, int]:
    if not isinstance(workload, Modelled) or workload.suite == "vocoder":
        return {}
    return models.size(built.modules[0])


def _instrumented(row: Row, workload: Workload, built: Built, settings: Settings) -> Row:
    """The row with memory, energy, and what it must do beside what it did."""
    figures: dict[str, Any] = {"memory": _guarded(lambda: _memory(built, settings.device))}
    seconds = settings.energy_seconds
    figures["energy"] = (
        none("not asked for; --energy SECONDS measures it")
        if seconds is None
        else _guarded(lambda: energy.energy(built.run, settings.device, seconds))
    )
    assert row.time is not None
    try:
        found = costs.cost(workload)
    except (RuntimeError, ValueError) as error:
        return _with(row, figures | {"bound": none(_sentence(error))})
    figures |= {"macs": found.macs, "bytes": found.bytes}
    figures["bound"] = none("what it must move at least is not known")
    if found.bound is not None:
        peaks = roofline.peaks(settings.device)
        limit, median = found.bound, row.time.median
        figures["bound"] = _guarded(lambda: roofline.share(limit(peaks), median))
    return _with(row, figures)


def _with(row: Row, figures: dict[str, Any]) -> Row:
    return Row(**{**{f: getattr(row, f) for f in row.__dataclass_fields__}, **figures})


def _memory(built: Built, device: torch.device) -> dict[str, Any]:
    found = memory.peak(built.run, device)
    if built.modules:
        found["weights"] = memory.weights(*built.modules)
    return found


def _guarded(figure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A figure, or why there is none: it must not cost the row its time."""
    try:
        return figure()
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        return none(_sentence(error))


def _sentence(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Let what is built inside get other addresses than what was there before."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # glibc's: freed pages go back, and new ones come
        ctypes.CDLL(None).malloc_trim(0)
    pieces = [torch.empty(random.randrange(1, _PADDING)) for _ in range(_PIECES)]
    try:
        yield
    finally:
        pieces.clear()
