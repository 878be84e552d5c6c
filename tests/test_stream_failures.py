"""Streams in forks, after the death of their thread, interrupted, and forgotten."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
import weakref

import pytest
from streams import (
    PATIENCE,
    Ask,
    Sound,
    prepare,
)

from fastscore.devices import DeviceLostError
from fastscore.stream import (
    Stream,
    StreamClosedError,
)


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
