"""Another commit in turn with this one: which code runs where, and what is refused."""

import io
import json
import os
import shutil
import subprocess
import tempfile

import pytest
import torch
from sentences import sentence

from fastscore.measure import worker
from fastscore.measure.against import Options, Worker, against
from fastscore.measure.results import read_results

# a package in small that speaks the workers' protocol; a row's seconds come from a file
WORKER = """
import json, random, sys
import fastscore, fastscore_kernels
from pathlib import Path
ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "rows.json").read_text())
rng = random.Random(0)

def near(seconds):
    return [seconds * (1 + rng.expovariate(100)) for _ in range(8)]

def serve():
    for line in sys.stdin:
        request = json.loads(line)
        do = request["do"]
        if do == "start":
            found = {"threads": 1, "device": "cpu"}
            found["code"] = [fastscore.__file__, fastscore_kernels.__file__]
            answer = {"protocol": PROTOCOL, "provenance": found, "rows": list(ROWS)}
        elif do == "row":
            row = ROWS[request["name"]]
            answer = {"workload": {"batch": 1}, "check": None, "status": "ok"}
            answer |= {"once": 1e-3, "build": 0}
            answer |= row if isinstance(row, dict) else {}
        else:
            answer = {"values": near(ROWS["only"]), "reference": near(1e-3)}
        print(json.dumps(answer), flush=True)
"""


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(root, tag):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", tag)
    git(root, "tag", tag)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Commits of a package in small: some cannot be run, one is slower in a row."""
    root = tmp_path_factory.mktemp("clone")
    git(root, "init", "-q")
    (root / "fastscore" / "measure").mkdir(parents=True)
    for folder in ("fastscore", "fastscore/measure", "kernels"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "__init__.py").write_text("")
    (root / ".gitignore").write_text("/kernels/lib/\n__pycache__/\n")
    (root / "kernels" / "library.py").write_text("ABI = 1\n")
    (root / "CMakeLists.txt").write_text("message(FATAL_ERROR nonsense)\n")
    commit(root, "before")
    path = root / "fastscore" / "measure" / "worker.py"
    rows = root / "rows.json"
    for tag, seconds, text in (
        ("stranger", 1e-3, WORKER.replace("PROTOCOL", "99")),
        ("broken", 1e-3, "import nothing_of_that_name\n"),
        ("fast", 1e-3, WORKER.replace("PROTOCOL", "1")),
        ("slow", 1.1e-3, WORKER.replace("PROTOCOL", "1")),
    ):
        path.write_text(text)
        rows.write_text(
            json.dumps({"only": seconds, "bad": {"status": "failed", "reason": "wrong"}})
        )
        commit(root, tag)
    (root / "CMakeLists.txt").write_text("# as it was built\n")
    rows.write_text(json.dumps({"only": 1.1e-3, "bad": 1e-3, "new": 1e-3}))
    commit(root, "here")
    return root


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where worktrees go, which must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def run(clone, ref, folder, **options):
    out = folder / "a.json", folder / "b.json"
    return against("ops", ref, out, Options(**options), "the command", root=clone)


def only_one_worktree(clone):
    return len(git(clone, "worktree", "list").splitlines()) == 1


def test_each_side_runs_its_own_code_and_a_slower_one_is_told(clone, temporary, tmp_path):
    verdict = run(clone, "fast", tmp_path)
    a, b = (read_results(tmp_path / name) for name in ("a.json", "b.json"))
    assert a.finished
    assert b.finished
    assert b.provenance["code"] == [
        str(clone / p / "__init__.py") for p in ("fastscore", "kernels")
    ]
    assert all(p.startswith(str(temporary)) for p in a.provenance["code"])
    assert a.row("only").rounds.sittings == 12
    assert {r.name: (r.verdict, r.reason) for r in verdict.rows} == {
        "only": ("slower", ""),
        "bad": ("not compared", "failed in A: wrong"),
        "new": ("not compared", "only in B"),
    }
    assert 0.08 < verdict.rows[0].change.change < 0.12
    assert only_one_worktree(clone)


def test_the_same_code_is_the_same_and_changes_here_are_named(clone, temporary, tmp_path):
    (clone / "kernels" / "library.py").write_text("ABI = 1  # edited\n")
    try:
        verdict = run(clone, "slow", tmp_path)
    finally:
        git(clone, "checkout", "-q", "--", "kernels/library.py")
    assert verdict.rows[0].verdict == "same"
    assert "not committed: kernels/library.py" in verdict.differences[0]


def test_commits_that_cannot_be_compared_with(clone, temporary, tmp_path):
    for ref, words in (
        ("nowhere", "names no commit"),
        ("--all", "names no commit"),
        ("before", "older than"),
        ("broken", "nothing_of_that_name"),
        ("stranger", "do not understand"),
    ):
        said = sentence(run, clone, ref, tmp_path)
        assert words in said
        assert only_one_worktree(clone)
    assert "suite" in sentence(against, "nonsense", "fast", (tmp_path, tmp_path), root=clone)


@pytest.fixture
def library(clone):
    """What a build leaves, in the folder that git ignores."""
    path = clone / "kernels" / "lib" / "libfastscore_native.so"
    path.parent.mkdir()
    path.write_bytes(b"compiled")
    yield path
    shutil.rmtree(path.parent)


def program(folder, monkeypatch, text):
    """Put a cmake before all others on the path."""
    path = folder / "bin" / "cmake"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


def test_native_kernels_of_the_same_sources_are_taken_over(
    clone, temporary, tmp_path, monkeypatch, library
):
    program(tmp_path, monkeypatch, "echo error: not to be called; exit 1")
    verdict = run(clone, "here", tmp_path)
    assert verdict.rows[0].verdict == "same"
    assert verdict.differences == ()


def test_other_native_kernels_are_built(clone, temporary, tmp_path, monkeypatch, library):
    program(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls')
    verdict = run(clone, "fast", tmp_path)
    assert "were built for it" in verdict.differences[0]
    configure, build = (tmp_path / "calls").read_text().splitlines()
    assert configure.startswith(f"-S {temporary}")
    assert build.endswith("--target install")


def test_native_kernels_that_do_not_build(clone, temporary, tmp_path, monkeypatch, library):
    program(tmp_path, monkeypatch, "echo so far; echo 'x.cpp:3: error: wrong'; echo stop; exit 2")
    assert "do not build: x.cpp:3: error: wrong" in sentence(run, clone, "fast", tmp_path)
    assert only_one_worktree(clone)


def test_without_cmake_or_git_it_says_so(clone, temporary, tmp_path, monkeypatch, library):
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "cmake" else real(name))
    assert "pip install cmake" in sentence(run, clone, "fast", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs git" in sentence(run, clone, "fast", tmp_path)


def test_where_there_is_no_repository(tmp_path):
    assert "no git repository" in sentence(run, tmp_path, "HEAD", tmp_path)


def test_a_worker_that_dies_is_named(clone):
    with Worker(clone, "here") as found:
        found._process.kill()
        assert "fastscore of here stopped" in sentence(found.ask, "start")


@pytest.mark.parametrize("bad", [{"sittings": 3}, {"budget": 0.0}, {"threads": 0}])
def test_options_are_checked(bad):
    assert str(next(iter(bad.values()))) in sentence(Options, **bad)


def test_the_worker_answers_for_a_real_row():
    name = "ops/solver_step_without_noise/1x1x80x64/eager"
    threads = torch.get_num_threads()
    start = {
        "do": "start",
        "suite": "ops",
        "only": [name, "none"],
        "device": "cpu",
        "threads": threads,
    }
    requests = [
        start,
        {"do": "time", "rounds": 1, "calls": 1, "anew": False},
        {"do": "row", "name": name},
        {"do": "time", "rounds": 3, "calls": 2, "anew": True},
        {"do": "dance"},
    ]
    answers = io.StringIO()
    worker.answer_all(io.StringIO("\n".join(map(json.dumps, requests))), answers)
    started, early, row, timed, wrong = map(json.loads, answers.getvalue().splitlines())
    assert started["protocol"] == 1
    assert started["rows"] == [name]
    assert "no row" in early["error"]
    assert row["status"] == "ok"
    assert row["check"]["error"] <= row["check"]["limit"]
    assert row["workload"]["op"] == "solver_step_without_noise"
    assert 0 < row["once"] < 1
    assert len(timed["values"]) == len(timed["reference"]) == 3
    assert "dance" in wrong["error"]
