"""GPU paths without a GPU: registration, what a compiler sees, and whole clips for a graph.

They run on tensors that have no memory (`fastscore.measure.nodes`), in a process without Triton's
interpreter, which would register other operators than a GPU has.
"""

import pytest
from interpreter import DEVICE
from scripts import answers

OPS = (
    *("norm_act", "norm_act_backward", "tap_norm", "tap_fuse", "tap_fuse_backward", "tap_path"),
    *("bias_add", "edm_inputs", "class_cotangents", "solver_step", "normals"),
)

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there: it runs the real thing")


@pytest.fixture(scope="module")
def found():
    return answers("imagined.py")


@pytest.mark.parametrize("op", OPS)
def test_a_compiler_sees_the_launches_of_an_operation(found, op):
    graph = found["traced"][op]
    assert any("triton_kernel_wrapper" in target for target in graph)
    assert not any("fastscore_triton" in target for target in graph)


def test_faults_are_noticed(found):
    planted = found["planted"]
    assert planted["copy"] == ["_to_copy"]
    assert planted["wait"] == "DataDependentOutputException"
    assert planted["two devices"] == "RuntimeError"
    assert planted["none"] == {"mul": 1}


def test_no_clip_waits_for_the_device_or_copies_from_the_host(found):
    clips = found["trajectories"]
    assert len(clips) == 15
    assert {key.rpartition("/")[2] for key in clips} == {"free", "inpainted"}
    for key, clip in clips.items():
        assert clip["transfers"] == [], key
        assert clip["total"] > 100


def test_fused_kernels_make_fewer_nodes(found):
    def total(backend: str) -> int:
        return sum(
            c["total"] for key, c in found["trajectories"].items() if key.startswith(backend)
        )

    assert total("triton/fp32") < 0.7 * total("reference/fp32")
    steps = found["steps"]
    assert steps["paper/unguided"]["total"] < steps["paper/guided"]["total"] <= 220
    # what an early launch can do anything for (bench/NOTES.md)
    assert steps["paper/guided"]["chained"] == 62


def test_networks_and_trainings_stay_on_the_device(found):
    models = dict(found["models"])
    assert models.pop("program") == [["copy_", "copy_"], []]
    trainings = {f"train {task}/{b}" for task in ("score", "unet") for b in ("reference", "triton")}
    assert trainings < models.keys()
    assert len(models) == 17
    for name, launches in models.items():
        assert launches["transfers"] == [], name
        other = models.get(name.replace("triton", "reference"))
        assert other is None or launches["total"] <= other["total"]
        assert launches["total"] > 40
