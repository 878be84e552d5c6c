"""solver_step with its noise, and normals, against eager PyTorch and torch.compile.

The eager step draws the same counter-based noise.

pytest bench/bench_solver_step.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.operations import case
from fastscore.measure.workloads import Op, suite

OPS = [w for w in suite("ops") if isinstance(w, Op) and w.backend == "eager"]


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.op == "solver_step"], ids=lambda op: op.problem
)
def test_solver_step(compare, device, kernel, with_compile, op):
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    if with_compile:
        runs["compile"] = found.compiled()
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.op == "solver_step_without_noise"], ids=lambda op: op.problem
)
def test_solver_step_without_noise(compare, device, kernel, with_compile, op):
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    if with_compile:
        runs["compile"] = found.compiled()
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)


@pytest.mark.parametrize("op", [op for op in OPS if op.op == "normals"], ids=lambda op: op.problem)
def test_normals(compare, device, kernel, op):
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)
