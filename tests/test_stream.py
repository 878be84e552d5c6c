"""Callers that share batches: every one gets the clip he asked for, an error of his own, or word.

What is computed is a pure function of the request: a stream's contract is with a callable. Threads
meet at events, and deadlines pass on a clock that the test turns.
"""

import contextlib
import dataclasses
import gc
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from concurrent.futures import wait as wait_for

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore import Pipeline
from fastscore.devices import DeviceLostError
from fastscore.engine import Options
from fastscore.stats import OUTCOMES
from fastscore.stream import (
    DeadlineExceededError,
    QueueFullError,
    Stream,
    StreamClosedError,
)

# of every wait, so that what hangs fails
PATIENCE = 20


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request; those of one sampler share batches."""

    label: str
    seed: int
    sampler: str | None

    @property
    def group(self):
        return self.sampler


class Sound:
    """A clip, equal where all of its request is equal; unlike bytes it can be watched."""

    def __init__(self, ask):
        self.bits = hashlib.sha256(repr(ask).encode()).hexdigest()

    def __eq__(self, other):
        return self.bits == other.bits

    __hash__ = None


def prepare(label, *, guidance, seed, first, steps, nfe, sampler):
    if label == "nobody":
        raise ValueError("label 'nobody' is unknown")
    return Ask(label, 0 if seed is None else seed, sampler)


def sound(job):
    if job.label == "diverges":
        raise ValueError(f"seed {job.seed} diverged")
    return Sound(job)


class Drawing:
    """Draws sounds, notes its batches, and stops in every one while its gate is shut."""

    def __init__(self, draw=sound):
        self.draw, self.batches = draw, []
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def __call__(self, jobs, abandoned):
        self.batches.append(jobs)
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        return [self.draw(job) for job in jobs]

    @contextlib.contextmanager
    def busy(self, stream):
        """While this lasts, the stream computes one request of a group of its own."""
        self.gate.clear()
        future = stream.submit("first", sampler="busy")
        assert self.begun.acquire(timeout=PATIENCE)
        try:
            yield future
        finally:
            self.gate.set()

    @property
    def seeds(self):
        """Seeds of every batch but those of ``busy``."""
        return [[job.seed for job in b] for b in self.batches if b[0].sampler != "busy"]


class Endless:
    """Draws until nobody waits for it."""

    def __init__(self):
        self.begun, self.stopped, self.batches = threading.Event(), threading.Event(), 0

    def __call__(self, jobs, abandoned):
        self.batches += 1
        self.begun.set()
        while not abandoned():
            time.sleep(0)
        self.stopped.set()
        raise RuntimeError("stopped")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def drawing():
    return Drawing()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_stream(drawing):
    """Make streams over ``drawing`` that are closed at the end, whatever happened."""
    with contextlib.ExitStack() as stack:

        def make(draw=drawing, max_batch=4, **limits):
            stream = Stream(prepare, draw, max_batch=max_batch, **limits)
            stack.callback(stream.close, cancel=True)
            stack.callback(drawing.gate.set)
            return stream

        yield make


def outcome_of(future):
    """What a future came to, without its text."""
    if future.cancelled():
        return "cancelled"
    return future.exception(PATIENCE) or future.result(PATIENCE)


def balanced(stats):
    """Whether every request accepted is accounted for."""
    open_requests = stats.waiting + stats.running
    return stats.requests == sum(getattr(stats, name) for name in OUTCOMES) + open_requests


class TestResults:
    def test_many_threads_get_what_they_asked_for(self, open_stream):
        stream = open_stream(max_batch=5, queue_size=11, max_wait=1e-4)
        wrong = []

        def caller(number):
            for i in range(150):
                ask = Ask("abc"[i % 3], number * 1000 + i, (None, "x", "y")[i % 7 % 3])
                clip = stream.draw(ask.label, seed=ask.seed, sampler=ask.sampler)
                if clip != Sound(ask):
                    wrong.append(ask)

        with ThreadPoolExecutor(8) as callers:
            list(callers.map(caller, range(8)))
        stats = stream.stats()
        assert not wrong
        assert (stats.requests, stats.clips, stats.waiting, stats.running) == (1200, 1200, 0, 0)
        assert sum(size * n for size, n in stats.batch_sizes.items()) == 1200

    @settings(max_examples=40, deadline=None)
    @given(
        kinds=st.lists(
            st.tuples(st.sampled_from(["one", "two", "diverges", "cancel"]), st.integers(0, 2)),
            min_size=1,
            max_size=60,
        ),
        max_batch=st.integers(1, 6),
        queue_size=st.integers(1, 9),
        threads=st.integers(1, 4),
    )
    def test_whatever_the_order_none_is_lost_or_crossed(
        self, kinds, max_batch, queue_size, threads
    ):
        def caller(numbered):
            number, (label, sampler) = numbered
            future = stream.submit(label, seed=number, sampler=str(sampler))
            given_up = label == "cancel" and future.cancel()
            return Ask(label, number, str(sampler)), given_up, future

        with (
            Stream(prepare, Drawing(), max_batch=max_batch, queue_size=queue_size) as stream,
            ThreadPoolExecutor(threads) as callers,
        ):
            calls = list(callers.map(caller, enumerate(kinds)))
        for ask, given_up, future in calls:
            assert future.done()
            assert future.cancelled() == given_up
            if given_up:
                continue
            if ask.label == "diverges":
                assert str(future.exception()) == f"seed {ask.seed} diverged"
            else:
                assert future.result() == Sound(ask)
        stats = stream.stats()
        assert (stats.requests, stats.waiting, stats.running) == (len(kinds), 0, 0)
        assert balanced(stats)
        assert stats.failed == sum(ask.label == "diverges" for ask, _, _ in calls)
        assert stats.cancelled == sum(given_up for _, given_up, _ in calls)

    def test_options_reach_the_request(self, open_stream):
        seen = []

        def noting(label, **options):
            seen.append((label, options))
            return Ask(label, 0, None)

        stream = open_stream()
        stream._prepare = noting
        options = {"guidance": 2.5, "seed": 7, "first": 3, "steps": 4, "nfe": 8, "sampler": "x"}
        stream.draw("yes", **options, deadline=60)
        stream.draw(None)
        nothing = dict.fromkeys(options) | {"first": 0}
        assert seen == [("yes", options), (None, nothing)]

    def test_futures_are_those_of_concurrent_futures(self, open_stream):
        stream = open_stream()
        futures = [stream.submit("one", seed=i) for i in range(20)]
        assert {f.result().bits for f in as_completed(futures, PATIENCE)} == {
            Sound(Ask("one", i, None)).bits for i in range(20)
        }
        assert not wait_for(futures, PATIENCE).not_done

    def test_result_waits_no_longer_than_asked(self, open_stream, drawing):
        stream = open_stream()
        with drawing.busy(stream) as future:
            with pytest.raises(TimeoutError) as waited:
                future.result(timeout=0.01)
            assert not isinstance(waited.value, DeadlineExceededError)
            assert future.running()
        assert future.result(PATIENCE) == Sound(Ask("first", 0, "busy"))
        assert not future.running()


class TestBatches:
    def test_requests_of_one_group_share_batches_in_their_order(self, open_stream, drawing):
        stream = open_stream(max_batch=3)
        with drawing.busy(stream):
            futures = [stream.submit("one", seed=i, sampler="ab"[i % 2]) for i in range(8)]
        wait_for(futures, PATIENCE)
        assert drawing.seeds == [[0, 2, 4], [1, 3, 5], [6], [7]]
        assert stream.stats().batch_sizes == {1: 3, 3: 2}

    def test_a_crowd_does_not_starve_the_others(self, open_stream, drawing):
        """Who stands at place p is served by batch p at the latest, whatever stands before him."""
        stream = open_stream(max_batch=4)
        places = "aaaaaaaaabaaaacbaaab"
        with drawing.busy(stream):
            futures = [stream.submit("one", seed=i, sampler=s) for i, s in enumerate(places)]
        wait_for(futures, PATIENCE)
        served = {seed: i for i, batch in enumerate(drawing.seeds) for seed in batch}
        oldest = [batch[0] for batch in drawing.seeds]
        assert oldest == sorted(oldest)
        assert all(served[seed] <= seed for seed in served)
        assert sorted(served) == list(range(len(places)))

    def test_an_idle_thread_waits_for_company(self, open_stream, drawing):
        stream = open_stream(max_batch=3, max_wait=1e6)
        futures = [stream.submit("one", seed=i) for i in range(3)]
        assert not wait_for(futures, PATIENCE).not_done
        assert drawing.seeds == [[0, 1, 2]]

    def test_nobody_waits_for_company_of_another_group(self, open_stream, drawing):
        stream = open_stream(max_batch=3, max_wait=1e6)
        lonely = stream.submit("one", seed=1, sampler="a")
        stream.submit("one", seed=2, sampler="b")
        assert lonely.result(PATIENCE)
        assert drawing.seeds == [[1]]

    def test_company_that_does_not_come_is_not_waited_for(self, open_stream):
        stream = open_stream(max_batch=3, max_wait=0.01)
        assert stream.draw("one", seed=4) == Sound(Ask("one", 4, None))

    def test_closing_ends_the_wait_for_company(self, open_stream):
        stream = open_stream(max_batch=3, max_wait=1e6)
        future = stream.submit("one")
        stream.close()
        assert future.done()

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({"max_batch": 0}, "max_batch 0 must be a whole number of at least 1"),
            ({"max_batch": 2.5}, "max_batch 2.5 must be a whole number"),
            ({"max_batch": 1, "queue_size": 0}, "queue_size 0 must be"),
            ({"max_batch": 1, "max_wait": -1}, "max_wait -1 must be a finite number of seconds"),
            ({"max_batch": 1, "max_wait": float("nan")}, "max_wait nan must be a finite"),
            ({"max_batch": 1, "max_wait": True}, "max_wait True must be a finite"),
        ],
    )
    def test_limits_out_of_range_are_refused(self, limits, message):
        with pytest.raises(ValueError, match=message):
            Stream(prepare, Drawing(), **limits)


class TestErrors:
    def test_a_request_is_checked_in_the_callers_thread(self, open_stream, drawing):
        stream = open_stream()
        with pytest.raises(ValueError, match="label 'nobody' is unknown"):
            stream.submit("nobody")
        assert (drawing.batches, stream.stats().requests) == ([], 0)

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            ({"deadline": 0}, "deadline 0 leaves no time"),
            ({"deadline": -1.0}, "deadline -1.0 must be a finite number of seconds"),
            ({"deadline": float("inf")}, "deadline inf must be a finite"),
            ({"deadline": "soon"}, "deadline 'soon' must be a finite"),
            ({"timeout": -2}, "timeout -2 must be a finite"),
        ],
    )
    def test_times_out_of_range_are_refused(self, open_stream, times, message):
        with pytest.raises(ValueError, match=message):
            open_stream().submit("one", **times)

    def test_one_that_fails_does_not_fail_its_neighbours(self, open_stream, drawing):
        stream = open_stream()
        with drawing.busy(stream):
            labels = ("one", "diverges", "two", "diverges")
            futures = [stream.submit(label, seed=i) for i, label in enumerate(labels)]
        for i, (label, future) in enumerate(zip(labels, futures, strict=True)):
            if label == "diverges":
                assert str(future.exception(PATIENCE)) == f"seed {i} diverged"
            else:
                assert future.result(PATIENCE) == Sound(Ask(label, i, None))
        assert drawing.seeds == [[0, 1, 2, 3], [0], [1], [2], [3]]
        stats = stream.stats()
        assert (stats.clips, stats.failed, stats.redone, stats.total.count) == (3, 2, 4, 3)
        assert stream.draw("one")

    def test_errors_told_one_by_one_need_no_second_try(self, open_stream, drawing):
        def told(job):
            return ValueError("diverged") if job.label == "diverges" else sound(job)

        drawing.draw = told
        stream = open_stream()
        with drawing.busy(stream):
            futures = [stream.submit(label) for label in ("one", "diverges")]
        assert futures[0].result(PATIENCE) == Sound(Ask("one", 0, None))
        with pytest.raises(ValueError, match="diverged"):
            futures[1].result(PATIENCE)
        assert stream.stats().redone == 0

    def test_running_out_of_memory_ends_with_smaller_batches(self, open_stream, drawing):
        def hungry(jobs, abandoned):
            if len(jobs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return drawing(jobs, abandoned)

        stream = open_stream(hungry)
        with drawing.busy(stream):
            futures = [stream.submit("one", seed=i) for i in range(4)]
        assert [f.result(PATIENCE) for f in futures] == [
            Sound(Ask("one", i, None)) for i in range(4)
        ]

    def test_a_second_try_is_not_made_for_who_left(self, open_stream, drawing):
        def leaving(job):
            if job.label == "diverges":
                futures[2].cancel()
            return sound(job)

        drawing.draw = leaving
        stream = open_stream()
        with drawing.busy(stream):
            labels = ("diverges", "one", "two")
            futures = [stream.submit(label, seed=i) for i, label in enumerate(labels)]
        assert futures[1].result(PATIENCE)
        assert futures[2].cancelled()
        assert drawing.seeds == [[0, 1, 2], [0], [1]]


class TestDeadlines:
    def test_what_is_late_in_the_queue_is_not_computed(self, open_stream, drawing, clock):
        stream = open_stream(clock=clock)
        with drawing.busy(stream):
            late = stream.submit("one", seed=1, deadline=2.0)
            timely = stream.submit("one", seed=2, deadline=2.5)
            clock.now += 2.0
        with pytest.raises(DeadlineExceededError, match=r"deadline of 2 s, after 2 s in the queue"):
            late.result(PATIENCE)
        assert timely.result(PATIENCE)
        assert drawing.seeds == [[2]]
        assert stream.stats().expired == 1

    def test_nothing_is_delivered_late(self, open_stream, drawing, clock):
        stream = open_stream(max_batch=2, max_wait=1e6, clock=clock)
        drawing.gate.clear()
        late, timely = (stream.submit("one", seed=i, deadline=3.0 + i) for i in range(2))
        assert drawing.begun.acquire(timeout=PATIENCE)
        clock.now += 3.5
        drawing.gate.set()
        with pytest.raises(DeadlineExceededError, match=r"in the queue and 3\.5 s computing"):
            late.result(PATIENCE)
        assert timely.result(PATIENCE) == Sound(Ask("one", 1, None))
        stats = stream.stats()
        assert (stats.expired, stats.clips, stats.computing.max) == (1, 1, 3.5)

    def test_word_comes_while_others_are_computed(self, open_stream, clock):
        """A step asks who is still there: whose time ran out learns of it before the batch ends."""
        asked, go = threading.Semaphore(0), threading.Semaphore(0)

        def stepping(jobs, abandoned):
            for _ in range(3):
                asked.release()
                assert go.acquire(timeout=PATIENCE)
                assert not abandoned()
            return [sound(job) for job in jobs]

        stream = open_stream(stepping, clock=clock)
        timely = stream.submit("one", seed=1)
        assert asked.acquire(timeout=PATIENCE)
        queued = stream.submit("one", seed=2, deadline=1.0)
        clock.now += 1.5
        go.release()
        assert isinstance(queued.exception(PATIENCE), DeadlineExceededError)
        assert timely.running()
        go.release(2)
        assert timely.result(PATIENCE) == Sound(Ask("one", 1, None))

    def test_a_batch_that_is_late_for_all_stops(self, open_stream, clock):
        drawing = Endless()
        stream = open_stream(drawing, clock=clock)
        futures = [stream.submit("one", deadline=limit) for limit in (5.0, 7.0)]
        assert drawing.begun.wait(PATIENCE)
        clock.now += 6.0
        assert isinstance(futures[0].exception(PATIENCE), DeadlineExceededError)
        assert not futures[1].done()
        clock.now += 1.0
        assert isinstance(futures[1].exception(PATIENCE), DeadlineExceededError)
        assert drawing.stopped.wait(PATIENCE)

    def test_deadlines_pass_while_waiting_for_company(self, open_stream, drawing):
        stream = open_stream(max_batch=2, max_wait=1e6)
        with pytest.raises(DeadlineExceededError):
            stream.draw("one", deadline=0.02)
        assert drawing.batches == []

    def test_deadlines_pass_while_waiting_for_room(self, open_stream, drawing):
        stream = open_stream(queue_size=1)
        with drawing.busy(stream):
            stream.submit("one")
            with pytest.raises(DeadlineExceededError, match=r"deadline of 0\.02 s"):
                stream.submit("two", deadline=0.02)
            assert stream.stats().refused == 1


class TestCancelling:
    def test_what_is_queued_is_not_computed(self, open_stream, drawing):
        stream = open_stream()
        with drawing.busy(stream):
            futures = [stream.submit("one", seed=i) for i in range(4)]
            assert futures[1].cancel()
            assert futures[1].cancelled()
            assert futures[1].cancel()
            assert stream.stats().waiting == 3
            with pytest.raises(CancelledError):
                futures[1].result(0)
        wait_for(futures, PATIENCE)
        assert drawing.seeds == [[0, 2, 3]]
        assert not futures[0].cancel()
        assert stream.stats().cancelled == 1

    def test_what_is_computed_stops_at_its_next_step(self, open_stream):
        drawing = Endless()
        stream = open_stream(drawing)
        future = stream.submit("one")
        assert drawing.begun.wait(PATIENCE)
        assert future.running()
        assert future.cancel()
        assert future.cancelled()
        assert next(as_completed([future], PATIENCE)) is future
        assert drawing.stopped.wait(PATIENCE)

    def test_a_batch_goes_on_for_who_is_left(self, open_stream):
        begun, seen = threading.Event(), []

        def drawn(jobs, abandoned):
            begun.set()
            while not futures[0].cancelled():
                time.sleep(0)
            seen.append(abandoned())
            return [sound(job) for job in jobs]

        stream = open_stream(drawn, max_batch=2, max_wait=1e6)
        futures = [stream.submit("one", seed=i) for i in range(2)]
        assert begun.wait(PATIENCE)
        futures[0].cancel()
        assert futures[1].result(PATIENCE) == Sound(Ask("one", 1, None))
        assert seen == [False]
        stats = stream.stats()
        assert (stats.clips, stats.cancelled, balanced(stats)) == (1, 1, True)

    def test_cancelling_makes_room(self, open_stream, drawing):
        stream = open_stream(queue_size=1)
        with drawing.busy(stream):
            queued = stream.submit("one")
            with ThreadPoolExecutor(1) as callers:
                blocked = callers.submit(stream.submit, "two", seed=5)
                queued.cancel()
                future = blocked.result(PATIENCE)
        assert future.result(PATIENCE) == Sound(Ask("two", 5, None))

    def test_one_of_many_cancellers_does_it(self, open_stream, drawing):
        stream = open_stream(queue_size=300)
        with drawing.busy(stream), ThreadPoolExecutor(8) as callers:
            futures = [stream.submit("one", seed=i) for i in range(200)]
            all_of_them = list(callers.map(lambda f: f.cancel(), futures * 4))
        assert all(all_of_them)
        assert stream.stats().cancelled == 200
        assert drawing.seeds == []


class TestQueue:
    def test_a_full_queue_says_so(self, open_stream, drawing):
        stream = open_stream(queue_size=2)
        with drawing.busy(stream):
            for _ in range(2):
                stream.submit("one", block=False)
            for options in ({"block": False}, {"timeout": 0}, {"timeout": 0.01}):
                with pytest.raises(QueueFullError, match="holds its limit of 2 requests"):
                    stream.submit("one", **options)
            stats = stream.stats()
            assert (stats.refused, stats.waiting, stats.running) == (3, 2, 1)

    def test_who_waits_for_room_gets_it(self, open_stream, drawing):
        stream = open_stream(queue_size=1)
        with drawing.busy(stream):
            stream.submit("one")
            callers = ThreadPoolExecutor(3)
            futures = [callers.submit(stream.draw, "two", seed=i) for i in range(3)]
        assert [f.result(PATIENCE) for f in futures] == [
            Sound(Ask("two", i, None)) for i in range(3)
        ]
        callers.shutdown()

    def test_a_callback_never_waits_for_its_own_thread(self, open_stream, drawing):
        stream = open_stream(queue_size=1)
        seen = []

        def callback(future):
            for call in (
                lambda: stream.submit("three"),
                lambda: stream.draw("four"),
                lambda: queued.result(),
            ):
                try:
                    call()
                except Exception as error:
                    seen.append(error)

        with drawing.busy(stream) as future:
            future.add_done_callback(callback)
            queued = stream.submit("two")
        assert queued.result(PATIENCE)
        assert [type(error) for error in seen] == [QueueFullError, QueueFullError, RuntimeError]
        assert "would wait for a clip" in str(seen[2])

    def test_a_callback_may_ask_for_more(self, open_stream):
        stream = open_stream()
        more, there = [], threading.Event()

        def callback(future):
            more.append(stream.submit("two", seed=9))
            there.set()

        stream.submit("one").add_done_callback(callback)
        assert there.wait(PATIENCE)
        assert more[0].result(PATIENCE) == Sound(Ask("two", 9, None))


class TestClosing:
    def test_what_was_asked_for_is_finished(self, drawing):
        with Stream(prepare, drawing, max_batch=2) as stream:
            futures = [stream.submit("one", seed=i) for i in range(9)]
        assert all(future.done() for future in futures)
        assert stream.stats().clips == 9
        assert stream.closed

    def test_an_error_in_the_block_cancels(self):
        drawing, futures = Endless(), []

        def block():
            with Stream(prepare, drawing, max_batch=1) as stream:
                futures.extend(stream.submit("one", seed=i) for i in range(5))
                assert drawing.begun.wait(PATIENCE)
                raise KeyError

        with pytest.raises(KeyError):
            block()
        assert all(future.cancelled() for future in futures)
        assert drawing.batches == 1

    def test_nothing_is_taken_afterwards(self, open_stream, drawing):
        stream = open_stream()
        stream.close()
        stream.close(cancel=True)
        for call in (stream.submit, stream.draw):
            with pytest.raises(RuntimeError, match="the stream is closed; make another"):
                call("one")

    def test_who_waits_for_room_is_told(self, open_stream, drawing):
        stream = open_stream(queue_size=1)
        with drawing.busy(stream), ThreadPoolExecutor(1) as callers:
            stream.submit("one")
            blocked = callers.submit(stream.submit, "two")
            stream.close(wait=False)
            with pytest.raises(StreamClosedError, match="the stream is closed"):
                blocked.result(PATIENCE)

    def test_cancelling_stops_what_is_computed(self, open_stream):
        drawing = Endless()
        stream = open_stream(drawing)
        futures = [stream.submit("one", seed=i, sampler="ab"[i % 2]) for i in range(4)]
        assert drawing.begun.wait(PATIENCE)
        stream.close(cancel=True)
        assert all(future.cancelled() for future in futures)
        assert not stream._worker.thread.is_alive()
        assert drawing.batches == 1

    def test_a_callback_may_close(self, open_stream):
        stream = open_stream()
        future = stream.submit("one")
        future.add_done_callback(lambda _: stream.close())
        assert future.result(PATIENCE)
        stream._worker.thread.join(PATIENCE)
        assert stream.closed
        assert not stream._worker.thread.is_alive()

    def test_a_forgotten_stream_finishes_and_ends_its_thread(self, drawing):
        stream = Stream(prepare, drawing, max_batch=1)
        with drawing.busy(stream):
            futures = [stream.submit("one", seed=i) for i in range(3)]
            thread = stream._worker.thread
            del stream
            gc.collect()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert [f.result(0) for f in futures] == [Sound(Ask("one", i, None)) for i in range(3)]

    def test_the_end_of_the_process_waits_for_no_queue(self):
        code = """
            import threading, time
            from fastscore.stream import Stream

            class Ask:
                group = None

            def draw(jobs, abandoned):
                begun.set()
                while not abandoned():
                    time.sleep(0)
                print("stopped")
                raise RuntimeError

            begun = threading.Event()
            stream = Stream(lambda label, **options: Ask(), draw, max_batch=1)
            futures = [stream.submit("one") for _ in range(5)]
            begun.wait()
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "stopped\n", "")


def in_a_fork(act):
    """What ``act`` raises in a fork of this process, which must end by itself."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        text = "nothing was raised"
        try:
            act()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


@contextlib.contextmanager
def held_elsewhere(lock):
    """While this lasts, another thread has the lock."""
    holds, enough = threading.Event(), threading.Event()

    def hold():
        with lock:
            holds.set()
            enough.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(PATIENCE)
    try:
        yield
    finally:
        enough.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestForks:
    def test_a_fork_is_told(self, open_stream, drawing):
        stream = open_stream()
        done = stream.submit("one")
        assert done.result(PATIENCE)
        with drawing.busy(stream) as running:
            queued = stream.submit("two")
            # a lock that another thread has, nobody ever gives back in the child
            with held_elsewhere(stream._worker.lock):
                for act in (
                    lambda: stream.submit("one"),
                    lambda: stream.draw("one"),
                    lambda: stream.stats(),
                    lambda: running.result(),
                    lambda: queued.exception(),
                ):
                    text = in_a_fork(act)
                    assert text.startswith("StreamClosedError: this stream was made in process")
                    assert "make pipeline and stream after the fork" in text
                for act in (stream.close, queued.cancel, lambda: stream.__exit__(None, None, None)):
                    assert in_a_fork(act) == "nothing was raised"
                assert in_a_fork(lambda: done.result()) == "nothing was raised"
        # and the parent notices nothing
        assert queued.result(PATIENCE) == Sound(Ask("two", 0, None))


class TestDeath:
    @pytest.mark.parametrize("death", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
    def test_everybody_is_told(self, open_stream, drawing, death):
        def dying(job):
            raise death

        drawing.draw = dying
        stream = open_stream(max_batch=2)
        with drawing.busy(stream) as running:
            queued = [stream.submit("one", seed=i) for i in range(3)]
        for future in (running, *queued):
            with pytest.raises(StreamClosedError, match="the stream's thread died of") as told:
                future.result(PATIENCE)
            assert told.value.__cause__ is death
        with pytest.raises(StreamClosedError, match="the stream's thread died of"):
            stream.submit("one")
        stats = stream.stats()
        assert (stats.failed, stats.waiting, stats.running) == (4, 0, 0)
        stream.close()

    def test_one_error_for_a_lost_device(self, open_stream, drawing):
        assertion = RuntimeError("CUDA error: device-side assert triggered")

        def losing(job):
            raise DeviceLostError("cuda:0 was lost") from assertion

        drawing.draw = losing
        stream = open_stream(max_batch=2)
        with drawing.busy(stream) as running:
            queued = [stream.submit("one", seed=i) for i in range(3)]
        for future in (running, *queued):
            with pytest.raises(DeviceLostError, match="cuda:0 was lost") as told:
                future.result(PATIENCE)
            assert told.value.__cause__ is assertion
        assert len(drawing.batches) == 1
        with pytest.raises(DeviceLostError, match="cuda:0 was lost"):
            stream.submit("one")
        assert stream.closed

    def test_a_wrong_number_of_clips_is_nobodys_clip(self, open_stream):
        stream = open_stream(lambda jobs, abandoned: [], max_batch=2)
        future = stream.submit("one")
        with pytest.raises(StreamClosedError, match="returned 0 clips for 1"):
            future.result(PATIENCE)

    def test_callbacks_cannot_keep_others_from_being_told(self, open_stream, drawing):
        def dying(job):
            raise SystemExit

        def rude(future):
            raise SystemExit

        drawing.draw = dying
        stream = open_stream()
        with drawing.busy(stream) as running:
            futures = [running, *(stream.submit("one") for _ in range(3))]
            for future in futures:
                future.add_done_callback(rude)
        for future in futures:
            assert isinstance(future.exception(PATIENCE), StreamClosedError)


class TestInterrupts:
    def test_who_is_interrupted_leaves_and_the_stream_goes_on(self, open_stream, drawing):
        stream = open_stream()
        main, interrupted = threading.main_thread().ident, threading.Event()

        def handler(*_):
            if not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt

        def interrupt():
            while "result" not in function_names(main):
                time.sleep(0)
            # a signal that arrives just before a thread falls asleep does not wake it
            while not interrupted.wait(0.01):
                signal.pthread_kill(main, signal.SIGINT)

        before = signal.signal(signal.SIGINT, handler)
        interrupter = threading.Thread(target=interrupt)
        try:
            with drawing.busy(stream):
                interrupter.start()
                with pytest.raises(KeyboardInterrupt):
                    stream.draw("one", seed=1)
            interrupter.join(PATIENCE)
        finally:
            interrupted.set()
            signal.signal(signal.SIGINT, before)
        assert stream.draw("one", seed=2) == Sound(Ask("one", 2, None))
        assert drawing.seeds == [[2]]
        assert stream.stats().cancelled == 1


def function_names(thread):
    """Names of the functions that a thread is in."""
    stack = traceback.walk_stack(sys._current_frames()[thread])
    return {frame.f_code.co_name for frame, _ in stack}


@pytest.fixture
def no_collector():
    """References alone must do."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
class TestMemory:
    def test_an_idle_stream_holds_no_clip(self, open_stream):
        stream = open_stream(max_batch=2)
        clips = [stream.draw("one", seed=i) for i in range(3)]
        watched = [weakref.ref(clip) for clip in clips]
        stream.submit("two").result(PATIENCE)
        del clips
        assert [ref() for ref in watched] == [None] * 3

    def test_an_error_kept_keeps_no_neighbour(self, open_stream, drawing):
        stream = open_stream()
        with drawing.busy(stream):
            futures = [stream.submit(label) for label in ("one", "diverges", "two")]
        error = futures[1].exception(PATIENCE)
        watched = [weakref.ref(futures[i].result(PATIENCE)) for i in (0, 2)]
        watched += [weakref.ref(future) for future in futures]
        drawing.batches.clear()
        # the thread has left the batch
        stream.draw("three")
        del futures
        assert [ref() for ref in watched] == [None] * 5
        assert "in sound" in "".join(traceback.format_tb(error.__traceback__))

    def test_an_error_kept_keeps_nothing_of_its_computing(self, open_stream, drawing):
        watched = []

        def failing(job):
            state = Sound(job)
            watched.append(weakref.ref(state))
            raise ValueError("diverged")

        drawing.draw = failing
        error = open_stream().submit("one").exception(PATIENCE)
        assert str(error) == "diverged"
        assert watched[0]() is None

    def test_a_future_kept_keeps_no_stream(self, drawing):
        stream = Stream(prepare, drawing, max_batch=2)
        future = stream.submit("one")
        future.result(PATIENCE)
        stream.close()
        worker = weakref.ref(stream._worker)
        del stream
        assert worker() is None


@pytest.fixture(scope="module")
def exact(preset):
    """A pipeline that computes clips one by one: batches change no bit."""
    return Pipeline.from_pretrained(preset, engine=Options(deterministic=True))


class TestPipeline:
    def test_concurrent_callers_get_the_bits_of_their_own_call(self, exact):
        requests = [
            {
                "label": (None, *exact.labels)[i % 4],
                "guidance": i % 3 / 2,
                "seed": i % 5,
                "first": i % 2,
                "steps": 2 + i % 2,
            }
            for i in range(24)
        ]

        def caller(options):
            return stream.draw(**options)

        with exact.stream(max_batch=3) as stream, ThreadPoolExecutor(4) as callers:
            clips = list(callers.map(caller, requests))
        for clip, options in zip(clips, requests, strict=True):
            label = options.pop("label")
            alone = exact.sample(label, **options)
            assert torch.equal(clip.waves, alone.waves)
            assert torch.equal(clip.mels, alone.mels)
            assert (clip.labels, clip.guidance) == (alone.labels, alone.guidance)
            assert (clip.seed, clip.first, clip.nfe) == (alone.seed, alone.first, alone.nfe)
        assert stream.stats().clips == len(requests)

    def test_clips_of_one_batch_agree_with_single_ones_to_rounding(self, pipe):
        with pipe.stream(max_batch=3, max_wait=1e6) as stream:
            futures = [stream.submit("yes", seed=i, steps=2) for i in range(3)]
            clips = [future.result(PATIENCE) for future in futures]
        assert stream.stats().batch_sizes == {3: 1}
        for i, clip in enumerate(clips):
            alone = pipe.sample("yes", seed=i, steps=2)
            torch.testing.assert_close(clip.mels, alone.mels, rtol=1e-3, atol=1e-3)

    def test_without_a_seed_every_clip_is_another(self, exact):
        with exact.stream() as stream:
            one, two = (stream.draw("yes", steps=2) for _ in range(2))
        assert not torch.equal(one.waves, two.waves)
        assert torch.equal(one.waves, exact.sample("yes", seed=one.seed, steps=2).waves)

    def test_a_sample_that_diverges_fails_alone(self, pipe):
        with pipe.stream(max_batch=2, max_wait=1e6) as stream:
            futures = [stream.submit("yes", guidance=g, steps=3) for g in (2.0, 3e38)]
            assert futures[0].result(PATIENCE).waves.isfinite().all()
            with pytest.raises(ValueError, match="diverged at guidance 3e"):
                futures[1].result(PATIENCE)
        stats = stream.stats()
        assert (stats.clips, stats.failed, stats.batch_sizes) == (1, 1, {2: 1})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"label": "nobody"}, "label 'nobody' is unknown"),
            ({"label": ["yes", "no"]}, "one label"),
            ({"label": "yes", "sampler": "magic"}, "sampler 'magic' is unknown"),
            ({"label": "yes", "steps": 0}, "steps 0 must be a whole number"),
            ({"label": "yes", "seed": -1}, "seed -1 is not a whole number"),
            ({"label": "yes", "guidance": float("nan")}, "guidance nan must be a finite"),
        ],
    )
    def test_what_sample_refuses_is_refused_at_once(self, pipe, options, message):
        with pipe.stream() as stream, pytest.raises(ValueError, match=message):
            stream.submit(**options)

    def test_a_clip_given_up_is_not_computed_to_its_end(self, preset):
        pipe = Pipeline.from_pretrained(preset)
        with pipe.stream() as stream:
            future = stream.submit("yes", steps=20_000)
            while not future.running():
                time.sleep(0)
            assert future.cancel()
        assert pipe.stats()["evaluations"] == 0
