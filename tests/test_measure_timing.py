"""Timing in turn: order, rounds, known lengths, the fixed computation beside, and the gate."""

import gc
import itertools
import time

import pytest
import torch

from fastscore.measure import timing
from fastscore.measure.timing import (
    Stopwatch,
    Timing,
    WrongAnswerError,
    check_equal,
    interleaved,
    ratios,
    reference_work,
)

CPU = torch.device("cpu")


# sum of what the fixed computation gives
SUM = 421266.98589


class Clock:
    """A clock that only what is timed moves on."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds: float):
        """A call that takes these seconds, one after the other, over and over."""
        lengths = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(lengths)

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def spin(seconds: float):
    """A call of known length by the real clock."""

    def run() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return run


def test_a_call_of_known_length_is_told_as_long_as_it_is():
    found = interleaved({"1 ms": spin(1e-3), "2 ms": spin(2e-3)}, rounds=15)
    for name, seconds in (("1 ms", 1e-3), ("2 ms", 2e-3)):
        # another process may lengthen a round, and nothing shorten it; the quickest is undisturbed
        assert seconds <= found[name].quantile(0.0) == pytest.approx(seconds, rel=0.05)


def test_what_is_timed_is_told_exactly(clock):
    found = interleaved({"2 ms": clock.takes(2e-3), "50 us": clock.takes(5e-5)}, rounds=9)
    assert found["2 ms"].seconds == pytest.approx([2e-3] * 9)
    # forty calls a round, and the time of one
    assert found["50 us"].seconds == pytest.approx([5e-5] * 9)
    assert ratios(found, "2 ms", "50 us") == pytest.approx((40, 40, 40))


def test_what_slows_the_machine_down_shows_in_the_fixed_computation_too(clock):
    pace = [1.0]

    def at_pace(seconds):
        def run() -> None:
            clock.now += seconds * pace[0]

        return run

    def slower(done, rounds):
        pace[0] *= 1.1

    found = interleaved({"x": at_pace(0.2)}, 5, reference=at_pace(1e-3), progress=slower)["x"]
    assert found.seconds == pytest.approx([0.2 * 1.1**i for i in range(5)])
    assert found.reference == pytest.approx([1e-3 * 1.1**i for i in range(5)])


def test_the_order_rotates_and_every_round_has_everybody(monkeypatch):
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    monkeypatch.setattr(timing, "_warm", lambda run, watch: 1.0)
    found = interleaved(runs, rounds=4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {len(t.seconds) for t in found.values()} == {4}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 30), (1.0, 15), (1e-3, 200)])
def test_as_many_rounds_as_the_budget_holds(monkeypatch, seconds, rounds):
    monkeypatch.setattr(timing, "_warm", lambda run, watch: seconds)
    seen = []
    found = interleaved(
        {"x": lambda: None}, budget=3.0, progress=lambda *p: seen.append(p), round_seconds=0
    )
    assert len(found["x"].seconds) == rounds
    assert seen == [(i + 1, rounds) for i in range(rounds)]


def test_the_fixed_computation_stands_on_both_sides_of_every_round(clock):
    order = []

    def noted(name, run):
        return lambda: (order.append(name), run())

    runs = {"x": noted("x", clock.takes(0.5))}
    found = interleaved(runs, 3, reference=noted("-", clock.takes(5e-3, 7e-3)))["x"]
    assert found.seconds == pytest.approx([0.5] * 3)
    assert found.reference == pytest.approx([6e-3] * 3, rel=0.05)
    # a tenth of the round's time, half of it before and half after
    assert "".join(order)[-3 * 11 :] == "-----x-----" * 3
    assert interleaved({"x": clock.takes(0.5)}, rounds=2)["x"].reference is None


def test_the_fixed_computation_is_the_same_everywhere():
    """Figures of different days are divided by its time: it must never change."""
    first, second = (reference_work(CPU)() for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2**18,)
    assert timing._SIDE == {"cpu": 384, "cuda": 3072}
    assert timing._ELEMENTS == {"cpu": 2**18, "cuda": 2**25}
    assert float(first.double().sum()) == pytest.approx(SUM, abs=1e-3)


def test_the_collector_is_kept_out_of_rounds_and_comes_back():
    states = []
    interleaved({"x": lambda: states.append(gc.isenabled())}, rounds=2, round_seconds=0)
    assert states[-2:] == [False, False]
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        interleaved({"x": _interrupted(after=5)}, rounds=9, round_seconds=0)
    assert gc.isenabled()


def _interrupted(after):
    calls = []

    def run():
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt

    return run


def test_rounds_and_quantiles_as_a_result_file_holds_them():
    found = Timing(tuple(float(i) for i in range(1, 102)), tuple([1.0] * 101))
    assert found.time().median == 51.0
    assert (found.time().p20, found.time().p80, found.time().p99) == (21.0, 81.0, 100.0)
    assert found.rounds().values == found.seconds
    assert found.rounds().reference == found.reference


def test_the_gate_tells_error_and_limit():
    right = torch.tensor([1.0, -20.0])
    check = check_equal({"reference": right, "native": right + 0.5}, 0.05)
    assert (check.against, check.error, check.limit) == ("reference", 0.5, pytest.approx(1.0))
    # the output nearest to its limit, whichever it is
    several = (torch.zeros(2), None, right)
    other = (torch.zeros(2) + 1e-3, None, right + 1e-2)
    check = check_equal({"reference": several, "native": other}, 1e-2)
    assert (check.error, check.limit) == (pytest.approx(1e-3), pytest.approx(1e-2))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (torch.tensor([1.0, -22.0]), "native differs from reference by 2 where 1 is allowed"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, float("inf")]), "not finite"),
        (torch.tensor([1.0]), "has shapes [(1,)] where reference has [(2,)]"),
    ],
)
def test_no_figure_for_a_wrong_answer(wrong, sentence):
    with pytest.raises(WrongAnswerError) as refused:
        check_equal({"reference": torch.tensor([1.0, -20.0]), "native": wrong}, 0.05)
    assert sentence in str(refused.value)
    check = refused.value.check
    assert check is None or check.error > check.limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_tell_a_kernel_of_known_length():
    """Of cycles: a clock that rests below its limit when asked is not the one a kernel runs at."""
    watch = Stopwatch(torch.device("cuda"), flush=True)
    one, two = (
        # the least of many: other tests may use the device meanwhile
        min(watch(lambda n=n: torch.cuda._sleep(n)) for _ in range(50))
        for n in (1_000_000, 500_000)
    )
    assert one / two == pytest.approx(2, rel=0.1)
    # an SM's clock is between 0.2 and 3 GHz
    assert 500_000 / 3e9 < two < 500_000 / 0.2e9
