"""What torch.compile makes of a step on the Triton kernels, on a GPU that is not there.

Dynamo, AOTAutograd and Inductor run as they would on an H100, on tensors without memory; nothing of
what they write is run.
"""

import pytest
from interpreter import DEVICE
from scripts import answers

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there: it runs the real thing")
OURS = {"norm_act_kernel", "norm_act_backward_kernel", "own_path_kernel", "attend_kernel"}
# as a step launches them: the pull-back of a classifier alone, and of both where it is guided
BACKWARD = {"bf16": 7, "tf32": 5}


@pytest.fixture(scope="module", params=["bf16", pytest.param("tf32", marks=pytest.mark.slow)])
def found(request):
    """A guided step in bf16; an unguided one where fp32 products are TF32's."""
    guidance = ["--unguided"] if request.param == "tf32" else []
    return request.param, answers("imagined_compiler.py", "small", request.param, *guidance)


def test_a_step_is_one_graph_compiled_once(found):
    _, written = found
    assert written["compilations"] == 1
    assert written["shape"] == [1, 1, 16, 24]


def test_the_compiler_sees_launches_not_operations_of_ours(found):
    precision, written = found
    assert written["operators"]["triton_kernel_wrapper_mutation"] >= 20
    assert not any("fastscore" in name for name in written["operators"])
    assert set(written["kernels"]) >= OURS
    assert written["kernels"]["norm_act_backward_kernel"] == BACKWARD[precision]


def test_nothing_comes_from_the_host_or_goes_there(found):
    _, written = found
    transfers = {"_to_copy", "copy_", "device_put", "_local_scalar_dense", "item"}
    assert not transfers & {part for name in written["operators"] for part in name.split(".")}
    # a number that came as fp64 would be computed with as such
    assert written["double"] == []


def test_the_compiler_adds_no_kernel_that_only_fills(found):
    _, written = found
    # the weight of guidance that there is none of
    assert [name for name in written["fills"] if "zeros_like" not in name] == []


@pytest.mark.slow
def test_a_compiled_step_is_fewer_nodes():
    written = answers("imagined_compiler.py", "paper", "bf16")
    # 220 where it is not compiled, as tests/test_imagined_gpu.py counts them
    assert written["total"] <= 209


@pytest.mark.slow
def test_all_that_the_compiler_writes_compiles_for_a_gpu():
    written = answers("imagined_compiler.py", "small", "bf16", "--build")
    assert set(written["built"]) >= OURS
    assert len(written["built"]) > 20
