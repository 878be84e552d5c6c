"""``fastscore bench``: what it prints, what it writes, and what it refuses in one sentence."""

import pytest

from fastscore.cli import main
from fastscore.measure.results import read_results

ROW = "ops/normals/1x1x80x64/eager"


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def test_a_suite_is_measured_printed_and_written(here, capsys):
    assert bench("ops", "--only", ROW, "--rounds", 2, "--time-only", "--quiet") == 0
    out = capsys.readouterr().out
    assert ROW in out
    assert "written to bench-ops-cpu.json" in out
    found = read_results(here / "bench-ops-cpu.json")
    assert found.finished
    assert found.command == (
        f"fastscore bench ops --only {ROW} --device cpu --rounds 2 --time-only"
    )
    # the command under a row measures that row
    assert found.rows[0].workload["command"].startswith(f"fastscore bench ops --only {ROW} ")


def test_names_are_listed_and_nothing_is_measured(here, capsys):
    assert bench("vocoder", "--list") == 0
    assert capsys.readouterr().out.splitlines()[0] == "vocoder/digits/b1"
    assert not list(here.iterdir())


def test_two_files_are_compared(here, capsys):
    for name in ("a.json", "b.json"):
        bench("ops", "--only", ROW, "--rounds", 6, "--time-only", "--quiet", "--out", name)
    capsys.readouterr()
    assert bench("--compare", "a.json", "b.json") == 0
    assert ROW in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stepp"], "suite 'stepp' is unknown; choose one of ops, step"),
        ([], "no suite was named; choose one of ops, step"),
        (["ops", "--only", "nothing"], "no row of suite ops is named 'nothing'"),
        (["ops", "--rounds", 0], "rounds 0 must be at least 1"),
        (["ops", "--threads", 0], "threads 0 must be at least 1"),
        (["ops", "--device", "tpu"], "device 'tpu' is unknown"),
        (["ops", "--only", ROW, "--out", "no/such/a.json"], "the folder no/such does not exist"),
        (["ops", "--only", ROW, "--out", "."], "it is a folder"),
        (["--compare", "a.json", "b.json"], "a.json does not exist"),
        (["ops", "--against", "HEAD", "--rounds", 3], "--rounds does not go with --against"),
    ],
)
def test_what_cannot_be_done_is_named(here, refused, arguments, sentence):
    assert sentence in refused("bench", *arguments)
    assert not list(here.iterdir())


def test_without_a_gpu_the_device_is_refused(here, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "PyTorch sees 0 GPUs" in refused("bench", "ops", "--device", "cuda")
    assert not list(here.iterdir())


def test_an_interrupted_run_shows_and_keeps_what_is_finished(here, capsys, monkeypatch):
    from fastscore.measure import suites

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(suites._Group, "gate", interrupted)
    assert bench("ops", "--only", ROW, "--time-only", "--quiet") == 130
    assert "stopped before its first row" in capsys.readouterr().out
    assert not read_results(here / "bench-ops-cpu.json").finished


def test_a_wrong_answer_is_told_by_the_exit_code(here, capsys, monkeypatch):
    from fastscore.measure import suites

    build = suites.subjects.build
    monkeypatch.setattr(
        suites.subjects,
        "build",
        lambda workload, device: build(workload, device)._replace(answer=lambda o: o + 1),
    )
    assert bench("ops", "--only", ROW, "--time-only", "--quiet") == 1
    assert "failed: " + ROW in capsys.readouterr().out
