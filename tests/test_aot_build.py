"""Kernels compiled ahead of time for chips that are not here: what the build says of them."""

import dataclasses
import json
import subprocess
import sys

import pytest
from fastscore_kernels import build
from fastscore_kernels.gpu import aot, cases, shapes

from fastscore import config

COMMAND = (sys.executable, "-m", "fastscore_kernels.build")


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=3600)


def request(cache, **values):
    everything = {
        "archs": list(build.ARCHS),
        "ops": list(cases.OPS),
        "presets": list(shapes.CLASSIFIERS),
        "dtypes": list(shapes.DTYPES),
        "batches": list(shapes.BATCHES),
        "cache": str(cache),
        "early": False,
    }
    return {**everything, **values}


def check(reports):
    assert [p for r in reports for p in build.problems(r)] == []
    for r in reports:
        assert 0 < r["registers"] <= 255
        assert r["instructions"] > 0
        # a contracted product and sum would round once where the reference rounds twice
        if r["kernel"] in ("solver_step_kernel", "normals_kernel"):
            assert r["fused_fp32"] == 0
            # 1 - 2 s, where the product is exact, four times
            assert r["fused_fp64"] in (0, 4)
        if r["kernel"] in ("all_positions_kernel", "attend_kernel", "project_kernel"):
            assert r["tensor"] > 0, r


def test_shapes_are_those_of_the_presets():
    assert shapes.CLASSIFIERS.keys() == config.CLASSIFIERS.keys() == config.SUBNETS.keys()
    for name, mine in shapes.CLASSIFIERS.items():
        theirs = config.CLASSIFIERS[name]
        assert dataclasses.asdict(mine) == {"channels": theirs.channels, "groups": theirs.groups}
        assert (theirs.n_mels, theirs.frames) == shapes.SAMPLE
        planes = [
            (theirs.n_mels // theirs.patch >> i, theirs.frames // theirs.patch >> i)
            for i in range(len(theirs.channels))
        ]
        assert list(shapes.PLANES) == planes
    for name, mine in shapes.SUBNETS.items():
        theirs = dataclasses.asdict(config.SUBNETS[name])
        assert dataclasses.asdict(mine) == {k: theirs[k] for k in dataclasses.asdict(mine)}


def test_a_sample_of_kernels_fits_a_chip(tmp_path):
    wanted = request(tmp_path, archs=["sm_90"], batches=[1])
    wanted.update(ops=["solver_step", "tap_path", "bias_add", "edm_inputs"])
    wanted.update(presets=["paper"], dtypes=["bfloat16"])
    first = build.build(wanted, 2)
    check(first)
    names = {r["kernel"] for r in first}
    assert names >= {"own_path_kernel", "project_kernel", "attend_kernel", "bias_add_kernel"}
    assert names >= {"edm_inputs_kernel", "solver_step_kernel"}
    # what has been built is found again, and said again
    assert build.build(wanted, 1) == first


def test_kernels_launched_early_touch_no_memory_before_they_have_waited(tmp_path):
    wanted = request(tmp_path, archs=["sm_90"], batches=[1], presets=["paper"], early=True)
    reports = build.build({**wanted, "dtypes": ["bfloat16"]}, 2)
    check(reports)
    assert {r["unwaited"] for r in reports} == {0}
    assert len({r["kernel"] for r in reports}) == 22
    # that it would be noticed
    assert aot._unwaited(["S2R", "LDG.E", "LDS.128", "ACQBULK", "STG.E"]) == 1
    assert aot._unwaited(["LDG.E", "STG.E.128", "EXIT"]) == 2


def test_the_command_reports_and_writes_what_it_built(tmp_path):
    wanted = ("--arch", "sm_80", "--op", "tap_fuse", "--preset", "tiny", "--dtype", "bfloat16")
    file = tmp_path / "figures.json"
    done = run(
        *wanted,
        "--batch",
        "1",
        "--jobs",
        "1",
        "--report",
        "--json",
        str(file),
        "--cache-dir",
        str(tmp_path / "c"),
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(file.read_text())["kernels"]
    check(kernels)
    assert {r["kernel"] for r in kernels} >= {"own_position_kernel", "all_positions_kernel"}
    assert {r["arch"] for r in kernels} == {"sm_80"}
    lines = done.stdout.splitlines()
    assert len(lines) == len(kernels) + 2
    assert lines[0].split()[:5] == ["arch", "kernel", "warps", "registers", "spills"]
    assert lines[-1] == f"{len(kernels)} kernels built, 0 problems"


def test_a_kernel_that_does_not_fit_is_a_problem():
    report = {"arch": "sm_80", "kernel": "k", "label": "l", "spills": 0, "shared": 163 * 1024}
    report["unwaited"] = None
    assert build.problems(report) == []
    assert build.problems({**report, "arch": "sm_90", "shared": 227 * 1024}) == []
    assert "shared memory" in build.problems({**report, "shared": 163 * 1024 + 1})[0]
    assert "3 spill" in build.problems({**report, "spills": 3})[0]
    assert "2 accesses before it waits" in build.problems({**report, "unwaited": 2})[0]
    assert "does not compile: x" in build.problems({**report, "error": "x"})[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--arch", "sm_75"], "sm_75"),
        (["--batch", "0"], "'0'"),
        (["--jobs", "many"], "'many'"),
        (["--json", "/nowhere/x.json"], "/nowhere"),
        (["--cache-dir", "/proc/x"], "/proc/x"),
        (["--early", "--arch", "sm_80"], "sm_80"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, word, capsys):
    with pytest.raises(SystemExit) as exit_:
        build.main(arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("fastscore_kernels.build: ")
    assert word in message
    assert message.count("\n") == 1


@pytest.mark.slow
def test_every_kernel_fits_every_chip(tmp_path):
    check(build.build(request(tmp_path), 2))
