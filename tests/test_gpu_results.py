"""Results of the GPU campaign: put together, set against the goals, and shown."""

import json

import pytest

RECORD = {
    "commit": {"id": "0123456789abcdef", "dirty": False},
    "versions": {"torch": "2.11.0"},
    "gpu": {"name": "NVIDIA H100 80GB HBM3"},
    "processor": {"model": "CPU", "cores": 16},
    "threads": 16,
    "load": [0.5, 0, 0],
    "warnings": [],
}


@pytest.fixture(scope="module")
def results(bench):
    return bench("gpu_results")


def step(model, guided, mode, precision, seconds, status="ok"):
    kind = "guided" if guided else "unguided"
    name = f"step/{model}/b1/{kind}/triton/{mode}" + ("" if precision == "fp32" else "/bf16")
    workload = {"model": model, "batch": 1, "backend": "triton", "mode": mode}
    workload |= {"precision": precision, "guided": guided, "command": f"bench {name}"}
    time = None if status != "ok" else {"median": seconds, "p20": seconds, "p80": seconds}
    return {"name": name, "workload": workload, "status": status, "time": time, "rounds": [1] * 99}


def raced(warm, cold):
    """A row of bench/op_race.py: ours against the best other, by the state of the caches."""
    return {"ratio": {"warm": {"to": "eager", "median": warm}, "cold": {"median": cold}}}


@pytest.fixture
def folder(tmp_path):
    """A folder of stages with made-up figures."""
    head = {"provenance": RECORD, "command": "python bench/x.py"}
    one = {"format": "fastscore-stage", "version": 1, "status": "ok", "dry": False, **head}
    steps = [
        step("paper", True, "graphs", "fp32", 400e-6),
        step("paper", True, "graphs", "bf16", 120e-6),
        step("paper", False, "graphs", "bf16", 100e-6),
        # faster, but wrong
        step("paper", True, "compile", "bf16", 10e-6, status="failed"),
        step("unet-paper-equal-total", True, "graphs", "bf16", 240e-6),
    ]
    files = {
        "check": one | {"rows": {"kernels": {"passed": 7, "skipped": 1, "failure_count": 0}}},
        "step-1": {"format": "fastscore-bench", "version": 1, "rows": steps, **head},
        "serving": one
        | {
            "rows": {
                "latency/digits/a": {"latency": {"p50": 2e-3, "p99": 4e-3}},
                "latency/digits/b": {"latency": {"p50": 1e-3, "p99": 2.5e-3}},
                "clips/paper/a": {"clips": 2048, "best": 3.0, "clips_per_second": 683.0},
                # another number of clips is another question
                "clips/paper/b": {"clips": 8, "best": 0.1, "clips_per_second": 80.0},
                "clips/digits/a": {"failed": "RuntimeError: no"},
            }
        },
        "costs": {
            "format": "fastscore-headline",
            "memory": {
                "rows": {
                    "scoresubnet/guided": {"64": {"weights": {"total": 100}, "tensor_peak": 200}},
                    "unet-equal-total/guided": {
                        "64": {"weights": {"total": 200}, "tensor_peak": 200}
                    },
                },
                **head,
            },
        },
        "ops": one | {"rows": {"a": raced(1.5, 1.2), "b": raced(1.1, 0.9), "c": {"failed": "no"}}},
    }
    path = tmp_path / "results"
    path.mkdir()
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def test_goals_take_the_best_row_that_is_right(results, folder):
    found = {g.name: g for g in results.goals(results.read(folder))}
    step = found["guided step of `paper`, batch 1"]
    assert step.figure == pytest.approx(120)
    assert (step.met, step.command) == (1, "bench step/paper/b1/guided/triton/graphs/bf16")
    assert found["the same over an unguided one"].figure == pytest.approx(1.2)
    soon = found["label to 1.02 s of waveform, `digits`, 8 evaluations, p99"]
    assert (soon.figure, soon.met) == (pytest.approx(2.5), 2)
    assert found["2048 guided clips of `paper`, vocoder included"].figure == 3.0
    assert found["2048 guided clips of `digits`, vocoder included"].figure is None
    memory = found["peak memory at batch 64 over the pair of equal total size"]
    assert memory.figure == pytest.approx(0.75)
    assert found["shapes of operations slower than the best of the others"].figure == 1


def test_goals_without_results_are_not_measured(results, tmp_path):
    assert all(g.figure is None and g.met == 0 for g in results.goals({}))
    (tmp_path / "step-1.json").write_text("{")
    with pytest.raises(ValueError, match=r"step-1\.json is not JSON"):
        results.read(tmp_path)


def test_what_is_kept_is_by_gpu_and_commit_and_grows(results, folder, tmp_path):
    stages = results.read(folder)
    path = results.kept({"check": stages["check"]}, tmp_path)
    assert path == tmp_path / "h100" / "0123456789abcdef.json"
    assert results.kept({"step-1": stages["step-1"]}, tmp_path) == path
    kept = json.loads(path.read_text())["stages"]
    assert set(kept) == {"check", "step-1"}
    # raw rounds are hundreds a row
    assert all("rounds" not in row for row in kept["step-1"]["rows"])
    other = json.loads(json.dumps(stages))
    other["check"]["provenance"]["commit"]["dirty"] = True
    with pytest.raises(ValueError, match="results are of 2 commits"):
        results.kept(other, tmp_path)
    other["check"]["provenance"]["gpu"]["name"] = "NVIDIA H200"
    with pytest.raises(ValueError, match="come from 2 GPUs"):
        results.kept(other, tmp_path)


def test_the_page_and_the_readme_show_them(bench, results, folder, tmp_path):
    gpu_page = bench("gpu_page")
    text = f"before\n{gpu_page.BEGIN}\nold\n{gpu_page.END}\nafter\n"
    empty = gpu_page.readme(text, tmp_path / "none")
    assert "No GPU figures exist yet" in empty
    assert gpu_page.section(tmp_path / "none") == [
        "Not measured: `bench/results/STATUS.md`, [gpu.md](gpu.md)."
    ]
    results.kept(results.read(folder), tmp_path)
    page = "\n".join(gpu_page.section(tmp_path))
    assert "7 passed, 0 failed" in page
    assert "120 us" in page
    assert "240 (2.00x)" in page
    assert "failed: RuntimeError: no" in page
    # a mark that is met is in bold, others are not
    assert "**150**, 80, 33" in page
    shown = gpu_page.readme(text, tmp_path)
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert "On one H100" in shown
    assert "old" not in shown
    assert gpu_page.readme(shown, tmp_path) == shown
    with pytest.raises(ValueError, match="put them back"):
        gpu_page.readme("no marks", tmp_path)


def test_without_tests_nothing_counts(bench, results, folder, tmp_path):
    gpu_page = bench("gpu_page")
    stages = results.read(folder)
    del stages["check"]
    results.kept(stages, tmp_path)
    assert "nothing below counts" in "\n".join(gpu_page.section(tmp_path))
