"""The race of operations: checked before timed, nothing left out in silence, losers counted."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE
from kernel_cases import native_or_skip

from fastscore.measure import nodes
from fastscore.measure.operations import case
from fastscore.measure.timing import Timing
from fastscore.measure.workloads import suite

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    names = ("op_race", "contenders", "problems", "stage", "replays")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def problem(bench):
    return next(p for p in bench.problems.problems(dry=True) if p.op.op == "norm_act")


@torch.no_grad()
def race(bench, problem, **runners):
    """Our kernels against eager, and against what ``runners`` plants."""
    both = bench.contenders.contenders(problem, native_or_skip())
    found = {name: both[name] for name in ("native", "eager")} | runners
    return bench.op_race.race(problem, found, CPU, rounds=2)


# whole numbers, and logits
ONE_DTYPE = ("normals", "class_cotangents")


def test_every_registered_shape_is_there_once_the_most_important_first(bench):
    found = bench.problems.problems(dry=False)
    names = [p.name for p in found]
    assert len(set(names)) == len(names)
    registered = {w.problem for w in suite("ops")}
    for dtype in ("bf16", "fp32"):
        here = {n.removeprefix(f"{dtype}/") for n in names if n.startswith(dtype)}
        assert {p for p in registered if p.partition("/")[0] not in ONE_DTYPE} <= here
    assert registered < {p.op.problem for p in found}
    order = list(dict.fromkeys((p.name.partition("/")[0], p.op.batch) for p in found))
    assert order == [(d, b) for d in ("bf16", "fp32") for b in (1, 64, 8)]


def test_a_row_says_who_won_and_by_how_much(bench, problem):
    row = race(bench, problem)
    assert "failed" not in row
    assert row["checks"].keys() == row["us"]["warm"].keys() == {"native", "eager"}
    for state in ("warm", "cold"):
        ratio = row["ratio"][state]
        assert ratio["to"] == "eager"
        assert ratio["p20"] <= ratio["median"] <= ratio["p80"]
        assert row["winner"][state] in ("native", "eager")


@pytest.mark.parametrize("who", ["native", "eager", "other"])
def test_a_wrong_answer_is_a_failed_row_without_times(bench, problem, who):
    wrong = bench.contenders.Contender(lambda case: lambda: 1.2 * case.run("eager")())
    row = race(bench, problem, **{who: wrong})
    assert row["failed"].startswith("wrong answer: ")
    assert who in row["failed"]
    assert "us" not in row


def test_answers_of_every_set_but_the_first_are_their_own(bench, problem):
    """Only the first set's answer is the expected one: rotating sets are not one set."""
    cases = bench.op_race._cases(problem, CPU)
    assert len(cases) == bench.replays.sets(cases[0].arguments, CPU) > 1
    first, second = (one.run("eager")() for one in cases[:2])
    assert not torch.allclose(first, second)


def test_one_that_cannot_run_is_left_out_with_the_reason_but_not_ours(bench, problem):
    def refuse(case):
        raise RuntimeError("no kernel for heads of 28\nand more lines")

    broken = bench.contenders.Contender(refuse)
    row = race(bench, problem, other=broken)
    assert row["not_measured"] == {"other": "RuntimeError: no kernel for heads of 28"}
    assert "other" not in row["us"]["warm"]
    row = race(bench, problem, native=broken)
    assert row["failed"] == "RuntimeError: no kernel for heads of 28"
    lost = bench.contenders.Contender(lambda case: fail("CUDA error: device-side assert"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        race(bench, problem, other=lost)


def fail(sentence):
    raise RuntimeError(sentence)


def test_losers_are_counted_and_the_sure_ones_apart(bench):
    ours, close, fast = (Timing(s) for s in ((1.0, 1.1, 0.9), (1.0, 1.0, 0.95), (0.5, 0.5, 0.5)))
    slow = Timing((2.0, 2.0, 2.0))
    rows = {
        "won": bench.op_race.verdict({"warm": {"ours": ours, "eager": slow}}, "ours"),
        "close": bench.op_race.verdict({"warm": {"ours": ours, "eager": close}}, "ours"),
        "lost": bench.op_race.verdict(
            {"warm": {"ours": ours, "eager": slow, "sdpa": fast}}, "ours"
        ),
        "alone": bench.op_race.verdict({"warm": {"ours": ours}}, "ours"),
        "bad": {"failed": "wrong answer"},
    }
    assert rows["lost"]["winner"] == {"warm": "sdpa"}
    assert rows["lost"]["ratio"]["warm"]["to"] == "sdpa"
    found = bench.op_race.summary(rows, expected=7)
    assert [one["row"] for one in found["losers"]] == ["lost"]
    assert (found["slower"], found["surely_slower"], found["failed"]) == (1, 1, ["bad"])
    text = "\n".join(bench.op_race.table(found))
    assert "5 of 7 rows, 1 failed" in text
    assert "lost" in text


def test_a_loss_within_the_noise_is_a_loss_that_is_not_sure(bench):
    ours, other = Timing((1.0, 1.0, 1.0, 1.0, 1.0)), Timing((0.9, 0.98, 0.99, 1.05, 1.1))
    row = bench.op_race.verdict({"cold": {"ours": ours, "eager": other}}, "ours")
    (lost,) = bench.op_race.losers({"row": row})
    assert (lost["state"], lost["sure"]) == ("cold", False)


def test_compiling_waits_for_rows_to_come_and_says_so(bench, tmp_path):
    args = argparse.Namespace(out=tmp_path / "r.json", device="cpu", minutes=5.0, dry=True)
    clock = bench.op_race.Clock(bench.stage.Stage.open("op_race", args), rows=10)
    assert clock.obstacle() == ""
    clock.rows_left = 200
    why = clock.obstacle()
    assert why.startswith("no time: ")
    assert "for 200 rows" in why
    # rows turn out to be quick
    clock.rows += [0.5, 0.5]
    assert clock.obstacle() == ""
    clock.compilations.append(400.0)
    assert "compiling takes 400 s" in clock.obstacle()
    assert bench.op_race.unfinished({"not_measured": {"compile": why}})
    assert not bench.op_race.unfinished({"not_measured": {"compile": "--no-compile"}})


def test_a_row_that_is_not_to_compile_says_why(bench, problem):
    with torch.no_grad():
        row = bench.op_race.race(
            problem,
            bench.contenders.contenders(problem, native_or_skip()),
            CPU,
            rounds=1,
            no_compile="no time: none",
        )
    assert row["not_measured"] == {"compile": "no time: none"}


def test_a_dry_run_ends_well_and_goes_on(bench, tmp_path, capsys):
    out = tmp_path / "race.json"
    command = ["--out", str(out), "--device", DEVICE, "--dry", "--no-compile", "--only", "norm"]
    assert bench.op_race.main(command) == 0
    values = json.loads(out.read_text())
    assert values["status"] == "ok"
    assert values["backend"] == "triton"
    assert {r["operation"] for r in values["rows"].values()} == {
        *("norm_act", "norm_act_vjp", "tap_norm", "normals")
    }
    assert values["summary"]["rows"] == 4
    printed = capsys.readouterr().out
    assert "4 of 4 rows, 0 failed, 4 not compiled" in printed
    assert bench.op_race.main(command) == 0
    assert json.loads(out.read_text())["rows"] == values["rows"]


def test_bad_arguments_are_refused(bench, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert bench.op_race.main(["--out", str(tmp_path / "r.json")]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_nobody_waits_for_the_device_while_captured(bench):
    """On tensors without memory: what a graph cannot hold shows, at every lone shape."""
    found = {}
    with nodes.imagined():
        for one in bench.problems.problems(dry=False):
            if one.op.batch != 1:
                continue
            for name, runner in bench.contenders.contenders(one, "triton").items():
                # autograd's threads need a device, and compilers one to compile for
                if runner.compiles or (one.op.op, name) == ("norm_act_vjp", "eager"):
                    continue
                call = runner.build(case(one.op, nodes.DEVICE, one.dtype))
                found[f"{one.name} {name}"] = nodes.predicted(call)
    assert len(found) > 150
    assert {name: got.transfers for name, got in found.items() if got.transfers} == {}
    assert all(got.total > 0 for got in found.values())
    ours = [got.total for name, got in found.items() if name.endswith("triton")]
    assert max(ours) <= 3
