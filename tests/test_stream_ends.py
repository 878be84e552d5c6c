"""Streams that end: deadlines, cancelled requests, and closing with work left."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from concurrent.futures import wait as wait_for

import pytest
from streams import PATIENCE, Ask, Endless, Sound, balanced, prepare, sound

from fastscore.stream import (
    DeadlineExceededError,
    Stream,
    StreamClosedError,
)


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
