"""norm_act and its VJP against eager PyTorch and torch.compile, at every shape of the presets.

pytest bench/bench_norm_act.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.operations import case
from fastscore.measure.workloads import Op, suite

OPS = [w for w in suite("ops") if isinstance(w, Op) and w.backend == "eager"]


@pytest.mark.parametrize("op", [op for op in OPS if op.op == "norm_act"], ids=lambda op: op.problem)
def test_norm_act(compare, device, kernel, with_compile, op):
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    if with_compile:
        runs["compile"] = found.compiled()
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.op == "norm_act_vjp"], ids=lambda op: op.problem
)
def test_norm_act_vjp(compare, device, kernel, with_compile, op):
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    if with_compile:
        runs["compile"] = found.compiled()
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)
