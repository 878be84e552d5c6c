"""Requests of many threads, computed in batches on one: futures, queue, deadlines, cancelling.

What is asked for and what draws it is left to `fastscore.stream` and its user.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from fastscore.devices import DeviceLostError
from fastscore.stats import StreamRecord, StreamStats

# the longest sleep, in seconds, before the clock is looked at again
_NAP = 3600.0


class StreamClosedError(RuntimeError):
    """The stream draws no more: it was closed, its thread died, or this process is a fork."""


class QueueFullError(RuntimeError):
    """A request found no room in the queue."""


class DeadlineExceededError(TimeoutError):
    """A clip was not ready within its deadline."""


class Job(Protocol):
    """A checked request."""

    @property
    def group(self) -> Hashable:
        """What jobs must have in common to share a batch, such as sampler, steps and interval."""


# ``draw(jobs, abandoned)`` returns a clip for each job, in their order, or in its place the
# Exception that this one job came to. It may ask ``abandoned()`` between steps: once that is true
# nobody waits for the batch any longer, and whatever ``draw`` then returns or raises is discarded.
# DeviceLostError ends the stream
Draw = Callable[[Sequence[Any], Callable[[], bool]], Sequence[Any]]


class ClipFuture(Future):
    """A clip to come, for `concurrent.futures`' ``wait`` and ``as_completed`` as well.

    Unlike an executor's, it can be cancelled until it is done, also while it is computed.
    """

    def __init__(self, worker: Worker, job: Job, submitted: float, deadline: float) -> None:
        super().__init__()
        # the base class's state stays "pending" until the end, so that cancelling is allowed
        self._worker: Worker | None = worker
        self._process = worker.process
        self._job, self._group = job, job.group
        self._submitted, self._deadline = submitted, deadline
        self._number = -1
        self._started: float | None = None
        # one of `stats.OUTCOMES` as soon as one thread has the right to settle the future
        self._outcome: str | None = None
        self._settled = False

    def running(self) -> bool:
        """Whether the clip is being computed."""
        return self._started is not None and not self.done()

    def cancel(self) -> bool:
        """Give up the clip; False where it is done already, and in a fork.

        What is queued is not computed. A batch under way goes on for the others in it, and stops
        at its next step when nobody is left.
        """
        worker = self._worker
        if worker is None or os.getpid() != self._process:
            return self._outcome == "cancelled"
        if worker.claim(self, "cancelled"):
            self._settle("cancelled")
        return self._outcome == "cancelled"

    def result(self, timeout: float | None = None) -> Any:
        """The clip; TimeoutError after ``timeout`` seconds, CancelledError, or why there is none.

        DeadlineExceededError, which is a TimeoutError too, is the end of the request; a mere
        TimeoutError leaves it under way. StreamClosedError where the stream's thread died, and in
        a fork; DeviceLostError; RuntimeError in a callback that would wait for its own thread.
        """
        self._check_thread()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Why there is no clip, None where there is one; waits and raises as ``result`` does."""
        self._check_thread()
        return super().exception(timeout)

    def _check_thread(self) -> None:
        worker = self._worker
        if self._settled or worker is None:
            return
        worker.check_process()
        if threading.current_thread() is worker.thread and not self.done():
            raise RuntimeError(
                "a callback on the stream's own thread would wait for a clip that this thread is "
                "to compute; add a callback to that future instead"
            )

    def _settle(self, outcome: str, value: Any = None) -> None:
        """End the future; for the thread alone that claimed it, and without the worker's lock."""
        try:
            if outcome == "clips":
                self.set_result(value)
            elif outcome == "cancelled":
                try:
                    super().cancel()
                finally:
                    self.set_running_or_notify_cancel()  # tells wait and as_completed
            else:
                self.set_exception(value)
        finally:
            self._settled, self._worker = True, None


class Worker:
    """The thread of a stream and all it shares with the callers.

    ``draw`` and the limits are as in `fastscore.stream.Stream`. The thread is yet to be started.

    Futures are settled without the lock, since their callbacks are anybody's code; who may settle
    one is decided under it, once, by ``claim``. The lock is re-entrant because the garbage
    collector may close a forgotten stream from within any statement.
    """

    def __init__(
        self,
        draw: Draw,
        max_batch: int,
        max_wait: float,
        queue_size: int,
        record: StreamRecord,
        clock: Callable[[], float],
    ) -> None:
        self.draw, self.record, self.clock = draw, record, clock
        self.max_batch, self.max_wait, self.queue_size = max_batch, max_wait, queue_size
        self.process = os.getpid()
        self.lock = threading.RLock()
        self.work, self.room = threading.Condition(self.lock), threading.Condition(self.lock)
        # by number, oldest first. one structure, changed by single statements: an interrupt in a
        # caller's thread finds it whole
        self.queue: dict[int, ClipFuture] = {}
        self.batch: list[ClipFuture] = []
        self.numbers = itertools.count()
        # no open request has an earlier deadline
        self.earliest = math.inf
        self.closing = False
        self.death: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="fastscore-stream", daemon=True)

    def accept(self, future: ClipFuture, until: float) -> None:
        """Queue a request, waiting for room until that time; raises as ``Stream.submit`` does."""
        with self.lock:
            while True:
                self.check_open()
                if len(self.queue) < self.queue_size:
                    break
                self._wait_for_room(future, until)
            future._number = next(self.numbers)
            self.earliest = min(self.earliest, future._deadline)
            self.queue[future._number] = future
            self.record.accepted()
            self.work.notify()

    def _wait_for_room(self, future: ClipFuture, until: float) -> None:
        now = self.clock()
        if now >= future._deadline:
            self.record.refused()
            raise _late(future, now)
        # the stream's own thread makes the room: it would wait for itself
        if now >= until or threading.current_thread() is self.thread:
            self.record.refused()
            raise QueueFullError(
                f"the queue holds its limit of {self.queue_size} requests; wait longer for room, "
                "ask for fewer clips at once or raise queue_size"
            )
        self.room.wait(min(until - now, future._deadline - now, _NAP))

    def claim(self, future: ClipFuture, outcome: str, done: float = 0.0) -> bool:
        """Whether the caller, and nobody else ever, may settle the future, and then must."""
        with self.lock:
            if future._outcome is not None:
                return False
            future._outcome = outcome
            if self.queue.pop(future._number, None) is not None:
                self.room.notify()
            if outcome == "clips":
                self.record.delivered(future._submitted, future._started, done)
            else:
                self.record.ended(outcome)
            return True

    def snapshot(self) -> StreamStats:
        """Everything so far; StreamClosedError in a fork."""
        self.check_process()
        with self.lock:
            running = sum(future._outcome is None for future in self.batch)
            return self.record.snapshot(waiting=len(self.queue), running=running)

    def close(self, cancel: bool = False) -> None:
        """Take no more requests and let the thread end; with ``cancel``, of those there are too."""
        if os.getpid() != self.process:
            return
        with self.lock:
            self.closing = True
            asked = [*self.queue.values(), *self.batch] if cancel else []
            self.work.notify_all()
            self.room.notify_all()
        for future in asked:
            future.cancel()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread; not in a fork, which has none, nor on the thread."""
        own = threading.current_thread() is self.thread
        if os.getpid() == self.process and not own:
            self.thread.join(timeout)

    def refusal(self) -> StreamClosedError | DeviceLostError | None:
        """Why nothing can be asked for, a new error each time; None where it can."""
        if os.getpid() != self.process:
            return StreamClosedError(
                f"this stream was made in process {self.process} and cannot be used in its fork "
                f"{os.getpid()}; make pipeline and stream after the fork, or start processes with "
                "the spawn method"
            )
        if isinstance(self.death, DeviceLostError):
            error = DeviceLostError(*self.death.args)
            error.__cause__ = self.death.__cause__
        elif self.death is not None:
            error = StreamClosedError(
                f"the stream's thread died of {self.death!r}; make another stream"
            )
            error.__cause__ = self.death
        elif self.closing:
            error = StreamClosedError("the stream is closed; make another stream")
        else:
            error = None
        return error

    def check_open(self) -> None:
        """Raise what ``refusal`` says, if anything."""
        error = self.refusal()
        if error is not None:
            raise error

    def check_process(self) -> None:
        """StreamClosedError in a fork of the process; takes no lock, which may be held there."""
        if os.getpid() != self.process:
            raise self.refusal()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self._die(error)

    def _turn(self) -> bool:
        """Compute one batch; False where there will be none any more."""
        # no name outlives the turn: an idle stream holds no future
        batch = self._next_batch()
        if not batch:
            return False
        self._compute(batch)
        self.batch = []
        return True

    def _next_batch(self) -> list[ClipFuture]:
        """The requests to compute now, waiting for them; none where the stream is closed."""
        while True:
            self._expire()
            with self.lock:
                batch, wait = self._choose()
                if batch:
                    self.batch, now = batch, self.clock()
                    for future in batch:
                        future._started = now
                        del self.queue[future._number]
                    self.room.notify(len(batch))
                    return batch
                if self.closing:
                    return []
                self.work.wait(wait)

    def _choose(self) -> tuple[list[ClipFuture], float | None]:
        """A batch that should be computed now, or none and for how many seconds to wait."""
        if not self.queue:
            return [], None
        oldest = next(iter(self.queue.values()))
        same = [f for f in self.queue.values() if f._group == oldest._group]
        left = oldest._submitted + self.max_wait - self.clock()
        # a request of another group must not wait for company that is not its own
        full = len(same) >= self.max_batch or len(same) < len(self.queue)
        if full or left <= 0 or self.closing:
            return same[: self.max_batch], None
        return [], min(left, max(0.0, self.earliest - self.clock()), _NAP)

    def _compute(self, batch: list[ClipFuture], redone: bool = False) -> None:
        self.record.batch(len(batch), redone)
        drawn = self._attempt(batch)
        done = self.clock()
        if isinstance(drawn, Exception):
            # the tensors in its frames would live as long as somebody keeps the error
            traceback.clear_frames(drawn.__traceback__)
            drawn = [drawn] if len(batch) == 1 else []
        if drawn:
            for future, value in zip(batch, drawn, strict=True):
                self._hand_over(future, value, done)
            del future, value
        else:
            self._one_by_one(batch)
        # this frame and its callers' live as long as the error does, too
        batch.clear()
        drawn.clear()

    def _hand_over(self, future: ClipFuture, value: Any, done: float) -> None:
        outcome = "failed" if isinstance(value, Exception) else "clips"
        if done >= future._deadline:
            outcome, value = "expired", _late(future, done)
        if self.claim(future, outcome, done):
            future._settle(outcome, value)

    def _attempt(self, batch: list[ClipFuture]) -> list[Any] | Exception:
        """What became of each request, or the error that all of them came to."""
        jobs = [future._job for future in batch]
        try:
            drawn = list(self.draw(jobs, functools.partial(self._abandoned, batch)))
        except DeviceLostError:
            raise
        except Exception as error:
            return error
        if len(drawn) != len(jobs):
            raise TypeError(f"the drawing function returned {len(drawn)} clips for {len(jobs)}")
        return drawn

    def _one_by_one(self, batch: list[ClipFuture]) -> None:
        for future in batch:
            self._expire()
            if future._outcome is None:
                self._compute([future], redone=True)
        del future

    def _abandoned(self, batch: list[ClipFuture]) -> bool:
        """Whether nobody waits for any clip of the batch; deadlines that passed are told first."""
        self._expire()
        return all(future._outcome is not None for future in batch)

    def _expire(self) -> None:
        """End every request, queued or running, whose deadline has passed."""
        now = self.clock()
        if now < self.earliest:
            return
        with self.lock:
            asked = [*self.queue.values(), *self.batch]
            late = [f for f in asked if f._deadline <= now and self.claim(f, "expired")]
            ahead = (f._deadline for f in asked if f._deadline > now)
            self.earliest = min(ahead, default=math.inf)
        for future in late:
            future._settle("expired", _late(future, now))

    def _die(self, death: BaseException) -> None:
        """Tell everybody who waits."""
        for error in (death, death.__cause__):
            traceback.clear_frames(error and error.__traceback__)
        with self.lock:
            self.death, self.closing = death, True
            asked = [*self.queue.values(), *self.batch]
            orphans = [future for future in asked if self.claim(future, "failed")]
            self.batch = []
            self.room.notify_all()
        for future in orphans:
            # whatever one caller's callback raises, the others are to be told
            with contextlib.suppress(BaseException):
                future._settle("failed", self.refusal())


def _late(future: ClipFuture, now: float) -> DeadlineExceededError:
    begun = future._started
    where = (
        f"{now - future._submitted:.3g} s in the queue"
        if begun is None
        else f"{begun - future._submitted:.3g} s in the queue and {now - begun:.3g} s computing"
    )
    return DeadlineExceededError(
        f"the clip was not ready within its deadline of "
        f"{future._deadline - future._submitted:.3g} s, after {where}; allow more time, take fewer "
        "steps or ask for fewer clips at once"
    )
