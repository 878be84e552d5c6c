"""Statistics of a stream: quantiles within their error, memory that does not grow, true counts."""

import json
import math
import mmap
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore.stats import Latencies, Latency, StreamRecord, process_memory

QUANTILES = {"p50": 500, "p90": 900, "p99": 990, "p999": 999}


def nearest_rank(values: list[float], thousandths: int) -> float:
    """The smallest value that this share of all do not exceed, by definition."""
    return next(
        v for v in sorted(values) if 1000 * sum(w <= v for w in values) >= thousandths * len(values)
    )


def summary(values: list[float]) -> Latency:
    found = Latencies()
    for value in values:
        found.add(value)
    return found.summary()


class TestLatencies:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(1e-7, 1e5), min_size=1, max_size=60))
    def test_quantiles_are_within_one_percent_of_the_definition(self, values):
        found = summary(values)
        for name, thousandths in QUANTILES.items():
            exact = nearest_rank(values, thousandths)
            assert getattr(found, name) == pytest.approx(exact, rel=0.01 + 1e-9)
        assert found.count == len(values)
        assert found.mean == pytest.approx(math.fsum(values) / len(values))
        assert found.max == max(values)

    def test_ranks_of_a_thousand(self):
        found = summary([i / 1000 for i in range(1, 1001)])
        exact = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
        assert {name: getattr(found, name) for name in exact} == pytest.approx(exact, rel=0.01)

    def test_one_latency_is_told_as_it_is(self):
        # no quantile lies outside the range of what was seen
        assert summary([0.123]) == Latency(1, *[0.123] * 6)

    @pytest.mark.parametrize("seconds", [0.0, 1e-12, 1e12])
    def test_what_lies_outside_the_buckets_is_counted(self, seconds):
        found = summary([seconds] * 3)
        assert (found.count, found.p50, found.max) == (3, seconds, seconds)

    def test_none(self):
        assert summary([]) == Latency()
        assert str(Latency()) == "none yet"

    @pytest.mark.parametrize("seconds", [-1e-9, math.inf, math.nan])
    def test_impossible_latencies_are_refused(self, seconds):
        with pytest.raises(ValueError, match="finite number of seconds"):
            Latencies().add(seconds)

    def test_size_does_not_depend_on_how_many_there_were(self):
        found = Latencies()
        before = sys.getsizeof(found._buckets)
        for i in range(20_000):
            found.add(1e-5 * 1.001**i)
        assert sys.getsizeof(found._buckets) == before
        assert set(vars(found)) == set(vars(Latencies()))


def some_record() -> StreamRecord:
    record = StreamRecord()
    for _ in range(7):
        record.accepted()
    record.refused()
    for size in (2, 3, 2):
        record.batch(size)
    record.batch(1, redone=True)
    record.delivered(1.0, 1.5, 3.5)
    record.delivered(2.0, 2.25, 3.5)
    for outcome in ("cancelled", "expired", "failed"):
        record.ended(outcome)
    return record


class TestRecord:
    def test_counts(self):
        stats = some_record().snapshot(waiting=1, running=1)
        assert (stats.requests, stats.refused, stats.clips) == (7, 1, 2)
        assert (stats.cancelled, stats.expired, stats.failed) == (1, 1, 1)
        assert (stats.waiting, stats.running) == (1, 1)
        assert (stats.batches, stats.batch_sizes, stats.redone) == (4, {1: 1, 2: 2, 3: 1}, 1)

    def test_three_latencies_apart(self):
        stats = some_record().snapshot()
        assert stats.queueing.max == 0.5
        assert stats.queueing.mean == 0.375
        assert stats.computing.max == 2.0
        assert stats.total.max == 2.5
        assert stats.total.mean == pytest.approx(stats.queueing.mean + stats.computing.mean)

    def test_a_snapshot_does_not_change(self):
        record = some_record()
        stats = record.snapshot()
        record.delivered(0.0, 9.0, 99.0)
        record.batch(3)
        assert (stats.clips, stats.batch_sizes[3], stats.total.max) == (2, 1, 2.5)
        with pytest.raises(AttributeError):
            stats.clips = 3

    def test_dictionary_survives_json(self):
        stats = some_record().snapshot()
        data = json.loads(json.dumps(stats.to_dict()))
        assert data["batch_sizes"] == {"1": 1, "2": 2, "3": 1}
        assert data["total"]["p50"] == stats.total.p50
        assert data["memory"]["rss"] == stats.memory.rss

    def test_text_names_what_matters(self):
        text = str(some_record().snapshot(waiting=1, running=1))
        for part in (
            "7: 2 clips, 1 cancelled, 1 expired, 1 failed, 1 refused; 1 waiting, 1 running",
            "4: 1 of 1, 2 of 2, 1 of 3; 1 redone",
            "max 500 ms",
            "max 2.5 s",
            "rss ",
        ):
            assert part in text

    def test_threads_lose_no_count(self):
        record = StreamRecord()

        def work() -> None:
            for i in range(500):
                record.accepted()
                record.batch(i % 3 + 1)
                record.delivered(0.0, 0.5, 1.0)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = record.snapshot()
        assert stats.requests == stats.clips == stats.batches == stats.total.count == 4000
        assert stats.total.mean == pytest.approx(1.0)


class TestMemory:
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_resident_memory_follows_what_is_allocated(self):
        before = process_memory()
        # pages of its own: a heap would give out what others have freed
        block = mmap.mmap(-1, 64 * 2**20)
        block.write(b"x" * len(block))
        during = process_memory()
        assert during.rss - before.rss > 48 * 2**20
        assert during.rss_peak >= during.rss
        block.close()
        after = process_memory()
        assert after.rss < during.rss
        assert after.rss_peak - before.rss > 48 * 2**20

    def test_no_device_no_figures(self):
        if torch.cuda.is_initialized():
            pytest.skip("a GPU is in use")
        memory = process_memory("cpu")
        assert memory.allocated is memory.reserved is None
        assert "allocated" not in str(memory)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    def test_device_memory_is_told_where_there_is_one(self):
        block = torch.empty(2**20, device="cuda")
        memory = process_memory("cuda")
        assert memory.allocated >= block.nbytes
        assert memory.reserved >= memory.allocated
        assert memory.allocated_peak >= memory.allocated

    def test_pytorch_is_not_loaded_to_be_counted(self):
        code = (
            "import sys; from fastscore.stats import StreamRecord; StreamRecord().snapshot(); "
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
