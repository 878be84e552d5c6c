"""bias_add, edm_inputs and class_cotangents, for a GPU, against eager PyTorch and torch.compile.

pytest bench/bench_gpu_glue.py --benchmark-only --device cuda [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.operations import case
from fastscore.measure.workloads import Op, suite

NAMES = ("bias_add", "edm_inputs", "class_cotangents")
OPS = [w for w in suite("ops") if isinstance(w, Op) and w.backend == "eager" and w.op in NAMES]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.problem)
def test_glue(compare, device, kernel, with_compile, op):
    if device.type != "cuda":
        pytest.skip("the native backend has no kernel of it")
    found = case(op, device)
    runs = {"eager": found.run("eager")}
    if with_compile:
        runs["compile"] = found.compiled()
    runs[kernel] = found.run(kernel)
    compare(op.problem, runs, found.tolerance, found.traffic)
