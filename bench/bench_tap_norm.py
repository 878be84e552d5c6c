"""tap_norm against the same in eager PyTorch and torch.compile, at every tap of the presets.

pytest bench/bench_tap_norm.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.operations import case
from fastscore.measure.workloads import Op, suite

OPS = [w for w in suite("ops") if isinstance(w, Op) and w.backend == "eager"]


@pytest.mark.parametrize("op", [op for op in OPS if op.op == "tap_norm"], ids=lambda op: op.problem)
def test_tap_norm(compare, device, kernel, with_compile, op):
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    if with_compile:
        runs["compile"] = found.compiled()
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)
