"""compute-sanitizer's verdicts: clean, errors, refusals, and runs that say nothing.

What a stand-in for the tool prints is what the real one does.
"""

import importlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE  # before anything brings Triton

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "bench")
    odd_cases, sanitize = (importlib.import_module(name) for name in ("odd_cases", "sanitize"))

CLEAN = "========= COMPUTE-SANITIZER\n{ran}\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: {0} displayed ({1}, {2})\n"
WRITE = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at norm_act_kernel+0x4f0 in norm_act.py:92
=========     by thread (3,0,0) in block (2,0,0)
=========     Address 0x7f3e0a00020c is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f3e0a000200 of size 12 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch in main.c:286 [0x3a2d] in __triton_launcher.so
========= 
========= ERROR SUMMARY: 1 error
"""  # noqa: W291
RACE = """========= COMPUTE-SANITIZER
{ran}
========= Error: Race reported between Write access at norm_act_kernel+0x140
=========     and Read access at norm_act_kernel+0xe0 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
UNSUPPORTED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the docs
{ran}
========= ERROR SUMMARY: 0 errors
"""
EARLY = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option.
"""


def verdict(text, tool="memcheck", op="norm_act", code=0):
    ran = odd_cases.finished(op)
    return sanitize.judged(tool, op, sanitize.Run(code, text.replace("{ran}", ran), 1.5))


def test_a_clean_run_is_one_that_ran():
    row = verdict(CLEAN)
    assert row == {"tool": "memcheck", "op": "norm_act", "errors": 0, "seconds": 1.5, "code": 0}
    races = "{ran}\n" + RACES.format("0 hazards", "0 errors", "0 warnings")
    assert "failed" not in verdict(races, "racecheck")


@pytest.mark.parametrize(
    ("text", "tool", "words"),
    [(WRITE, "memcheck", "Invalid __global__ write"), (RACE, "racecheck", "Error: Race reported")],
)
def test_errors_are_counted_and_told(text, tool, words):
    row = verdict(text, tool, code=1)
    assert (row["errors"], row["failed"]) == (1, "1 errors")
    assert words in row["report"][0]
    assert len(row["report"]) <= sanitize.LINES


def test_warnings_of_races_count():
    text = "{ran}\n" + RACES.format("3 hazards", "1 error", "2 warnings")
    assert verdict(text, "racecheck")["errors"] == 3


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (UNSUPPORTED, 0, "refused: Error: Device not supported"),
        (EARLY, 255, "refused: Error: Target application terminated before first"),
        ("Segmentation fault", 139, "no summary; the process ended with 139"),
        # a summary of a process that never came to its case, and of one that died
        (CLEAN.replace("{ran}", ""), 0, "the case did not run; the process ended with 0"),
        (CLEAN, 139, "the case did not run; the process ended with 139"),
        ("", None, "no end within the limit"),
    ],
)
def test_what_checked_nothing_is_never_clean(text, code, words):
    assert words in verdict(text, code=code)["failed"]


def test_what_is_planted_must_be_found():
    assert "failed" not in verdict(WRITE, op=odd_cases.PLANTED, code=1)
    assert "found nothing" in verdict(CLEAN, op=odd_cases.PLANTED)["failed"]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a stand-in on the PATH that runs what it is given and then prints ``text``."""

    def make(text: str, runs: bool = True) -> Path:
        path = tmp_path / "bin" / sanitize.TOOL
        path.parent.mkdir(exist_ok=True)
        while_running = '"$@"' if runs else ":"
        body = '#!/bin/sh\nwhile [ "$1" != "$PYTHON" ]; do shift; done\n'
        path.write_text(f"{body}{while_running}\ncat <<'END'\n{text}END\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PYTHON", sys.executable)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        return path

    return make


def staged(tmp_path, *options):
    out = tmp_path / "sanitize.json"
    command = [sys.executable, sanitize.__file__, "--out", out, "--device", "cpu", "--dry"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, json.loads(out.read_text())


def test_a_stage_under_a_stand_in(tmp_path, tool):
    tool("========= ERROR SUMMARY: 0 errors\n")
    code, found = staged(tmp_path, "--op", "solver_step", "--tool", "synccheck")
    assert (code, found["status"]) == (0, "ok")
    assert list(found["rows"]) == ["alone/solver_step", "synccheck/solver_step"]
    assert found["rows"]["synccheck/solver_step"]["errors"] == 0


def test_a_missing_tool_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, found = staged(tmp_path, "--op", "solver_step", "--tool", "memcheck")
    assert list(found["rows"])[1] == "memcheck/planted"
    # a dry run is of this program, and does without
    assert (code, found["status"]) == (0, "ok")
    assert "not on the PATH" in found["rows"]["memcheck/solver_step"]["skipped"]
    row = sanitize.row_of("memcheck", "solver_step", torch.device(DEVICE), dry=False)
    assert row["failed"].startswith("refused: compute-sanitizer is not on the PATH")


@pytest.mark.parametrize("op", odd_cases.CASES)
def test_cases_run(op, capsys):
    odd_cases.run(op, torch.device(DEVICE))
    assert odd_cases.finished(op) in capsys.readouterr().out
