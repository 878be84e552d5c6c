"""Reading a trace of Kineto's: a GPU's, written by hand in its format, and damaged ones."""

import gzip
import json

import pytest

from fastscore.measure.roofline import Level, Peaks
from fastscore.profiler import events, groups, losses, phases, words
from fastscore.profiler.groups import Gap, Gaps, Group
from fastscore.profiler.report import timeline
from fastscore.profiler.work import Work

HOST = {"pid": 900, "tid": 901}
# what no phase within the run claims
REQUEST = phases.RUN.removeprefix(phases.PHASE)
CONV = "layer: subnet.stem forward x1 40 x 32"
LEDGER = {
    CONV: Work(
        *("3x3 convolution", "subnet", "subnet.stem", "forward", "40 x 32", 1),
        *(2_000_000, 400_000, "fp32"),
    )
}


def span(category, name, ts, dur, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, **HOST, "args": args}


def kernel(name, ts, dur, correlation, category="kernel", **args):
    on = {"device": 0, "context": 1, "stream": 7, "correlation": correlation}
    more = {"grid": [40, 1, 1], "block": [128, 1, 1], "registers per thread": 64}
    found = span(category, name, ts, dur, **on, **(more if category == "kernel" else {}), **args)
    return {**found, "pid": 0, "tid": 7}


def launch(ts, correlation, name="cudaLaunchKernel", category="cuda_runtime"):
    return span(category, name, ts, 4, correlation=correlation, cbid=211)


def gpu_trace():
    """Two evaluations launched one by one, each of a convolution and of a Triton kernel, and a
    graph of two kernels; copies at the end. The host runs ahead of the GPU."""
    found = [span("user_annotation", phases.RUN, 1000, 400)]
    for i, kind in enumerate(("guided", "unguided")):
        at = 1010 + 60 * i
        found += [
            span("cpu_op", f"{phases.EVALUATION}{kind}", at, 50),
            span("user_annotation", phases.PHASE + phases.SUBNET, at + 1, 30),
            span("cpu_op", CONV, at + 2, 20),
            span(
                *("cpu_op", "aten::conv2d", at + 3, 15),
                **{"Input Dims": [[1, 4, 40, 32]], "Input type": ["float"], "External id": i},
            ),
            launch(at + 5, 10 + i),
            kernel("sm80_xmma_fprop_implicit_gemm_f32", 1100 + 100 * i, 40, 10 + i),
            launch(at + 35, 20 + i, "cuLaunchKernel", "cuda_driver"),
            kernel("_norm_act_kernel", 1150 + 100 * i, 10, 20 + i),
        ]
    found += [
        span("user_annotation", phases.PHASE + phases.SOLVER, 1200, 20),
        launch(1205, 30, "cudaGraphLaunch"),
        kernel("_norm_act_kernel", 1300, 10, 30),
        kernel("void at::native::elementwise_kernel<128, 2>(int)", 1310, 5, 30),
        span("cuda_runtime", "cudaMemcpyAsync", 1250, 4, correlation=40),
        kernel("Memcpy DtoH (Device -> Pinned)", 1320, 8, 40, "gpu_memcpy", bytes=65536),
        # what was on the GPU before the run began is not of it
        kernel("_warm_up", 900, 50, 5),
        # kernels of no known launch, as of another library
        kernel("stray", 1330, 2, 99),
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 0, "args": {"name": "x"}},
        {
            **{"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1020, **HOST},
            "args": {"Bytes": 4096, "Device Type": 1, "Device Id": 0, "Total Allocated": 4096},
        },
    ]
    return {"schemaVersion": 1, "traceEvents": found}


@pytest.fixture(scope="module")
def trace():
    return events.parse(gpu_trace(), phases.RUN)


class TestGpu:
    def test_kernels_belong_to_whoever_launched_them(self, trace):
        found = {(i.name[:12], i.start): i for i in trace.items}
        conv = found["sm80_xmma_fp", 200.0]
        assert conv.phase == phases.SUBNET
        assert conv.layer == CONV
        assert (conv.op, conv.evaluation) == ("aten::conv2d", 1)
        # launched by the driver, after the layer and its phase, within the evaluation
        norm = found["_norm_act_ke", 150.0]
        assert (norm.phase, norm.layer, norm.evaluation, norm.graph) == (REQUEST, "", 0, False)
        assert found["stray", 330.0].phase == ""

    def test_kernels_of_a_graph_are_listed_and_told_apart(self, trace):
        graph = [i for i in trace.items if i.graph]
        assert [i.us for i in graph] == [10.0, 5.0]
        assert {i.phase for i in graph} == {phases.GRAPH}
        assert (trace.launches, trace.graph_launches) == (5, 1)

    def test_the_run_lasts_until_its_last_kernel(self, trace):
        assert trace.on_device
        assert trace.us == 400.0
        assert len(trace.items) == 8
        assert trace.allocations == [events.Allocation(20.0, 4096, "cuda")]

    def test_gaps_are_the_times_the_gpu_idles(self, trace):
        found = groups.gaps(trace)
        # 140..150, 160..200, 240..250, 260..300, 315..320, 328..330
        assert found.total == pytest.approx(10 + 40 + 10 + 40 + 5 + 2)
        assert found.count == 6
        assert (found.longest[0].us, found.longest[0].before) == (40.0, words.plain("norm_act"))

    def test_a_timeline_shows_kernels_not_launches(self, trace):
        rows, left_out = timeline(trace)
        assert left_out == 0
        assert [(r.words, r.start) for r in rows[:3]] == [
            ("before", 0.0),
            ("1 guided", 100.0),
            ("2 unguided", 200.0),
        ]
        assert rows[1].phases == [(phases.SUBNET, 0.0, 40.0), (REQUEST, 50.0, 60.0)]

    def test_work_and_bytes_reach_the_kernels(self, trace):
        found = {g.name: g for g in groups.by_kernel(trace.items, LEDGER)}
        conv = found["sm80_xmma_fprop_implicit_gemm_f32"]
        assert (conv.macs, conv.bytes, conv.launches) == (4_000_000, 800_000, 2)
        assert found["Memcpy DtoH (Device -> Pinned)"].bytes == 65536
        assert found["_norm_act_kernel"].bytes is None
        place = groups.by_place(trace.items, LEDGER)[0]
        assert place.words == "3×3 convolution of ScoreSubnet at 40 × 32"  # noqa: RUF001


class TestFiles:
    def test_plain_and_packed_traces_are_read(self, tmp_path):
        text = json.dumps(gpu_trace()).encode()
        for name, data in (("a.json", text), ("a.json.gz", gzip.compress(text))):
            (tmp_path / name).write_bytes(data)
            assert events.read(tmp_path / name) == gpu_trace()

    @pytest.mark.parametrize(
        "data", [b"", b"{", b"[]", b'{"events": []}', b"\x1f\x8b cut", gzip.compress(b"{}")[:9]]
    )
    def test_other_files_are_refused(self, tmp_path, data):
        (tmp_path / "t.json").write_bytes(data)
        with pytest.raises(ValueError, match="not a Kineto trace"):
            events.read(tmp_path / "t.json")

    def test_a_trace_without_the_run_is_refused(self):
        with pytest.raises(ValueError, match="cut short"):
            events.parse({"traceEvents": [span("cpu_op", "aten::add", 0, 1)]}, phases.RUN)


class TestLosses:
    PEAKS = Peaks("cpu", 1, (Level("memory", None, 2**26, 1e10, 1e10),), {"fp32": 1e11})

    def test_a_bound_is_the_larger_of_both(self):
        group = Group("x", us=100.0, calls=2)
        group.pieces[1e6, 10_000, "fp32"] = 2
        found = losses.bound(group, self.PEAKS)
        assert (found.us, found.name) == (pytest.approx(20.0), "compute fp32")
        group.pieces[0.0, 1_000_000, "fp32"] = 1
        found = losses.bound(group, self.PEAKS)
        assert (found.us, found.name) == (pytest.approx(120.0), "bandwidth memory")

    def test_nothing_is_said_of_unknown_work(self):
        group = Group("x", us=100.0, calls=1)
        group.pieces[0.0, None, "fp32"] = 1
        assert losses.bound(group, self.PEAKS) is None
        assert losses.losses([group], Gaps(0.0, 0), 100.0, 0.0, self.PEAKS) == []

    def test_the_largest_loss_comes_first_and_says_what_it_is(self):
        groups_ = []
        for size, us in (("40 x 32", 6000.0), ("20 x 16", 1000.0)):
            group = Group("c", family="3x3 convolution of ScoreSubnet", size=size, us=us, calls=10)
            group.pieces[1e7, 1000, "fp32"] = 5
            groups_.append(group)
        gaps = Gaps(3000.0, 30, [], [Gap(0.0, 100.0, "a", "b", "")])
        first, second = losses.losses(groups_, gaps, 10_000.0, 2000.0, self.PEAKS)
        assert first.saved == pytest.approx(7000.0 - 2 * 500.0)
        assert "70 % of the run, at 14 % of the bound (compute fp32)" in first.sentence
        assert "Most of the loss is at 40 x 32: 6.00 ms" in first.sentence
        # what the profiler added counts against the gaps
        assert second.saved == pytest.approx(1000.0)
        assert "between 1.00 ms and 3.00 ms" in second.sentence


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("winograd", "Winograd"),
        ("_solver_step_kernel", "solver step"),
        ("aten::add_", "sums and products"),
        ("aten::view", "another way"),
        ("triton_poi_fused_add_3", "fused by the compiler"),
        ("void cutlass::Kernel2<sgemm>(Params)", "matrix product"),
        ("void my::strange<int>(float*)", "my::strange"),
    ],
)
def test_plain_words(name, expected):
    assert expected in words.plain(name)


def test_bytes_of_operators():
    args = {"Input Dims": [[2, 8], [8]], "Input type": ["float", "float"]}
    assert words.operator_bytes("aten::add", args) == 4 * (16 + 8 + 16)
    assert words.operator_bytes("aten::view", args) == 0
    assert words.operator_bytes("aten::conv2d", args) is None
    joined = {"Input Dims": [[[2, 8], [2, 4]], []], "Input type": ["TensorList", "Scalar"]}
    assert words.operator_bytes("aten::cat", joined) == 2 * 4 * (16 + 8)
