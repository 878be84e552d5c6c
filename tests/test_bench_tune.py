"""Tuning: candidates that can run, answers before times, noise not accepted, whole tables."""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE, activation

# isort: split
from fastscore_kernels.gpu import launch
from fastscore_kernels.gpu.plans import plan_norm

from fastscore.measure.timing import Timing, WrongAnswerError

BENCH = Path(__file__).parents[1] / "bench"
HERE = torch.device(DEVICE)
H100 = launch.DEVICES["sm_90"]
# nothing is compiled for it
INTERPRETED = launch.Device("interpreter", 8)
NAMES = (
    *("tune", "tunables", "candidates", "variants", "sittings", "launch_table", "precompile"),
    *("replays", "problems"),
)


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in NAMES})


@pytest.fixture(scope="module")
def everything(bench):
    """Every tunable of an H100, by name."""
    return {one.name: one for one in bench.tunables.tunables(H100, dry=False)}


@pytest.fixture(scope="module")
def tiny(bench):
    """A tunable that the interpreter can run."""
    found = bench.tunables.tunables(bench.tunables.device_here(HERE), dry=True)
    return next(one for one in found if one.choice.op == "norm_act")


@pytest.fixture(scope="module")
def lone(everything):
    """A norm of `paper` at batch 1, which the rule splits."""
    return everything["norm_act dtype=bfloat16 rows=1 channels=192 positions=1280 groups=8 last=1"]


@pytest.mark.parametrize(
    ("model", "batch", "dtype"), [("paper", 1, "bfloat16"), ("digits", 8, "float32")]
)
def test_all_that_guided_steps_ask_for_is_tuned(bench, everything, model, batch, dtype):
    asked = bench.tunables.guided_step(H100, model, batch, dtype)
    assert asked.total() > 40
    # moments that are found on the way are asked for, and not launched
    missing = {name for name in asked if name not in everything}
    assert all(name.startswith("tap_path_moments ") for name in missing)
    assert {n.partition(" ")[0] for n in asked} - {n.partition(" ")[0] for n in missing} >= {
        *("norm_act", "norm_act_backward", "tap_path_own", "tap_path_project", "tap_path_attend")
    }


def test_every_operation_has_a_tiny_problem(bench, everything):
    dry = bench.tunables.tunables(bench.tunables.device_here(HERE), dry=True)
    # the tiny path finds its moments on the way: more positions take an interpreter minutes
    assert {one.choice.op for one in everything.values()} - {one.choice.op for one in dry} == {
        "tap_path_moments"
    }


def test_the_largest_share_of_a_step_comes_first(bench, everything):
    some = list(everything.values())[:4]
    shares = {some[2].name: 5.0, some[3].name: 7.0}
    assert bench.tunables.ordered(some, shares) == [some[3], some[2], some[0], some[1]]


def test_candidates_are_steps_from_the_rule_and_the_other_plan(bench, everything, lone):
    plans, refused = bench.candidates.candidates(lone.choice, H100.multiprocessors)
    assert lone.choice.rule["splits"] > 1
    # one launch instead of two is among them: fewer nodes may win
    assert any(plan["splits"] == 1 for plan in plans.values())
    assert "warps=8" in plans
    for one in list(everything.values())[::7]:
        plans, refused = bench.candidates.candidates(one.choice, H100.multiprocessors)
        assert 2 <= len(plans) <= 16
        for name, plan in plans.items():
            assert plan.keys() == one.choice.rule.keys()
            assert plan != one.choice.rule, name
        assert all(refused.values())


def test_what_cannot_run_is_refused_with_the_reason(bench, lone, everything):
    rule = dict(lone.choice.rule)
    assert bench.candidates.obstacle(lone.choice, rule) == ""
    for changes, why in (
        ({"warps": 32}, "warps 32 is outside 1 .. 16"),
        ({"bundle": 3}, "bundle 3 does not divide 8 groups"),
        ({"block_n": 4096}, "block_n 4096 is more than 1280 positions need"),
        ({"block_n": 1024}, "a tile of 262144 numbers is above 32768"),
        ({"block_n": 128, "warps": 4}, "256 numbers a thread are above 128"),
    ):
        assert bench.candidates.obstacle(lone.choice, rule | changes) == why
    attend = next(o for o in everything.values() if o.choice.op == "tap_path_attend")
    plans, refused = bench.candidates.candidates(attend.choice, H100.multiprocessors)
    assert refused["block_m=8"] == "block_m 8 is outside 16 .. 128"
    assert "block_m=8" not in plans


def test_the_entry_of_a_table_is_a_candidate_unless_it_makes_the_same_launches(bench, lone):
    def found(**entry):
        choice = dataclasses.replace(lone.choice, chosen={**lone.choice.rule, **entry})
        one = dataclasses.replace(lone, choice=choice)
        with bench.precompile.Compilers(INTERPRETED) as compilers:
            return bench.variants.variants(one, H100, compilers)

    assert "splits=7" in found(splits=7).plans
    # both come to a stretch a tile
    same = found(splits=300)
    assert same.refused["splits=300"] == "the same launches as the rule"
    assert "splits=300" not in same.plans


# Planted times: what the clocks of two sittings say of "rule", "fast" and "noisy"

ROUNDS = 10


def planted(scale, spread=0.0):
    return Timing(tuple(scale * (1 + spread * (-1) ** i) for i in range(ROUNDS)))


class Planted:
    """Sittings whose clocks were read beforehand, in order."""

    def __init__(self, bench, *sittings):
        self.bench, self.sittings, self.asked = bench, list(sittings), []

    def __call__(self, plans, states):
        self.asked.append((list(plans), list(states)))
        times = self.sittings.pop(0)
        timings = {s: {n: times[s].get(n, planted(2.0)) for n in plans} for s in states}
        return self.bench.sittings.Sitting(timings, {"broken": "does not launch"})


PLANS = {"fast": {"warps": 8}, "noisy": {"warps": 2}}


def row(bench, tunable, *sittings):
    sit = Planted(bench, *sittings)
    return bench.tune.tuned(tunable, PLANS, sit), sit


def test_a_faster_candidate_is_accepted_and_noise_is_not(bench, lone):
    times = {"rule": planted(1.0), "fast": planted(0.8), "noisy": planted(0.95, spread=0.1)}
    found, sit = row(bench, lone, {"warm": times}, {"warm": times, "cold": times})
    assert found["accepted"] == PLANS["fast"]
    assert sit.asked == [
        (["rule", "fast", "noisy"], ["warm"]),
        (["rule", "fast"], ["warm", "cold"]),
    ]
    assert found["skipped"] == {"broken": "does not launch"}
    assert bench.tune.gain(found) == pytest.approx(1.25)
    noise = {"rule": planted(1.0, spread=0.1), "fast": planted(0.99), "noisy": planted(0.98)}
    found, sit = row(bench, lone, {"warm": noise})
    assert found["accepted"] is None
    assert len(sit.asked) == 1


@pytest.mark.parametrize("gain", [1.02, 1.04])
def test_three_per_cent_count(bench, lone, gain):
    times = {"rule": planted(1.0), "fast": planted(1 / gain)}
    found, _ = row(bench, lone, {"warm": times}, {"warm": times, "cold": times})
    assert (found["accepted"] is not None) == (gain > 1.03)


def test_once_is_not_enough_and_cold_caches_may_object(bench, lone):
    fast, equal = ({"rule": planted(1.0), "fast": planted(t)} for t in (0.8, 1.0))
    slow = {"rule": planted(1.0), "fast": planted(1.2)}
    found, _ = row(bench, lone, {"warm": fast}, {"warm": equal, "cold": equal})
    assert found["accepted"] is None
    found, _ = row(bench, lone, {"warm": fast}, {"warm": fast, "cold": slow})
    assert found["accepted"] is None
    found, _ = row(bench, lone, {"warm": fast}, {"warm": fast, "cold": equal})
    assert found["accepted"] == PLANS["fast"]


def test_where_the_fastest_is_not_confirmed_the_next_one_may_be(bench, lone):
    times = {"rule": planted(1.0), "fast": planted(0.7), "noisy": planted(0.9)}
    again = times | {"fast": planted(1.1)}
    found, _ = row(bench, lone, {"warm": times}, {"warm": again, "cold": times})
    assert found["accepted"] == PLANS["noisy"]


def test_a_wrong_answer_is_a_failed_row_that_no_table_gets(bench, tiny, monkeypatch):
    right = bench.sittings.exact
    monkeypatch.setattr(bench.sittings, "exact", lambda *a: 1.3 * right(*a))
    with torch.no_grad(), bench.replays.lane(HERE):
        found = bench.tune.tuned(tiny, {}, bench.sittings.Bench(tiny, HERE, rounds=1))
    assert found["failed"].startswith("wrong answer: rule, warm differs from float64")
    assert "accepted" not in found
    assert "candidates" not in found
    assert bench.launch_table.merged({"norm_act": {found["key"]: {"warps": 2}}}, {"a": found}) == {
        "norm_act": {found["key"]: {"warps": 2}}
    }


def test_a_plan_that_does_not_launch_is_skipped_but_not_the_rule(bench, tiny):
    rule, broken = dict(tiny.choice.rule), dict(tiny.choice.rule) | {"bundle": 3}
    sit = bench.sittings.Bench(tiny, HERE, rounds=2)
    with torch.no_grad(), bench.replays.lane(HERE):
        found = sit({"rule": rule, "broken": broken}, ["warm", "cold"])
        assert found.skipped == {"broken": "ValueError: bundle 3 must divide 4 groups"}
        assert found.timings.keys() == {"warm", "cold"}
        assert found.timings["cold"].keys() == {"rule"}
        with pytest.raises(ValueError, match="must divide"):
            sit({"rule": broken}, ["warm"])


def test_tables_are_merged(bench, tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(
        json.dumps({"norm_act": {"a": {"warps": 1}, "b": {"warps": 2}}, "x": {"c": {}}})
    )
    rows = {
        "1": {"op": "norm_act", "key": "a", "accepted": {"warps": 8}},
        # the rule has caught up with an older entry
        "2": {"op": "x", "key": "c", "accepted": None},
        "3": {"op": "tap_norm", "key": "d", "accepted": {"warps": 4}},
        "4": {"op": "norm_act", "key": "b", "failed": "wrong answer"},
    }
    bench.launch_table.write(path, rows)
    assert launch.read_table(path) == {
        "norm_act": {"a": {"warps": 8}, "b": {"warps": 2}},
        "tap_norm": {"d": {"warps": 4}},
    }
    before = path.read_text()
    with pytest.raises(ValueError, match="whole numbers"):
        bench.launch_table.write(
            path, {"1": {"op": "norm_act", "key": "a", "accepted": {"warps": -1}}}
        )
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sm_90.json"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="object of operations"):
        bench.launch_table.write(path, rows)


def test_a_written_entry_is_what_launches_take(bench, tmp_path, monkeypatch):
    x = activation(1, 8, 2, 2)
    with launch.choices() as asked, launch.record(H100):
        plan_norm("norm_act", x, 2, 1)
    accepted = dict(asked[0].rule) | {"warps": 16}
    rows = {"1": {"op": "norm_act", "key": asked[0].key, "accepted": accepted}}
    bench.launch_table.write(tmp_path / "sm_90.json", rows)
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch.table.cache_clear()
    try:
        with launch.record(H100):
            assert plan_norm("norm_act", x, 2, 1).warps == 16
    finally:
        launch.table.cache_clear()


def test_a_dry_run_ends_well_and_leaves_the_tables_alone(bench, tmp_path, capsys):
    tables = {p: p.read_bytes() for p in launch.TABLES.iterdir()}
    out = tmp_path / "tune.json"
    command = ["--out", str(out), "--device", DEVICE, "--dry", "--only", "norm"]
    assert bench.tune.main(command) == 0
    values = json.loads(out.read_text())
    assert values["status"] == "ok"
    assert values["architecture"] == bench.tunables.device_here(HERE).arch
    names = set(values["rows"]) - {"shares"}
    assert {n.partition(" ")[0] for n in names} == {
        *("norm_act", "norm_act_backward", "tap_norm", "normals")
    }
    for name in names:
        found = values["rows"][name]
        assert len(found["candidates"]) == 2, name
        assert any("only 1 is tried" in why for why in found["skipped"].values()), name
    assert "4 of 4 rows, 0 failed" in capsys.readouterr().out
    # the same command has nothing left to do
    assert bench.tune.main(command) == 0
    assert json.loads(out.read_text())["rows"] == values["rows"]
    assert {p: p.read_bytes() for p in launch.TABLES.iterdir()} == tables


@pytest.mark.parametrize("more", [["--dry", "--write"], []])
def test_an_interpreter_fills_no_table(bench, tmp_path, capsys, more):
    out = tmp_path / "tune.json"
    assert bench.tune.main(["--out", str(out), "--device", "cpu", *more]) == 2
    assert "tells nothing of a GPU" in capsys.readouterr().err
    assert not out.exists()


COMPILING = """
import json, sys

def main():
    from fastscore_kernels.gpu import launch
    from precompile import Compilers, obstacle
    from problems import TINY, Problem
    from tunables import launches
    import torch

    device = launch.DEVICES["sm_90"]
    op = next(op for op in TINY if op.op == "tap_fuse" and not op.spatial)
    problem = Problem(op, torch.bfloat16)
    with Compilers(device, workers=1) as compilers:
        good = compilers.start(launches(problem, device))
        again = compilers.start(launches(problem, device))
        bad = compilers.start(launches(problem, device, tap_fuse_own={"block_r": 3}))
        print(json.dumps([obstacle(good), obstacle(bad), good == again]))

if __name__ == "__main__":
    main()
"""


def test_kernels_compile_ahead_without_a_gpu(tmp_path):
    """In a process without the interpreter, which has nothing to compile."""
    script = tmp_path / "compiling.py"
    script.write_text(COMPILING)
    paths = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = tmp_path / "cache"
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    good, bad, once = json.loads(run.stdout.splitlines()[-1])
    assert good == ""
    assert bad
    assert once
    assert list(cache.rglob("own_position_kernel.cubin"))


def test_wrong_answers_name_the_plan(bench, lone):
    def sit(plans, states):
        raise WrongAnswerError("warps=8, cold differs from float64 by 1 where 0.1 is allowed", None)

    found = bench.tune.tuned(lone, PLANS, sit)
    assert found["failed"].startswith("wrong answer: warps=8, cold")
