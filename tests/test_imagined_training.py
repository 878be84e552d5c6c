"""Training on a GPU without one: every task's step runs there, and waits for nothing.

Steps of the published sizes on tensors that have no memory, in a process without Triton's
interpreter (`imagined_training`). On a GPU tests/test_train_loop.py trains for real.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import DEVICE

HERE = Path(__file__).parent
TASKS = ("classifier", "score", "unet", "vocoder/hifigan-v1", "vocoder/digits")
FUSED = ("classifier", "score", "unet")

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there: it runs the real thing")


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, HERE / "imagined_training.py"],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", [*TASKS, *(f"{name}/triton" for name in FUSED)])
def test_a_step_neither_copies_from_the_host_nor_waits(found, name):
    step = found[name]
    assert step["transfers"] == []
    assert step["total"] > 500
    # the networks compute in bf16, and the weights are stepped and averaged
    assert step["kernels"]["_to_copy"] > 50
    assert step["kernels"]["linalg_vector_norm"] > 50


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_serve_in_training(found, name):
    plain, fused = found[name]["kernels"], found[f"{name}/triton"]["kernels"]
    for op in ("native_group_norm", "native_group_norm_backward"):
        # attention keeps PyTorch's own
        assert fused.get(op, 0) < plain[op] / 2
    assert found[f"{name}/triton"]["total"] < found[name]["total"]
