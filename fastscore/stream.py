"""One clip at a time for many callers at once: their requests share batches on a single thread.

Knows nothing of what is drawn: one function checks a request, another draws a batch of them.
"""

from __future__ import annotations

import atexit
import math
import time
import weakref
from collections.abc import Callable
from numbers import Real
from types import TracebackType
from typing import Any

from fastscore.batching import (
    ClipFuture,
    DeadlineExceededError,
    Draw,
    Job,
    QueueFullError,
    StreamClosedError,
    Worker,
)
from fastscore.request import whole
from fastscore.stats import StreamRecord, StreamStats

__all__ = [
    "ClipFuture",
    "DeadlineExceededError",
    "Draw",
    "Job",
    "Prepare",
    "QueueFullError",
    "Stream",
    "StreamClosedError",
]

QUEUE_SIZE = 256
# seconds that the end of the process waits for a batch to notice that nobody wants it any more
_PATIENCE_AT_EXIT = 10.0

# ``prepare(label, guidance=, seed=, first=, steps=, nfe=, sampler=)`` checks a request, in the
# caller's thread; ValueError for one unfit
Prepare = Callable[..., Job]


class Stream:
    """Draws single clips for callers in any number of threads, together where it can.

    ``prepare`` and ``draw`` are told in `Prepare` and `Draw`. A single thread calls ``draw``, with
    up to ``max_batch`` jobs of one group: those of the oldest request, in the order they came, so
    that nobody waits for more batches than there are requests before his. An idle thread waits up
    to ``max_wait`` seconds after a request for others of its group, unless one of another group
    comes. ``queue_size`` requests may wait. An Exception out of a batch of several has them drawn
    again one by one, so that only who caused it gets it.

    A context manager that closes at its end: what was asked for is computed still, unless the
    block raised; then it is cancelled, and so it is when the process ends. A stream forgotten
    without ``close`` computes what was asked for and ends its thread. ``device`` is the one whose
    memory ``stats`` tells, ``clock`` tells seconds and never goes back. Raises ValueError for
    limits out of range.
    """

    def __init__(
        self,
        prepare: Prepare,
        draw: Draw,
        *,
        max_batch: int,
        max_wait: float = 0.0,
        queue_size: int = QUEUE_SIZE,
        device: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prepare = prepare
        self._clock = clock
        self._worker = Worker(
            draw,
            whole("max_batch", max_batch, 1),
            _seconds("max_wait", max_wait),
            whole("queue_size", queue_size, 1),
            StreamRecord(device),
            clock,
        )
        # of the worker, not of the stream, which could never be forgotten otherwise
        weakref.finalize(self, self._worker.close).atexit = False
        _WORKERS.add(self._worker)
        self._worker.thread.start()

    def submit(
        self,
        label: str | None,
        *,
        guidance: float | None = None,
        seed: int | None = None,
        first: int = 0,
        steps: int | None = None,
        nfe: int | None = None,
        sampler: str | None = None,
        deadline: float | None = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> ClipFuture:
        """Ask for one clip; returns at once unless the queue is full.

        ``deadline`` is in seconds from now: a clip that is not ready by then is not computed, or
        stopped or thrown away, and DeadlineExceededError its future's exception. Who waits learns
        of it at the next step or batch. With a full queue, waits up to ``timeout`` seconds (None:
        for ever) or, without ``block`` and in callbacks of the stream's own thread, not at all.

        Raises ValueError for a request that cannot be, QueueFullError where there was no room,
        DeadlineExceededError where there was none in time, StreamClosedError after ``close``, in a
        fork of the process and when the thread has died, DeviceLostError where the device did.
        """
        self._worker.check_open()
        now = self._clock()
        limit = _limit("deadline", deadline)
        patience = _seconds("timeout", timeout) if timeout is not None else math.inf
        asked = {"guidance": guidance, "seed": seed, "first": first}
        if label is not None and not isinstance(label, str):
            raise ValueError(f"label {label!r} must be one label, or None; ask for each clip apart")
        job = self._prepare(label, **asked, steps=steps, nfe=nfe, sampler=sampler)
        future = ClipFuture(self._worker, job, now, now + limit)
        self._worker.accept(future, now + patience if block else now)
        return future

    def draw(self, label: str | None, **options: Any) -> Any:
        """One clip: ``submit`` with these options, and its result.

        A caller who is interrupted while waiting gives the clip up. Raises as ``submit`` does, what
        the drawing raised, and CancelledError where the stream was closed with ``cancel``.
        """
        future = self.submit(label, **options)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            # an error's traceback holds this frame, and the future holds the error
            del future

    def stats(self) -> StreamStats:
        """What became of the requests so far, and how long clips took; raises in a fork."""
        return self._worker.snapshot()

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked for any more."""
        return self._worker.refusal() is not None

    def close(self, wait: bool = True, cancel: bool = False) -> None:
        """Take no more requests, and return when what was asked for is done.

        With ``cancel`` all of it is cancelled; without ``wait`` it goes on while this returns. A
        stream may be closed twice. In a fork this does nothing.
        """
        self._worker.close(cancel)
        if wait:
            self._worker.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=kind is not None)


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # a thread that computes while the interpreter is taken down crashes it
    workers = list(_WORKERS)
    for worker in workers:
        worker.close(cancel=True)
    for worker in workers:
        worker.join(_PATIENCE_AT_EXIT)


def _seconds(name: str, value: float) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{name} {value!r} must be a finite number of seconds, 0 or more")
    return float(value)


def _limit(name: str, value: float | None) -> float:
    """Seconds, infinite for None."""
    if value is None:
        return math.inf
    if _seconds(name, value) == 0:
        raise ValueError(f"{name} 0 leaves no time to compute; give seconds above 0, or None")
    return float(value)
