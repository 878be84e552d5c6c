"""Several implementations of one computation, timed in turn in one run and set side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one implementation, one number a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def check_equal(outputs: dict[str, Any], tolerance: float) -> None:
    """No figure for a wrong answer: every implementation near the first one."""
    (_, first), *others = outputs.items()
    for name, output in others:
        for a, b in zip(_tensors(output), _tensors(first), strict=True):
            error = float((a.float() - b.float()).abs().max())
            limit = tolerance * max(1.0, float(b.float().abs().max()))
            assert error <= limit, f"{name} differs by {error} where {limit} is allowed"


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def interleaved(
    runs: dict[str, Run], rounds: int, round_seconds: float = 2e-3
) -> dict[str, Timing]:
    """Time implementations in turn, so that what disturbs one disturbs its neighbours as well.

    A round of an implementation repeats it for about ``round_seconds``; its first calls, which
    compile and fill caches, are not counted.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        for _ in range(3):
            run()
        once = (time.perf_counter() - start) / 3
        repeats[name] = max(1, math.ceil(round_seconds / once))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs)
        # the order rotates: nobody always follows the same neighbour
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for name in names:
            run, count = runs[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                run()
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratios(timings: dict[str, Timing], slow: str, fast: str) -> tuple[float, float, float]:
    """Median over rounds of slow / fast, and its 20th and 80th percentile."""
    pairs = zip(timings[slow].seconds, timings[fast].seconds, strict=True)
    quotient = Timing(tuple(a / b for a, b in pairs))
    return quotient.median, quotient.quantile(0.2), quotient.quantile(0.8)


def compiled(run: Callable[..., Any], enabled: bool) -> dict[str, Callable[..., Any]]:
    """torch.compile of one shape, under its own name, where it is asked for."""
    if not enabled:
        return {}
    torch._dynamo.reset()
    return {"compile": torch.compile(run, fullgraph=True, dynamic=False)}
