"""Small stages of the GPU campaign: experiments, requests, and the gate of tests before figures."""

import importlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastscore.measure.workloads import Step

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield SimpleNamespace(
            **{n: importlib.import_module(n) for n in ("experiments", "gpu_check", "serving")}
        )


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Run a script dry; its result."""

    def run(module, *options):
        out = tmp_path / "stage.json"
        words = [f"{module.__name__}.py", "--out", str(out), "--device", "cpu", "--dry"]
        monkeypatch.setattr(sys, "argv", [*words, *options])
        module.main()
        return json.loads(out.read_text())

    return run


def test_experiments_have_names_and_a_prediction_each(bench):
    names = [e.name for e in bench.experiments.EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert all(0 < e.predicted < 10 and e.why for e in bench.experiments.EXPERIMENTS)
    assert len({e.predicted < 1 for e in bench.experiments.EXPERIMENTS}) == 2


def test_an_experiment_tells_what_was_predicted_and_what_was_found(bench, stage):
    found = stage(bench.experiments)
    assert found["status"] == "ok"
    row = found["rows"]["reference/b1"]
    assert row["predicted"] == 1.3
    assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]
    assert row["error"] <= row["limit"]


def test_an_experiment_with_a_wrong_answer_is_not_timed(bench, small):
    @contextmanager
    def spoiled():
        silu, torch.nn.functional.silu = torch.nn.functional.silu, torch.relu
        try:
            yield
        finally:
            torch.nn.functional.silu = silu

    one = bench.experiments.Experiment(
        *("spoiled", 1.0, "no"), around=spoiled, mode="eager", backend="reference", precision="fp32"
    )
    step = Step(1, "reference", "taps", "eager", "fp32", guided=True)
    with pytest.raises(ValueError, match="spoiled differs from autograd"):
        bench.experiments.compare(step, one, CPU, 2)


def test_switches_are_put_back(bench):
    before = torch.backends.cudnn.benchmark
    with bench.experiments.cudnn_benchmark():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before


def test_requests_and_many_clips(bench, stage, preset):
    found = stage(bench.serving, "--preset", str(preset), "--requests", "2", "--clips", "3")
    assert found["status"] == "ok"
    rows = list(found["rows"].values())
    assert rows[0]["latency"]["p50"] <= rows[0]["latency"]["p99"]
    assert rows[0]["counts"]["recompilations"] == 0
    assert (rows[1]["clips"], rows[1]["batch"]) == (3, 2)
    assert rows[1]["clips_per_second"] == pytest.approx(3 / min(rows[1]["seconds"]))


def test_a_request_that_cannot_be_served_fails_its_row_alone(bench, stage, tmp_path, preset):
    found = stage(bench.serving, "--preset", str(tmp_path / "none"), str(preset))
    assert found["status"] == "failed"
    failed = {n for n, row in found["rows"].items() if "failed" in row}
    assert failed == {n for n in found["rows"] if "none" in n}
    assert 0 < len(failed) < len(found["rows"])


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"><skipped message="needs a GPU"/></testcase>
<testcase classname="tests.test_a" name="three">
<failure message="assert 1 == 2&#10;more"/></testcase>
</testsuite></testsuites>"""


def test_failures_are_named_by_their_first_line(bench, tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    row = bench.gpu_check.outcome(path)
    assert (row["passed"], row["skipped"], row["failure_count"]) == (1, 1, 1)
    assert row["failures"] == ["tests.test_a::three: ['assert 1 == 2']"]
    assert row["failed"] == "1 of 3 tests failed"
    path.write_text(REPORT.replace("failure", "system-out"))
    assert "failed" not in bench.gpu_check.outcome(path)


def test_tests_that_do_not_end_are_a_failed_row(bench):
    row = bench.gpu_check.tests(["tests/test_gpu_launch.py"], gpu=False, jobs=1, seconds=0.05)
    assert row["failed"] == "no end within 0 s"
