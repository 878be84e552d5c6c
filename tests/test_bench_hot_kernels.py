"""A step taken apart: traces of graphs, gaps, the account to the bound, and Nsight's tables."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastscore.measure.roofline import Level, Peaks
from fastscore.measure.work import Op, Work

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "bench")
    account, nsight, hot_kernels = (
        importlib.import_module(name) for name in ("kernel_account", "nsight", "hot_kernels")
    )

CONV = "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)"


def event(category, name, ts, dur, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": args}


def trace():
    """Two whole replays of three kernels, one that lost a kernel, and work of no graph."""
    found = [event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 10, 5, 1)]
    found += [event("cuda_runtime", "cudaMemcpyAsync", 5, 2, 1)]
    for correlation, at in ((7, 100), (8, 200), (9, 300)):
        found.append(event("cuda_runtime", "cudaGraphLaunch", at - 10, 5, correlation))
        # in another order than they ran
        found.append(event("kernel", ADD, at + 30, 10, correlation))
        found.append(event("kernel", CONV, at, 20, correlation))
        if correlation < 9:
            found.append(event("kernel", "norm_act_kernel", at + 35, 15, correlation))
    return {"traceEvents": found}


def test_replays_are_those_of_a_graph_and_whole():
    found = account.replays(trace())
    assert [[ran.name for ran in one] for one in found] == [[CONV, ADD, "norm_act_kernel"]] * 2


def test_a_trace_of_neither_is_refused():
    with pytest.raises(ValueError, match="no replay of a graph"):
        account.replays({"traceEvents": [event("cpu_op", "aten::add", 0, 1)]})


def test_on_a_cpu_outermost_operators_of_marked_calls_count():
    found = account.replays(
        {
            "traceEvents": [
                event("user_annotation", account.CALL, 0, 100),
                event("cpu_op", "aten::conv2d", 10, 30),
                event("cpu_op", "aten::convolution", 12, 20),
                event("cpu_op", "aten::add", 50, 5),
                event("cpu_op", "aten::mul", 150, 5),
            ]
        }
    )
    assert [[ran.name for ran in one] for one in found] == [["aten::conv2d", "aten::add"]]


def test_time_by_kernel_and_gaps():
    found = account.replays(trace())
    rows, gaps = account.kernels(found), account.idle(found)
    assert [(r["name"], r["us"], r["count"]) for r in rows] == [
        *((CONV, 20.0, 1.0), ("norm_act_kernel", 15.0, 1.0), (ADD, 10.0, 1.0))
    ]
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert (gaps["span_us"], gaps["sum_us"], gaps["idle_us"]) == (50.0, 45.0, 10.0)
    # the last two kernels run side by side for 5 us
    assert (gaps["overlap_us"], gaps["gaps"]) == (5.0, 1.0)
    assert gaps["longest"] == [{"after": CONV, "before": ADD, "us": 10.0, "count": 1.0}]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (CONV, account.PRODUCTS),
        ("sm80_xmma_dgrad_implicit_gemm_tf32", account.PRODUCTS),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", account.PRODUCTS),
        ("norm_act_backward_apply_kernel", account.NORMS),
        ("tap_moments_kernel", account.TAPS),
        ("project_kernel", account.TAPS),
        ("attend_kernel", account.TAPS),
        ("own_path_kernel", account.TAPS),
        ("Memcpy DtoD (Device -> Device)", account.COPIES),
        ("void cudnn::ops::nchwToNhwcKernel<__half, float>(int)", account.COPIES),
        ("void at::native::CatArrayBatchedCopy<int>(int*)", account.COPIES),
        (ADD, account.POINTWISE),
        ("void at::native::reduce_kernel<512, 1>(int)", account.POINTWISE),
        ("something_else", account.OTHERS),
    ],
)
def test_groups(name, group):
    assert account.group(name) == group


def test_every_kernel_of_ours_has_a_group():
    ours = hot_kernels.our_kernels()
    assert len(ours) > 12
    assert {name for name in ours if account.group(name) == account.OTHERS} == {
        *("solver_step_kernel", "normals_kernel")
    }


def test_the_lines_of_an_account_add_up():
    level = Level("memory", None, 2**20, 1e9, 1e9)
    peaks = Peaks("cuda", 1, (level,), {"bf16": 1e9})
    ops = tuple(
        Op("m", "subnet", name, macs, macs, moved, 0, "bf16")
        for name, macs, moved in (("conv", 8000, 1000), ("norm_act", 0, 6000), ("tap_path", 0, 0))
    )
    done = Work(ops, 1000, 1000)
    found = account.replays(trace())
    rows, gaps = account.kernels(found), account.idle(found)
    result = account.account(rows, gaps, done, peaks)
    lines = {line["line"]: line for line in result["lines"]}
    # 8000 products and 6000 bytes at 1e9 a second
    assert lines[account.PRODUCTS]["must_us"] == pytest.approx(8)
    assert lines[account.PRODUCTS]["over_us"] == pytest.approx(20 - 8)
    assert lines[account.NORMS]["over_us"] == pytest.approx(15 - 6)
    assert lines[account.POINTWISE]["over_us"] == pytest.approx(10)
    assert lines["operations one by one"]["over_us"] == pytest.approx(6)
    assert sum(line["over_us"] for line in result["lines"]) == pytest.approx(result["gap_us"])
    assert result["gap_us"] == pytest.approx(50 - 8)
    assert result["bound_name"] == "compute bf16"


NCU = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "norm_act_kernel" - 0: 0%....50%....100% - 18 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","dram__bytes.sum.per_second","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","byte/second","ns","register/thread","%","%","%"
"0","4711","python3.12","127.0.0.1","norm_act_kernel","1","7","(128, 1, 1)","(24, 1, 1)","0",\
"9.0","1,234,567,890.5","5,312","64","23.4","0","1.5"
"1","4711","python3.12","127.0.0.1","norm_act_kernel","1","7","(128, 1, 1)","(8, 1, 1)","0",\
"9.0","34,567","4,000","64","12","0","n/a"
"""
REFUSED = (
    "==PROF== Connected to process 99\n==ERROR== ERR_NVGPUCTRPERM - The user does not have "
    "permission to access NVIDIA GPU Performance Counters on the target device 0.\n"
)


def test_figures_of_nsight_compute():
    first, second = nsight.figures(NCU, 0)["norm_act_kernel"]
    assert first["memory_bytes"] == {"value": 1234567890.5, "unit": "byte/second"}
    assert first["time"] == {"value": 5312.0, "unit": "ns"}
    assert (first["registers"]["value"], first["occupancy"]["value"]) == (64.0, 23.4)
    assert first["tensor_share"]["value"] == 1.5
    assert second["tensor_share"]["value"] == 0.0
    # what this version has no column for is not made up
    assert "sm_share" not in first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (REFUSED, "ERR_NVGPUCTRPERM - The user does not have permission"),
        ("==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        ("", "it ended with 3"),
        (NCU[: NCU.index('"0","4711"')], "its table is empty"),
    ],
)
def test_a_refusal_says_why(text, words):
    with pytest.raises(ValueError, match=words):
        nsight.figures(text, 3)


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Put a stand-in for ncu on the PATH that says ``text``."""

    def make(text: str) -> None:
        path = tmp_path / nsight.TOOL
        path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}END\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return make


def test_rows_of_nsight_compute(ncu):
    ours = {"norm_act_kernel", "own_path_kernel"}
    rows = {
        f"b{batch}": {"kernels": [{"name": n, "share": s} for n, s in shares.items()]}
        for batch, shares in (
            (1, {"norm_act_kernel": 0.1, CONV: 0.8}),
            (64, dict.fromkeys(ours, 0.2)),
        )
    }
    assert hot_kernels.hottest(rows, ours) == dict.fromkeys(sorted(ours), 64)
    assert "not on the PATH" in hot_kernels.through_ncu("norm_act_kernel", "paper", 1)["refused"]
    ncu(NCU)
    assert len(hot_kernels.through_ncu("norm_act_kernel", "paper", 1)["launches"]) == 2
    ncu(REFUSED)
    assert "PERM" in hot_kernels.through_ncu("norm_act_kernel", "paper", 1)["refused"]


def test_a_dry_run_of_the_stage(tmp_path):
    out = tmp_path / "hot.json"
    command = [sys.executable, hot_kernels.__file__, "--out", out, "--device", "cpu", "--dry"]
    run = subprocess.run(
        [*command, "--ncu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(out.read_text())
    assert (found["status"], list(found["rows"])) == ("ok", ["b1"])
    row = found["rows"]["b1"]
    assert row["nodes"]["predicted"]["total"] > 100
    assert row["nodes"]["predicted"]["transfers"] == []
    assert row["gaps"]["replays"] == 3
    names = [line["line"] for line in row["account"]["lines"]]
    assert names[: len(account.GROUPS)] == list(account.GROUPS)
