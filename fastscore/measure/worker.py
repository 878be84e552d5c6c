"""A process that runs rows when asked, one line of JSON a request and an answer.

``start`` (suite, only, device, threads) tells protocol, provenance and names of rows; ``row``
(name) builds one and checks its answer; ``time`` (rounds, calls, anew) times it. Workers of other
commits are asked the same, so requests and answers stay as they are within a protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch

from fastscore.measure import subjects
from fastscore.measure.provenance import machine
from fastscore.measure.suites import obstacle, reproduce
from fastscore.measure.timing import Stopwatch, check_equal, reference_work
from fastscore.measure.workloads import Workload, chosen

PROTOCOL = 1
# floats of the largest piece of memory that is taken while operands are built, and their number
_PADDING, _PIECES = 400_000, 4

Plain = dict[str, Any]


def serve() -> None:
    """Answer requests from standard input until it ends; what else is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        answer_all(sys.stdin, answers)


def answer_all(requests: TextIO, answers: TextIO) -> None:
    """An answer to each line; a request that is refused is answered by ``error``."""
    server = Server()
    for line in requests:
        request = json.loads(line)
        try:
            answer = server.answer(request.pop("do"), request)
        except (ValueError, ImportError, MemoryError, RuntimeError) as error:
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Server:
    """The rows of a suite, one of them built at a time."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._rows: dict[str, Workload] = {}
        self._workload: Workload | None = None
        self._built: subjects.Built | None = None
        self._reference: Callable[[], Any] | None = None

    def answer(self, do: str, request: Plain) -> Plain:
        """The answer to a request; ValueError for one that is unknown."""
        known = {"start": self.start, "row": self.row, "time": self.time}
        if do not in known:
            raise ValueError(f"request {do!r} is unknown; known are {', '.join(known)}")
        return known[do](**request)

    def start(self, suite: str, only: list[str], device: str, threads: int | None) -> Plain:
        """Take the suite; rows that this commit does not have are not among the names."""
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._rows = {w.name: w for pattern in only or [""] for w in _rows(suite, pattern)}
        return {
            "protocol": PROTOCOL,
            "provenance": machine(self._device),
            "rows": list(self._rows),
        }

    @torch.no_grad()
    def row(self, name: str) -> Plain:
        """Build a row and check its answer: ok with seconds of a call and of building, or not."""
        workload = self._rows[name]
        self._workload = self._built = None
        described = workload.describe() | {"command": reproduce(workload, self._device)}
        answer: Plain = {"workload": described, "check": None}
        if why := obstacle(workload, self._device):
            return answer | {"status": "skipped", "reason": why}
        start = time.perf_counter()
        built = self._build(workload)
        seconds = time.perf_counter() - start
        against, right = subjects.expected(workload, self._device)
        outputs = {against: right, name: built.answer(built.run())}
        try:
            check = check_equal(outputs, subjects.tolerance(workload, self._device))
        except ValueError as error:
            return answer | {"status": "failed", "reason": str(error)}
        self._workload, self._built = workload, built
        watch = self._watch()
        once = min(watch.takes(built.run) for _ in range(3))
        return answer | {
            "status": "ok",
            "check": {"against": check.against, "error": check.error, "limit": check.limit},
            "once": max(once, 1e-9),
            # what compiles or records is built once
            "build": seconds if built.again else 1e9,
        }

    @torch.no_grad()
    def time(self, rounds: int, calls: int, anew: bool) -> Plain:
        """Seconds a call of the row, one a round, and of the reference beside each."""
        if self._workload is None:
            raise ValueError("there is no row to time; ask for one that is ok first")
        if anew or self._reference is None:
            self._built = None
            with _elsewhere():
                self._built = self._build(self._workload)
                self._reference = reference_work(self._device)
        assert self._built is not None
        run, reference = self._built.run, self._reference
        watch, beside = self._watch(), Stopwatch(self._device)
        for warm in (run, reference):
            warm()
        values, references = [], []
        with _no_collection():
            for _ in range(rounds):
                before = beside(reference)
                # what the reference took from the caches comes back
                run()
                values.append(watch(run, calls))
                references.append((before + beside(reference)) / 2)
        return {"values": values, "reference": references}

    def _build(self, workload: Workload) -> subjects.Built:
        return subjects.build(workload, self._device)

    def _watch(self) -> Stopwatch:
        assert self._built is not None
        return Stopwatch(self._device, wall=self._built.wall, flush=self._built.flush)


def _rows(suite: str, pattern: str) -> tuple[Workload, ...]:
    try:
        return chosen(suite, (pattern,) if pattern else ())
    except ValueError:
        return ()


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Let what is built come to lie on other pages than before, as in another process."""
    gc.collect()
    # glibc gives free pages back; other C libraries do without
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    pieces = [torch.empty(random.randrange(1, _PADDING)) for _ in range(_PIECES)]
    yield
    del pieces


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a round."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
