"""Callers that share batches: every one gets the clip he asked for, an error of his own, or word.

What is computed is a pure function of the request: a stream's contract is with a callable. Threads
meet at events, and deadlines pass on a clock that the test turns.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import wait as wait_for

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import PATIENCE, Ask, Drawing, Sound, balanced, prepare, sound

from fastscore import Pipeline
from fastscore.engine import Options
from fastscore.stream import (
    DeadlineExceededError,
    QueueFullError,
    Stream,
)


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
