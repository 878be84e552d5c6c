"""Computations timed in turn, beside a fixed one that tells how fast the machine is at the moment.

No figure for a wrong answer: `check_equal` comes before any clock is read.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore.devices import fp32_products
from fastscore.measure.results import Check, Rounds, Time, quantile

Run = Callable[[], Any]
# called with (rounds done, rounds in all) after each round
Watcher = Callable[[int, int], Any]

# seconds a computation gets where the number of rounds is not given, and its bounds
BUDGET, FEWEST, MOST = 3.0, 15, 200
# a call shorter than this is brought back into the caches before it is timed
_SETTLED = 0.1
# the fixed computation, never to be changed: figures of different days are divided by its time
_SIDE = {"cpu": 384, "cuda": 3072}
_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
# share of a round that it takes beside it, and calls at most
_SHARE, _CALLS = 0.1, 50


class WrongAnswerError(ValueError):
    """An answer that is not the one it was checked against; ``check`` where its error is finite."""

    def __init__(self, sentence: str, check: Check | None) -> None:
        super().__init__(sentence)
        self.check = check


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a round in order, and of the fixed computation beside each."""

    seconds: tuple[float, ...]
    reference: tuple[float, ...] | None = None

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile over rounds."""
        return quantile(self.seconds, q)

    def rounds(self) -> Rounds:
        """The raw samples as a result file holds them."""
        return Rounds(self.seconds, self.reference)

    def time(self) -> Time:
        """Median and quantiles as a result file holds them."""
        return Time.of(self.seconds)


def check_equal(outputs: dict[str, Any], tolerance: float) -> Check:
    """Error and limit of the answer that comes nearest to its limit, against the first of them.

    Outputs are tensors, or sequences of tensors and None. The error is the largest difference, the
    limit ``tolerance`` times the largest value, which counts as 1 at least. WrongAnswerError where
    one differs by more, in shape, or is not finite.
    """
    (against, first), *others = outputs.items()
    expected = _tensors(first)
    worst = Check(against, 0.0, tolerance)
    for name, output in others:
        found = _tensors(output)
        if [t.shape for t in found] != [t.shape for t in expected]:
            shapes = [[tuple(t.shape) for t in side] for side in (found, expected)]
            raise WrongAnswerError(
                f"{name} has shapes {shapes[0]} where {against} has {shapes[1]}", None
            )
        for a, b in zip(found, expected, strict=True):
            check = _check(against, name, a, b, tolerance)
            if check.error * worst.limit >= worst.error * check.limit:
                worst = check
    return worst


def _check(against: str, name: str, a: Tensor, b: Tensor, tolerance: float) -> Check:
    # where they lie: a large answer's way to the host takes longer than the comparison
    place = b.device if a.device == b.device else "cpu"
    a, b = (t.detach().to(place, torch.float64) for t in (a, b))
    error = float((a - b).abs().max()) if a.numel() else 0.0
    limit = tolerance * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
    if not (math.isfinite(error) and math.isfinite(limit)):
        raise WrongAnswerError(f"{name} or {against} has values that are not finite", None)
    check = Check(against, error, limit)
    if error > limit:
        raise WrongAnswerError(
            f"{name} differs from {against} by {error:.3g} where {limit:.3g} is allowed", check
        )
    return check


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


class Stopwatch:
    """Seconds of ``count`` calls, the device's work included.

    On a CPU by the monotonic clock. On a GPU by events around each call on its stream; with
    ``flush`` its second-level cache is overwritten before each. ``wall`` takes the clock there too,
    for computations that wait for the device by themselves.
    """

    def __init__(self, device: torch.device, *, wall: bool = False, flush: bool = False) -> None:
        self._device = device
        self._events = device.type == "cuda" and not wall
        self._flush: Tensor | None = None
        if flush and device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)

    def __call__(self, run: Run, count: int = 1) -> float:
        """Seconds a call."""
        if self._events:
            return self._by_events(run, count)
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        self._wait()
        return (time.perf_counter() - start) / count

    def takes(self, run: Run) -> float:
        """Seconds of timing one call by the clock: of launches and flushes as well."""
        if not self._events:
            return self(run)
        start = time.perf_counter()
        self(run)
        return time.perf_counter() - start

    def _by_events(self, run: Run, count: int) -> float:
        pairs = []
        with torch.cuda.device(self._device):
            for _ in range(count):
                if self._flush is not None:
                    self._flush.zero_()
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                pairs.append((first, last))
        self._wait()
        return sum(first.elapsed_time(last) for first, last in pairs) / 1e3 / count

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def reference_work(device: torch.device) -> Run:
    """The fixed computation: a product of two square matrices, and tanh(x) x + 1 of a vector, fp32.

    About 1 to 2 ms. It shares nothing with fastscore's own code: what changes its time from one run
    to the next is the machine.
    """
    side, elements = _SIDE[device.type], _ELEMENTS[device.type]
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=rng).to(device) for _ in range(2))
    x = torch.randn(elements, generator=rng).to(device)
    product, y = torch.empty_like(a), torch.empty_like(x)

    def work() -> Tensor:
        with torch.no_grad(), fp32_products(device, tf32=False):
            torch.mm(a, b, out=product)
            torch.tanh(x, out=y)
            return y.mul_(x).add_(1.0)

    return work


class Pace(NamedTuple):
    """About how long timing a call takes, in seconds, and how many of them make a round."""

    once: float
    repeats: int


def paces(runs: dict[str, Run], watch: Stopwatch, round_seconds: float = 2e-3) -> dict[str, Pace]:
    """Pace of each, after first calls that compile and fill caches."""
    once = {name: _warm(run, watch) for name, run in runs.items()}
    return {name: Pace(s, max(1, math.ceil(round_seconds / s))) for name, s in once.items()}


def interleaved(
    runs: dict[str, Run],
    rounds: int | None = None,
    round_seconds: float = 2e-3,
    *,
    watch: Stopwatch | None = None,
    reference: Run | None = None,
    budget: float = BUDGET,
    known: dict[str, Pace] | None = None,
    progress: Watcher | None = None,
) -> dict[str, Timing]:
    """Time computations in turn, so that what disturbs one disturbs its neighbours as well.

    A round of a computation repeats it for about ``round_seconds``; its first calls, which compile
    and fill caches, are not counted. ``rounds`` None is as many as take ``budget`` seconds a
    computation, `FEWEST` to `MOST`. ``reference`` is timed on both sides of each round. ``known``
    are paces of an earlier call: caches are in one state only after as many repetitions.
    """
    watch = watch or Stopwatch(torch.device("cpu"))
    pace = known or paces(runs, watch, round_seconds)
    for name in known or ():
        _warm(runs[name], watch)
    if rounds is None:
        rounds = rounds_within(pace, budget)
    beside = _Beside(reference, watch)
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in runs}
    with _no_collection():
        for turn in range(rounds):
            for name in _rotated(list(runs), turn):
                run, (once, repeats) = runs[name], pace[name]
                beside.before(repeats * once)
                if once < _SETTLED:
                    run()
                seconds = watch(run, repeats)
                found[name].append((seconds, beside.after()))
            if progress is not None:
                progress(turn + 1, rounds)
    return {name: _timing(pairs) for name, pairs in found.items()}


def rounds_within(pace: dict[str, Pace], budget: float, fewest: int = FEWEST) -> int:
    """Rounds that take ``budget`` seconds a computation, ``fewest`` to `MOST`."""
    seconds = sum(p.once * p.repeats for p in pace.values()) / len(pace)
    return max(fewest, min(MOST, round(budget / seconds)))


def ratios(timings: dict[str, Timing], slow: str, fast: str) -> tuple[float, float, float]:
    """Median over rounds of slow / fast, and its 20th and 80th percentile."""
    pairs = zip(timings[slow].seconds, timings[fast].seconds, strict=True)
    quotient = Timing(tuple(a / b for a, b in pairs))
    return quotient.median, quotient.quantile(0.2), quotient.quantile(0.8)


class _Beside:
    """Times the fixed computation on both sides of a round, for longer beside a longer round."""

    def __init__(self, reference: Run | None, watch: Stopwatch) -> None:
        self._run, self._watch = reference, watch
        self._once = _warm(reference, watch) if reference is not None else 1.0
        self._calls, self._before = 1, 0.0

    def before(self, seconds: float) -> None:
        self._calls = max(1, min(_CALLS, round(_SHARE * seconds / self._once)) // 2)
        self._before = self._measure()

    def after(self) -> float | None:
        return None if self._run is None else (self._before + self._measure()) / 2

    def _measure(self) -> float:
        return 0.0 if self._run is None else self._watch(self._run, self._calls)


def _warm(run: Run, watch: Stopwatch) -> float:
    """Seconds that timing a call takes after the first, which compiles and chooses algorithms."""
    run()
    return max(1e-9, min(watch.takes(run) for _ in range(3)))


def _rotated(names: list[str], turn: int) -> list[str]:
    """The order rotates: nobody always follows the same neighbour."""
    place = turn % len(names)
    return names[place:] + names[:place]


def _timing(pairs: list[tuple[float, float | None]]) -> Timing:
    beside = tuple(reference for _, reference in pairs if reference is not None)
    return Timing(tuple(seconds for seconds, _ in pairs), beside or None)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a round."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
