"""What changed beyond noise: found where planted, not reported where nothing changed."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sentences import sentence

from fastscore.measure import noise
from fastscore.measure.results import ResultFile, Results, Rounds, Row, Time
from fastscore.measure.sides import read_side
from fastscore.measure.verdict import compare, compare_files, interval

OPS = {"norm": 4e-5, "fuse": 7e-4, "solve": 3e-5, "step": 1.4e-2, "conv": 1.7e-3}
SITTINGS, ROUNDS = 10, 8


def machine(rng, rows, slow=None, by=1.1):
    """A run on a machine whose speed drifts, where rounds are disturbed and sittings differ."""
    found, shape = {}, (SITTINGS, ROUNDS)
    count = SITTINGS * ROUNDS
    # a slow walk that row and reference follow, by different shares
    decay = 0.97 ** np.arange(len(rows) * count)
    walk = np.cumsum(rng.normal(0, 0.004, len(decay)) / decay) * decay + rng.normal(0, 0.02)
    for place, (name, seconds) in enumerate(rows.items()):
        drift = walk[place * count : (place + 1) * count]
        log = (
            rng.uniform(0.4, 0.8) * drift
            + rng.normal(0, 0.004)
            + np.abs(rng.normal(0, 0.01, count))
        )
        log += np.broadcast_to(np.abs(rng.normal(0, 0.015, (SITTINGS, 1))), shape).ravel()
        beside = drift + np.abs(rng.normal(0, 0.02, count))
        # now and then something else runs
        for series in (log, beside):
            series += rng.exponential(0.1, count) * (rng.random(count) < 0.15)
        planted = math.log(by) if name == slow else 0.0
        found[name] = rounds(math.log(seconds) + log + planted, math.log(1.5e-3) + beside, SITTINGS)
    return found


def rounds(log, reference=None, sittings=1):
    x = None if reference is None else tuple(np.exp(reference))
    return Rounds(tuple(np.exp(log)), x, sittings)


def tables(rng, count, **planted):
    """Changes of pairs of runs, the second with what is planted."""
    for _ in range(count):
        a, b = machine(rng, OPS), machine(rng, OPS, **planted)
        yield noise.changes({name: (a[name], b[name]) for name in OPS}, in_turn=True)


def test_nothing_is_reported_between_identical_runs():
    rng = np.random.default_rng(1)
    for table in tables(rng, 15):
        assert not [name for name, change in table.items() if change.beyond_noise]


@pytest.mark.parametrize(("slow", "by"), [("solve", 1.1), ("step", 1.1), ("fuse", 1 / 1.12)])
def test_a_planted_change_is_found_and_nothing_else(slow, by):
    rng = np.random.default_rng(2)
    for table in tables(rng, 8, slow=slow, by=by):
        changed = {n: (1 if c.low > 0 else -1) for n, c in table.items() if c.beyond_noise}
        assert changed == {slow: 1 if by > 1 else -1}
        assert table[slow].low < by - 1 < table[slow].high


def test_what_is_said_to_be_resolved_is_found_and_what_is_far_below_is_not():
    rng = np.random.default_rng(3)
    resolved = np.mean([c.resolves for t in tables(rng, 3) for c in t.values()])
    assert 0.04 < resolved < 0.1
    found = [t["norm"].beyond_noise for t in tables(rng, 8, slow="norm", by=1 + 1.3 * resolved)]
    missed = [t["norm"].beyond_noise for t in tables(rng, 8, slow="norm", by=1.01)]
    assert sum(found) >= 7
    assert not any(missed)


def test_the_reference_is_divided_out_where_the_row_follows_it():
    rng = np.random.default_rng(4)
    walk = [np.cumsum(rng.normal(0, 0.01, 80)) + start for start in (0.0, 0.15)]
    own = [rng.normal(0, 0.005, 80) for _ in range(2)]
    a, b = (rounds(w + o, w, 10) for w, o in zip(walk, own, strict=True))
    change = noise.changes({"row": (a, b)})["row"]
    assert change.share > 0.8
    assert abs(change.change) < 0.04
    assert not change.beyond_noise
    # without it the drift is all there is to see
    plain = noise.changes({"row": tuple(dataclasses.replace(r, reference=None) for r in (a, b))})
    assert plain["row"].change > 0.1
    assert plain["row"].share is None


def test_a_reference_that_the_row_does_not_follow_is_left_alone():
    rng = np.random.default_rng(5)
    a, b = (rounds(rng.normal(0, 0.002, 80), rng.normal(0, 0.1, 80), 10) for _ in range(2))
    assert noise.changes({"row": (a, b)})["row"].share < 0.1


def test_outliers_widen_nothing():
    rng = np.random.default_rng(6)
    quiet = [rng.normal(0, 0.005, 80) for _ in range(2)]
    disturbed = [q + (rng.random(80) < 0.2) * rng.exponential(2.0, 80) for q in quiet]
    calm, wild = (
        noise.changes({"r": tuple(rounds(x, None, 10) for x in s)})["r"] for s in (quiet, disturbed)
    )
    assert wild.high - wild.low < 1.3 * (calm.high - calm.low)


def test_autocorrelated_rounds_are_not_taken_for_independent_ones():
    """Eighty rounds on ten plateaus tell as much as ten."""
    rng = np.random.default_rng(7)
    plateaus = [np.repeat(rng.normal(0, 0.03, 10), 8) for _ in range(10)]
    single = [rng.normal(0, 0.03, 80) for _ in range(10)]
    errors = [
        np.mean([noise._Side(rounds(x, None, 10)).error(0.0, noise._median) for x in series])
        for series in (plateaus, single)
    ]
    assert errors[0] > 2 * errors[1]


def test_a_run_of_one_sitting_claims_less():
    rng = np.random.default_rng(8)
    series = [rng.normal(0, 0.005, 80) for _ in range(2)]
    one, ten = (
        noise.changes({"r": tuple(rounds(x, None, n) for x in series)})["r"].resolves
        for n in (1, 10)
    )
    assert one > 1.5 * ten


def test_more_rows_need_more_evidence():
    rng = np.random.default_rng(9)
    pair = tuple(rounds(rng.normal(0, 0.01, 80), None, 10) for _ in range(2))
    few, many = (noise.changes({str(i): pair for i in range(n)})["0"] for n in (1, 40))
    assert many.high - many.low > 1.3 * (few.high - few.low)


def test_what_all_rows_share_is_the_machines_up_to_a_limit():
    base = machine(np.random.default_rng(10), OPS)
    for by, changed in ((1.025, 0), (1.2, len(OPS))):
        slower = {
            n: dataclasses.replace(r, values=tuple(by * v for v in r.values))
            for n, r in base.items()
        }
        table = noise.changes({n: (base[n], slower[n]) for n in OPS})
        assert sum(c.beyond_noise for c in table.values()) == changed
        assert all(0.02 < c.shared < 0.031 for c in table.values())


def test_student_quantiles():
    """Tables of Student's t."""
    for probability, free, value in (
        (0.975, 10, 2.2281),
        (0.995, 18, 2.8784),
        (0.9995, 18, 3.9216),
        (0.975, 1000, 1.9623),
    ):
        assert noise._student(probability, free) == pytest.approx(value, rel=2e-3)


def test_two_runs_differ_by_less_than_the_interval_that_they_state():
    rng = np.random.default_rng(11)
    for _ in range(8):
        a, b = machine(rng, OPS), machine(rng, OPS)
        for name in OPS:
            first, second = interval(a[name]), interval(b[name])
            assert first.low < first.median < first.high
            assert first.low < second.high and second.low < first.high  # noqa: PT018
    assert interval([1.0, 1.1, 0.9, 1.0]).median == 1.0
    assert "at least two" in sentence(interval, [1.0])


def result(rows, note="", **provenance):
    known = {"device": "cpu", "threads": 1, "commit": {"id": "0123456789abcdef", "dirty": False}}
    known |= {"versions": {"torch": "2.11.0"}}
    return ResultFile("ops", "fastscore bench ops", not note, known | provenance, tuple(rows), note)


def row(name, rounds, **workload):
    return Row(name, {"batch": 1} | workload, "ok", rounds=rounds, time=Time.of(rounds.values))


def test_every_row_of_either_file_is_named():
    runs = machine(np.random.default_rng(12), dict.fromkeys("abcdefgh", 0.001))
    kept = {n: row(n, r) for n, r in runs.items()}
    first = [kept[n] for n in "abcdeh"]
    first += [Row("f", {}, "skipped", "no GPU here"), dataclasses.replace(kept["g"], rounds=None)]
    second = [kept["b"], row("c", runs["c"], batch=8), Row("d", {}, "failed", "wrong by 3")]
    second += [kept["f"], kept["g"], row("h", Rounds(runs["h"].values[:4])), Row("z", {}, "ok")]
    verdict = compare(result(first), result(second))
    said = {r.name: r.reason for r in verdict.rows if r.verdict == "not compared"}
    assert said == {
        "a": "only in A",
        "c": "another workload: batch is 1 in A and 8 in B",
        "d": "failed in B: wrong by 3",
        "e": "only in A",
        "f": "skipped in A: no GPU here",
        "g": "not timed in A",
        "h": "4 rounds in B, of 6 that a comparison needs",
        "z": "only in B",
    }
    assert verdict.named("same") == ["b"]
    text = verdict.text()
    assert all(name in text and reason in text for name, reason in said.items())
    assert "8 of 9 rows: not compared" in text


def test_other_machines_are_not_compared_and_other_versions_are_named():
    runs = machine(np.random.default_rng(13), {"a": 1e-3})
    rows = [row("a", runs["a"])]
    for other, words in (
        ({"threads": 2}, "threads 1 in A and 2 in B"),
        ({"device": "cuda"}, "device cpu in A and cuda in B"),
        ({"processor": {"model": "X"}}, "processor None in A and X in B"),
    ):
        verdict = compare(result(rows), result(rows, **other))
        assert verdict.rows[0].reason == words
        assert verdict.resolves is None
        assert "nothing changed" not in verdict.summary() or "not compared" in verdict.summary()
    other = result(rows, "b.json is of a run that was stopped", versions={"torch": "2.12.0"})
    other = dataclasses.replace(other, suite="step")
    verdict = compare(result(rows, warnings=["busy"]), other, notes=["note"])
    assert verdict.rows[0].verdict == "same"
    assert verdict.differences == (
        "note",
        "b.json is of a run that was stopped",
        "A is of the suite ops, B of step",
        "torch 2.11.0 in A and 2.12.0 in B",
        "A: busy",
    )


def test_a_run_too_unsteady_says_that_it_cannot_tell():
    rng = np.random.default_rng(14)
    wild = [row("a", rounds(rng.normal(0, 0.3, 80), None, 10)) for _ in range(2)]
    (found,) = compare(result(wild[:1]), result(wild[1:])).rows
    assert found.verdict == "cannot tell"
    assert "must exceed" in found.reason
    assert "tolerance 2" in sentence(compare, result([]), result([]), tolerance=2)


def test_files_are_compared_and_the_verdict_is_plain(tmp_path):
    rng = np.random.default_rng(15)
    for name, slow in (("a.json", None), ("b.json", "solve")):
        results = Results.start(tmp_path / name, "ops", "fastscore bench ops", {"threads": 1})
        for key, found in machine(rng, OPS, slow=slow, by=1.2).items():
            results.add(row(key, found))
        results.finish()
    verdict = compare_files(tmp_path / "a.json", tmp_path / "b.json")
    assert verdict.changed
    assert verdict.named("slower") == ["solve"]
    assert "solve is" in verdict.summary()
    assert "These runs resolve" in verdict.text()
    found = json.loads(json.dumps(verdict.json()))
    assert found["counts"]["slower"] == 1
    assert [r["name"] for r in found["rows"]] == list(OPS)
    again = compare_files(tmp_path / "a.json", tmp_path / "b.json")
    assert again == verdict
    assert "does not exist" in sentence(compare_files, tmp_path / "a.json", tmp_path / "c.json")


def test_files_of_a_folder_are_one_side(tmp_path):
    rng = np.random.default_rng(16)
    for folder, slow in (("a", None), ("b", "fuse")):
        (tmp_path / folder).mkdir()
        for number in range(3):
            path = tmp_path / folder / f"{number}.json"
            results = Results.start(path, "ops", "fastscore bench ops", {"threads": 1})
            for key, found in machine(rng, OPS, slow=slow, by=1.2).items():
                results.add(row(key, found))
            results.finish()
    verdict = compare_files(tmp_path / "a", tmp_path / "b")
    assert verdict.named("slower") == ["fuse"]
    alone = compare_files(tmp_path / "a" / "0.json", tmp_path / "b" / "0.json")
    assert verdict.resolves < alone.resolves
    joined = read_side(tmp_path / "a")
    assert joined.row("fuse").rounds.runs == 3
    assert joined.row("fuse").rounds.sittings == 3 * SITTINGS
    Results.start(tmp_path / "a" / "9.json", "ops", "fastscore bench ops", {"threads": 2})
    assert "different threads" in sentence(read_side, tmp_path / "a")
    (tmp_path / "c").mkdir()
    assert "no result files" in sentence(read_side, tmp_path / "c")
