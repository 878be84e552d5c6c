"""Takes a profile: the same sampling call with and without PyTorch's profiler, in turn."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastscore.pipeline import Pipeline
from fastscore.profiler import events
from fastscore.profiler.events import Trace
from fastscore.profiler.marks import Ledger, Marks
from fastscore.profiler.phases import RUN
from fastscore.results import Result

# a run that takes longer than this is profiled once
_LONG = 3.0


@dataclass
class Recording:
    """What was recorded of one sampling call.

    ``plain`` and ``profiled`` are seconds of the call without and with the profiler, taken in turn;
    ``raw`` is Kineto's trace of the profiled run of median length, ``trace`` what it says, and
    ``memory`` that of another run, with allocations. ``before`` and ``after`` count what the engine
    did until the profiled runs began and when they had ended.
    """

    result: Result
    plain: list[float]
    profiled: list[float]
    raw: dict[str, Any]
    trace: Trace
    memory: Trace
    ledger: Ledger
    before: dict[str, Any]
    after: dict[str, Any]
    warm_up: float = 0.0

    @property
    def seconds(self) -> float:
        """Median of the call without the profiler."""
        return statistics.median(self.plain)

    @property
    def added(self) -> float:
        """Seconds by which the recorded run was longer."""
        return self.trace.us / 1e6 - self.seconds


def record(
    pipeline: Pipeline,
    labels: Sequence[str | None],
    *,
    rounds: int = 3,
    tell: Callable[[str], None] = lambda words: None,
    **asked: Any,
) -> Recording:
    """Profile ``pipeline.sample(labels, **asked)``, warmed up; ValueError as it raises.

    RuntimeError where the profiled run's waves are not those of the plain one, to the bit. Nobody
    else may use a pipeline in this process meanwhile.
    """

    def draw() -> Result:
        return pipeline.sample(list(labels), **asked)

    tell("warming up")
    start = time.perf_counter()
    draw()
    warm_up = time.perf_counter() - start
    start = time.perf_counter()
    result = draw()
    rounds = 1 if time.perf_counter() - start > _LONG else rounds
    before = pipeline.stats()
    marks = Marks()
    with marks.on(pipeline):
        # layers learn the shapes of their outputs
        _check(result, draw())
    plain, kept = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            tell(f"run {turn + 1} of {rounds}, without and with the profiler")
            plain.append(_timed(draw))
            with marks.on(pipeline):
                kept.append(_recorded(draw, result, Path(folder) / f"{turn}.json"))
        after = pipeline.stats()
        tell("memory")
        with marks.on(pipeline):
            memory = _recorded(draw, result, Path(folder) / "memory.json", memory=True)
    traces = [events.parse(raw, RUN) for raw in kept]
    order = sorted(range(rounds), key=lambda i: traces[i].us)
    middle = order[rounds // 2]
    return Recording(
        result=result,
        plain=plain,
        profiled=[trace.us / 1e6 for trace in traces],
        raw=kept[middle],
        trace=traces[middle],
        memory=events.parse(memory, RUN),
        ledger=marks.ledger,
        before=before,
        after=after,
        warm_up=warm_up,
    )


def _timed(draw: Callable[[], Result]) -> float:
    # waves come back to the host, so the device has nothing left to do
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


def _recorded(
    draw: Callable[[], Result], expected: Result, path: Path, memory: bool = False
) -> dict[str, Any]:
    """Kineto's trace of one call; with ``memory`` allocations are noted, without it shapes."""
    # on a machine without a GPU Kineto would complain on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        # it warns that events of earlier cycles are gone; there is one cycle
        warnings.simplefilter("ignore", UserWarning)
        with (
            profile(
                activities=activities, record_shapes=not memory, profile_memory=memory
            ) as profiler,
            record_function(RUN),
        ):
            found = draw()
    _check(expected, found)
    profiler.export_chrome_trace(str(path))
    raw = events.read(path)
    # it says where the file was
    raw.pop("traceName", None)
    return raw


def _check(expected: Result, found: Result) -> None:
    if not torch.equal(expected.waves, found.waves):
        raise RuntimeError(
            "the profiled run drew other waves than the plain one; what it shows is not what runs"
        )
