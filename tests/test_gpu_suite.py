"""The GPU campaign's runner: limits, results that are whole at any moment, going on, bad calls."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fastscore.measure.workloads import chosen

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stages(bench):
    return bench("gpu_stages")


@pytest.fixture(scope="module")
def runner(bench):
    return bench("gpu_runner")


@pytest.fixture
def place(stages, tmp_path):
    for name in ("work/results", "out"):
        (tmp_path / name).mkdir(parents=True)
    return stages.Place(tmp_path / "work", tmp_path / "out", dry=True, jobs=1)


def planned(stages, code):
    return stages.Planned("one", 1.0, lambda place, result, minutes: ["-c", code, str(result)])


def test_stages_are_chosen_by_name_and_group_once(stages):
    names = [s.name for s in stages.chosen(["check", "first", "tune"])]
    assert names == ["check", "sanitize", "tune"]
    assert {n for group in stages.GROUPS.values() for n in group} == set(stages.STAGES)
    with pytest.raises(ValueError, match="'chekc' is no stage; choose from check, sanitize"):
        stages.chosen(["chekc"])


def test_groups_fit_into_a_call_of_ten_minutes(stages):
    for name in ("first", "second", "third"):
        assert len(stages.GROUPS[name]) <= 3
    assert all(s.minutes < 10 for s in stages.STAGES.values())


def test_every_stage_runs_a_script_that_is_there(stages, place):
    real = stages.Place(place.work, place.out, dry=False, data=("a", "b"))
    for stage in stages.STAGES.values():
        for one in (place, real):
            calls = [stage.command(one, one.results / "x.json", 5.0)]
            for words in (*stage.before(one), *calls, *stage.after(one)):
                if words[0] == "-m":
                    assert words[1] == "fastscore"
                else:
                    assert (ROOT / words[0]).is_file(), words[0]


def test_weights_are_kept_under_names_that_are_known(stages, bench):
    assert {kept for kept, _ in stages.TRAINED.values()} <= set(bench("artifacts").KNOWN)


def test_every_row_that_is_asked_for_has_a_name(stages, place):
    real = stages.Place(place.work, place.out, dry=False)
    for stage in stages.STAGES.values():
        for one in (place, real):
            words = stage.command(one, one.results / "x.json", 5.0)
            only = [words[i + 1] for i, w in enumerate(words) if w == "--only" and words[0] == "-m"]
            # raises where a pattern names no row
            assert not only or chosen("step", only)


def test_a_stage_leaves_result_and_log_and_both_are_packed(stages, runner, place):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{}'); print('all good')"
    assert runner.run(planned(stages, code), place, 60) == 0
    runner.pack(place)
    with tarfile.open(place.out / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["one.json", "one.log"]
    assert "all good" in (place.results / "one.log").read_text()
    # an earlier machine's results are gone on with
    again = stages.Place(place.work / "again", place.out, dry=True)
    again.results.mkdir(parents=True)
    runner.resume(again, place.out / "results.tar.gz")
    assert (again.results / "one.json").read_text() == "{}"
    with pytest.raises(ValueError, match="is no result of this script"):
        runner.resume(again, ROOT / "README.md")


def test_what_comes_before_and_after_belongs_to_a_stage(stages, runner, place):
    def note(word):
        return [["-c", f"print({word!r})"]]

    def one(before, after):
        command = lambda place, result, minutes: ["-c", "print('itself')"]  # noqa: E731
        return stages.Planned("one", 1.0, command, before=before, after=after)

    good = one(lambda place: note("first"), lambda place: note("last"))
    assert runner.run(good, place, 60) == 0
    said = [s for s in (place.results / "one.log").read_text().splitlines() if " " not in s]
    assert said == ["first", "itself", "last"]
    # without what it needs it is not begun
    bad = one(lambda place: [["-c", "raise SystemExit(4)"]], lambda place: note("last"))
    assert runner.run(bad, place, 60) == 4
    assert "itself" not in (place.results / "one.log").read_text().splitlines()


def test_a_stage_that_fails_is_marked_so(stages, runner, bench, place):
    stage_module = bench("stage")
    ok = {"format": "fastscore-stage", "version": 1, "status": "ok", "rows": {}, "dry": True}
    ok["provenance"] = {"commit": None}
    (place.results / "one.json").write_text(json.dumps(ok))
    assert runner.run(planned(stages, "raise SystemExit(3)"), place, 60) == 3
    found = stage_module.read(place.results / "one.json")
    assert found["status"] == "failed"
    assert "exit code 3" in found["error"]


def test_a_stage_that_does_not_end_is_stopped_with_what_it_started(
    stages, runner, place, monkeypatch
):
    monkeypatch.setattr(runner, "_GRACE", 1.0)
    # deaf to interrupts, with a child that would outlive it
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    assert runner.run(planned(stages, code), place, 3) == 124
    child = int((place.results / "one.log").read_text().splitlines()[-1])
    for _ in range(100):
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def suite(tmp_path, *words, **environment):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "GPU_WORK": str(tmp_path / "work"),
        "GPU_OUT": str(tmp_path / "out"),
        **environment,
    }
    return subprocess.run(
        ["bash", ROOT / "bench/gpu_suite.sh", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_script_runs_a_stage_dry_and_packs_its_result(tmp_path):
    run = suite(tmp_path, "--dry", "costs")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "guided step of `paper`" in run.stdout
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        costs = json.load(archive.extractfile("costs.json"))
    assert costs["static"]["rows"]["scoresubnet/guided"]["macs"] > 1e8


def test_the_script_refuses_what_is_no_stage_and_begins_nothing_without_time(tmp_path):
    assert suite(tmp_path, "--dry", "nothing").returncode == 2
    assert suite(tmp_path).returncode == 2
    run = suite(tmp_path, "--dry", "costs", GPU_MINUTES="0.1")
    assert "not begun, no time is left" in run.stdout
    assert not (tmp_path / "work/results/costs.json").exists()
