"""Stages of the GPU campaign: whole after every row, resumable, honest about what is missing."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stage():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield importlib.import_module("stage")


def arguments(out, **changes):
    return argparse.Namespace(
        **{"out": out, "device": "cpu", "minutes": 1.0, "dry": True} | changes
    )


def test_a_stage_that_breaks_keeps_its_rows_and_says_why(stage, tmp_path):
    out = tmp_path / "new" / "ops.json"

    def broken():
        with stage.Stage.open("ops", arguments(out)) as one:
            one.add("first", {"seconds": 1.0})
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError):
        broken()
    values = json.loads(out.read_text())
    assert values["status"] == "failed"
    assert "the device is gone" in values["error"]
    assert values["rows"] == {"first": {"seconds": 1.0}}
    assert values["provenance"]["versions"]["torch"]


def test_the_same_command_goes_on_with_what_is_there(stage, tmp_path):
    out = tmp_path / "ops.json"
    with stage.Stage.open("ops", arguments(out)) as one:
        one.add("first", {"seconds": 1.0})
        one.add("bad", {"failed": "wrong answer"})
        one.finish(expected=3)
    assert json.loads(out.read_text())["status"] == "partial"
    with stage.Stage.open("ops", arguments(out)) as again:
        # what failed is tried again
        assert [again.wants(n) for n in ("first", "bad", "third")] == [False, True, True]
        again.add("bad", {"seconds": 2.0})
        again.add("third", {"seconds": 3.0})
        again.finish(expected=3)
    assert json.loads(out.read_text())["status"] == "ok"
    # a dry run is another measurement
    assert stage.Stage.open("ops", arguments(out, dry=False)).rows == {}


def test_a_failed_row_is_a_failed_stage(stage, tmp_path):
    out = tmp_path / "ops.json"
    with stage.Stage.open("ops", arguments(out)) as one:
        one.add("first", {"failed": "wrong answer"})
        one.finish()
    assert json.loads(out.read_text())["status"] == "failed"


def test_a_row_that_cannot_run_takes_no_other_with_it(stage, tmp_path):
    class OddError(Exception):
        """Of no common kind."""

    def broken():
        raise OddError("no such thing")

    with stage.Stage.open("ops", arguments(tmp_path / "ops.json")) as one:
        assert one.measure("bad", broken) == {"failed": "OddError: no such thing"}
        assert one.measure("good", lambda: {"seconds": 1.0}) == {"seconds": 1.0}
        assert one.measure("good", broken) is None
        assert one.measure("long", broken, seconds=1e6) is None
        one.finish(2)
    assert one.values["status"] == "failed"


def test_rows_without_time_left_are_left_out(stage, tmp_path):
    one = stage.Stage.open("ops", arguments(tmp_path / "ops.json", minutes=0.5))
    assert one.wants("short", seconds=5)
    assert not one.wants("long", seconds=60)
    assert not stage.Stage.open("ops", arguments(tmp_path / "o.json", minutes=0)).wants("any")


def test_what_is_no_stage_is_refused(stage, tmp_path):
    out = tmp_path / "ops.json"
    out.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not the result of a stage"):
        stage.Stage.open("ops", arguments(out))
    assert stage.read(tmp_path / "none.json") is None


def test_without_a_gpu_its_device_is_refused(stage, tmp_path):
    if stage.torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ValueError, match="finds no GPU"):
        stage.Stage.open("ops", arguments(tmp_path / "ops.json", device="cuda"))
