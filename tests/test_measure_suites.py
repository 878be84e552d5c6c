"""Running a suite: gate before time, whole files, and nothing missing silently."""

import itertools
import json

import pytest
import torch

from fastscore.measure import models, suites, timing
from fastscore.measure.results import read_results
from fastscore.measure.roofline import Level, Peaks
from fastscore.measure.suites import Settings, run
from fastscore.measure.tables import table
from fastscore.measure.workloads import Loop, Op, Step, chosen

CPU = torch.device("cpu")
OPS = [Op(1, b, "norm_act", 8, 4, 4) for b in ("eager", "reference", "triton")]
STEPS = [Step(1, "reference", m, guided=True) for m in ("taps", "pair")]
QUICK = Settings(CPU, rounds=2, instruments=False)


def measured(path, workloads, settings=QUICK, **more):
    return run("ops", workloads, settings, path, "fastscore bench ops", **more)


def test_rows_of_a_group_are_checked_timed_and_written(tmp_path):
    found = measured(tmp_path / "a.json", OPS, Settings(CPU, rounds=13, instruments=False))
    assert found.finished
    eager, ours, triton = found.rows
    assert (eager.status, ours.status) == ("ok", "ok")
    assert ours.check.against == "plain PyTorch"
    assert 0 <= ours.check.error <= ours.check.limit
    # two sittings of seven: the rounds asked for, or as few more as divide
    assert (len(ours.rounds.values), ours.rounds.sittings) == (14, 2)
    assert len(ours.rounds.reference) == 14
    assert ours.time.p20 <= ours.time.median <= ours.time.p80 <= ours.time.p99
    assert ours.workload["command"].startswith(f"fastscore bench ops --only {ours.name} --device")
    # what cannot run here is a row that says why
    assert (triton.status, triton.rounds, triton.time) == ("skipped", None, None)
    assert "GPU" in triton.reason
    assert found.provenance["load_after"] is not None
    assert [s["at"] for s in found.provenance["seen"]] == ["after norm_act/1x8x4x4"]
    assert read_results(tmp_path / "a.json") == found


def test_instruments_fill_memory_costs_and_bound(tmp_path, small, monkeypatch):
    level = Level("memory", None, 2**20, 1e9, 2e9)
    peaks = Peaks("cpu", 1, (level,), {"fp32": 1e9, "bf16": 1e9})
    monkeypatch.setattr(suites.roofline, "peaks", lambda device: peaks)
    step = measured(tmp_path / "a.json", STEPS[:1], Settings(CPU, rounds=2)).rows[0]
    assert step.macs > 0
    assert step.bytes > 0
    assert step.memory["tensor_peak"] > 0
    assert step.memory["weights"]["parameters"] > 0
    assert step.bound["name"] == "compute fp32"
    assert step.bound["share"] == pytest.approx(step.bound["seconds"] / step.time.median)
    assert step.energy == {"none": "not asked for; --energy SECONDS measures it"}
    assert step.workload["parameters"] > step.workload["trainable"] > 0


def test_a_wrong_answer_has_no_figure(tmp_path, monkeypatch):
    right = suites.subjects.build

    def wrong(workload, device):
        built = right(workload, device)
        shift = 1.0 if workload.backend == "reference" else 0.0
        return built._replace(answer=lambda output: output + shift)

    monkeypatch.setattr(suites.subjects, "build", wrong)
    eager, ours, _ = measured(tmp_path / "a.json", OPS).rows
    assert eager.status == "ok"
    assert (ours.status, ours.rounds, ours.time) == ("failed", None, None)
    assert "differs from plain PyTorch by 1 where" in ours.reason
    assert ours.check.error == pytest.approx(1.0)


def test_a_row_that_breaks_takes_no_other_with_it(tmp_path, monkeypatch):
    right = suites.subjects.build

    def broken(workload, device):
        if workload.backend == "reference":
            raise RuntimeError("no kernel image\nis available")
        return right(workload, device)

    monkeypatch.setattr(suites.subjects, "build", broken)
    eager, ours, _ = measured(tmp_path / "a.json", OPS).rows
    assert eager.status == "ok"
    assert (ours.status, ours.reason) == ("failed", "RuntimeError: no kernel image")


def test_sittings_of_small_groups_alternate(tmp_path, monkeypatch):
    """A row is spread over the time that its neighbours take as well."""
    turns = []
    right = suites.interleaved

    def noted(runs, *rest, **named):
        turns.append(len(runs))
        return right(runs, *rest, **named)

    monkeypatch.setattr(suites, "interleaved", noted)
    other = Op(1, "eager", "normals", 1, 4, 4)
    settings = Settings(CPU, rounds=13, instruments=False)
    found = measured(tmp_path / "a.json", [*OPS, other], settings)
    assert [row.name for row in found.rows] == [w.name for w in (*OPS, other)]
    # two sittings of both rows that run here, each followed by one of the other group
    assert turns == [2, 1, 2, 1]


def test_rows_that_are_finished_are_kept(tmp_path, monkeypatch):
    """Interrupted in the second group: the first is in the file, which says that it is not all."""
    groups = itertools.count(1)
    rows = suites._Group.rows

    def interrupted(self):
        if next(groups) == 2:
            raise KeyboardInterrupt
        return rows(self)

    monkeypatch.setattr(suites._Group, "rows", interrupted)
    other = Op(1, "eager", "normals", 1, 4, 4)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "a.json", [*OPS, other])
    found = read_results(tmp_path / "a.json")
    assert not found.finished
    assert [row.name for row in found.rows] == [w.name for w in OPS]
    assert "stopped after 3 rows" in table(found)


def test_progress_reaches_every_row(tmp_path):
    seen = []
    measured(tmp_path / "a.json", OPS, progress=lambda done, name: seen.append(done))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 3)


def test_a_loop_runs_through_the_engine(tmp_path, small):
    loop = Loop(1, "reference", "taps", nfe=2)
    (row,) = measured(tmp_path / "a.json", [loop]).rows
    assert row.status == "ok", row.reason
    assert row.check.against == "the reference in another batch"


@pytest.mark.parametrize(
    ("once", "build", "plan"),
    [
        # quick rows: ten sittings; a second of rounds each
        (2e-3, 0.1, (200, 10)),
        (0.1, 0.1, (80, 10)),
        # slow calls, and slow building
        (2.0, 0.1, (12, 2)),
        (0.1, 2.0, (80, 2)),
    ],
)
def test_as_many_sittings_as_there_is_time_for(once, build, plan):
    pace = {"x": timing.Pace(once, 1)}
    assert suites._plan(pace, None, "step", build) == plan


def test_what_is_built_anew_lies_elsewhere():
    found = set()
    # by chance one of them may come to lie where another lay
    for _ in range(10):
        with suites._elsewhere():
            found.add(torch.zeros(50_000).data_ptr())
    assert len(found) > 1


def test_the_table_names_everything(tmp_path):
    found = measured(tmp_path / "a.json", OPS)
    text = table(found)
    assert "ops/norm_act/1x8x4x4/reference" in text
    assert "skipped: ops/norm_act/1x8x4x4/triton: the triton backend runs on a GPU" in text
    assert "again: fastscore bench ops" in text
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["provenance"]["commit"].keys() == {"id", "dirty"}


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"energy_seconds": 0.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match="must be at least"):
        Settings(CPU, **settings)


def test_models_are_prepared_as_a_pipeline_prepares_them(small, pipe):
    net = models.prepared("taps", CPU, pipe.backend, "fp32")
    packed = [m.prepared is not None for m in net.modules() if hasattr(m, "prepared")]
    theirs = [m.prepared is not None for m in pipe.denoiser.modules() if hasattr(m, "prepared")]
    assert (any(packed), net.training) == (any(theirs), pipe.denoiser.training)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_in_every_mode(tmp_path):
    settings = Settings(torch.device("cuda"), rounds=6)
    found = measured(tmp_path / "a.json", chosen("step", ["step/digits/b1/guided"]), settings)
    status = {row.name: row.status for row in found.rows}
    assert status.pop("step/digits/b1/guided/native") == "skipped"
    ours = {name: s for name, s in status.items() if "/native/" not in name}
    assert set(ours.values()) == {"ok"}, [row.reason for row in found.rows]
