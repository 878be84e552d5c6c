"""Named workloads: what a name means does not change, and each has a builder and an answer."""

import hashlib
import json

import pytest
import torch

from fastscore.engine import Rerun
from fastscore.measure import operations, subjects, workloads
from fastscore.measure.models import MODELS, VOCODERS, score_network, size
from fastscore.measure.timing import WrongAnswerError, check_equal
from fastscore.measure.workloads import Op, Step, chosen, grouped, suite

CPU = torch.device("cpu")

# a digest of every name with its description. A name must keep its meaning: where one of these
# changes, give what is new a new name, and only then write down the new digest
MEANINGS = {
    "ops": "0271eff52c9459f6",
    "step": "c87b7a6d34346a2c",
    "loop": "e46095ee02b3b4e7",
    "vocoder": "2deee0fd7858f1cc",
    "end-to-end": "8519024ade4d08c9",
}


def digest(name: str) -> str:
    described = {w.name: w.describe() for w in suite(name)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", workloads.SUITES)
def test_a_name_keeps_its_meaning(name):
    assert digest(name) == MEANINGS[name]


@pytest.mark.parametrize("name", workloads.SUITES)
def test_names_are_different_and_say_where_they_belong(name):
    names = [w.name for w in suite(name)]
    assert len(set(names)) == len(names)
    assert all(n.startswith(f"{name}/") for n in names)
    # plain values, as they come back from a file
    described = [w.describe() for w in suite(name)]
    assert json.loads(json.dumps(described)) == described


def test_a_model_stands_beside_its_baselines():
    group = grouped("step")["digits/b8/guided"]
    assert {w.model for w in group} == set(workloads.TINY)
    assert {(w.batch, w.guided) for w in group} == {(8, True)}
    assert {m for w in suite("step") for m in (w.model,)} <= set(MODELS)
    assert {w.model for w in suite("vocoder")} <= set(VOCODERS)


def test_a_cpu_is_not_asked_for_what_only_a_gpu_can():
    reasons = {w.name: w.only_on_gpu() for w in suite("step")}
    assert reasons["step/digits/b1/guided/native"] == ""
    assert reasons["step/digits/b1/guided/native/compile"] == ""
    assert "GPU" in reasons["step/digits/b1/guided/triton/graphs"]
    assert "CUDA graphs" in reasons["step/digits/b1/guided/reference/compiled-graphs"]
    assert "batch 64" in reasons["step/digits/b64/guided/native"]


@pytest.mark.parametrize(
    ("only", "names"),
    [
        # in full, though others begin like it
        (["step/digits/b1/guided/native"], ["step/digits/b1/guided/native"]),
        (["*/b1/unguided/native/bf16", "paper/b8/guided/triton/graphs/bf16"], None),
    ],
)
def test_rows_are_chosen_by_name_by_pattern_or_by_part(only, names):
    found = [w.name for w in chosen("step", only)]
    if names is not None:
        assert found == names
    else:
        assert len(found) == 6 + 1
        assert found == [w.name for w in suite("step") if w.name in found]


def test_what_is_unknown_is_named():
    with pytest.raises(ValueError, match="suite 'stepp' is unknown; choose one of ops, step"):
        suite("stepp")
    with pytest.raises(ValueError, match="no row of suite step is named 'step/digits/b3'"):
        chosen("step", ["step/digits/b3"])


def tiny(name: str) -> Op:
    fused = {"fused": 8, "heads": 2} if name in ("tap_fuse", "tap_path") else {}
    return Op(1, "eager", name, 8, 4, 4, 4, **fused)


@pytest.mark.parametrize("name", list(operations._CASES))
@torch.no_grad()
def test_every_operation_has_a_case_whose_answers_agree(name, backend):
    case = operations.case(tiny(name), CPU)
    check = check_equal(
        {"eager": case.run("eager")(), backend: case.run(backend)()}, case.tolerance
    )
    assert check.error <= check.limit
    # operands built anew are the same
    again = operations.case(tiny(name), CPU)
    assert all(
        torch.equal(a, b)
        for a, b in zip(case.arguments, again.arguments, strict=True)
        if isinstance(a, torch.Tensor)
    )


@pytest.mark.parametrize("dtype", operations.DTYPES, ids=str)
@pytest.mark.parametrize("name", list(operations._CASES))
@torch.no_grad()
def test_every_operation_is_near_the_exact_answer_in_every_dtype(name, dtype, backend):
    case = operations.case(tiny(name), CPU, dtype)
    exact = operations.exact(tiny(name), CPU, dtype)
    runs = {"eager": case.run("eager"), backend: case.run(backend)}
    checks = {n: check_equal({"exact": exact, n: run()}, case.tolerance) for n, run in runs.items()}
    floats = [t for t in case.arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
    # what is not drawn, and what is fp32 whatever the networks compute in
    if name not in ("normals", "edm_inputs", "class_cotangents"):
        assert dtype in {t.dtype for t in floats}
    if dtype == torch.bfloat16 and name in ("norm_act", "norm_act_vjp", "tap_norm", "tap_fuse"):
        # the answer is of the rounded operands, but not rounded itself
        assert exact[0].dtype == torch.float64
        assert checks["eager"].error > 1e-5
    # operands of another seed are others, of the same kind
    other = operations.case(tiny(name), CPU, dtype, seed=1)
    if name != "normals":
        with pytest.raises(WrongAnswerError):
            check_equal({"exact": exact, "other": other.run("eager")()}, case.tolerance)


def test_a_dtype_that_is_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"float16 are not measured; use float32 or bfloat16"):
        operations.case(tiny("norm_act"), CPU, torch.float16)


@pytest.mark.parametrize("model", ["taps", "pair"])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_a_step_is_checked_against_other_code(small, model, guided):
    step = Step(2, "reference", model, guided=guided)
    against, answer = subjects.expected(step, CPU)
    assert against == ("the reference in another batch" if (model, guided) == ("pair", False)
                       else "autograd")  # fmt: skip
    built = subjects.build(step, CPU)
    tolerance = subjects.tolerance(step, CPU)
    assert check_equal({against: answer, "it": built.run()}, tolerance).limit > 0
    # a wrong strength is a wrong answer
    if guided:
        net = built.modules[0]
        x, sigma, label, gamma = subjects.step_arguments(2, True, CPU, net.shape)
        with pytest.raises(WrongAnswerError):
            check_equal({against: answer, "it": net(x, sigma, label, 1.1 * gamma)}, tolerance)


@pytest.mark.parametrize(
    "mode", ["graphs", pytest.param("compiled-graphs", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_a_recorded_step_has_the_answer_of_a_step(small, monkeypatch, mode, guided):
    # replayed by running again, as a device without graphs can
    monkeypatch.setattr(subjects, "CudaGraphs", lambda device, pool: Rerun())
    step = Step(2, "reference", "taps", mode, guided=guided)
    built = subjects.build(step, CPU)
    against, answer = subjects.expected(step, CPU)
    assert not built.again
    for _ in range(2):
        (found,) = built.run()
        check_equal({against: answer, "it": found}, subjects.tolerance(step, CPU))


def test_sizes_tell_what_is_trained(small):
    for model in ("taps", "pair"):
        net = MODELS[model]()
        found = size(net)
        assert found["trainable"] == sum(p.numel() for p in score_network(net).parameters())
        assert found["parameters"] > found["trainable"]
