"""Every native operation under opcheck, torch.func, torch.compile, export and make_fx."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from fastscore_kernels import (
    Norms,
    Projections,
    cpu,
    norm_act,
    norm_act_backward,
    norm_act_forward,
    normals,
    solver_step,
    tap_fuse,
    tap_norm,
    tap_path,
)
from fastscore_kernels.registration import direct
from kernel_cases import native_or_skip
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx


class Case(NamedTuple):
    """A function of activations, its example, and the operators that it must call."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    activations: tuple[Tensor, ...]
    differentiable: bool = True


def last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def case(name: str, backend: str) -> Case:
    weight, bias, other, another = (torch.randn(12) for _ in range(4))
    if name == "norm_act":
        film = torch.randn(2, 24)
        return Case(
            lambda x: norm_act(x, 4, weight, bias, film, backend=backend), (last(2, 12, 5, 3),)
        )
    if name == "norm_act_backward":
        x = last(2, 12, 5, 3)
        stats = norm_act_forward(x, 4, weight, bias, backend="reference")[1]
        return Case(
            lambda g, a: norm_act_backward(g, x, stats, 4, weight, bias, addend=a, backend=backend),
            (last(2, 12, 5, 3), last(2, 12, 5, 3)),
            differentiable=False,
        )
    if name == "tap_norm":
        norms = (weight, bias, other, another)
        return Case(
            lambda f, g: tap_norm(f, g, 4, *norms, backend=backend),
            (last(2, 12, 5, 3), last(2, 12, 5, 3)),
        )
    if name.startswith("tap_fuse"):
        return Case(
            lambda q, a, b: tap_fuse(q, a, b, 3, name.endswith("spatial"), backend),
            (last(2, 12, 2, 3), last(2, 24, 2, 3), last(2, 24, 2, 3)),
        )
    if name == "tap_path":
        sizes = [(8, 12), (16, 12), (16, 12), (8, 24), (8, 8)]
        weights = [p for n, m in sizes for p in (torch.randn(n, m, 1, 1) / m, torch.randn(n))]
        norms, projections = Norms(weight, bias, other, another), Projections(*weights)
        return Case(
            lambda f, g: tap_path(f, g, norms, projections, 4, 2, True, backend=backend),
            (last(2, 12, 5, 3), last(2, 12, 5, 3)),
        )
    coefficients, counters = torch.randn(2, 7), torch.tensor([[5, 0, 3], [2**40, 1, 4]])
    return Case(
        lambda x, raw, old: solver_step(
            x, coefficients, raw=raw, old=old, counters=counters, backend=backend
        ),
        tuple(torch.randn(2, 1, 5, 3) for _ in range(3)),
        differentiable=False,
    )


NAMES = (
    "norm_act",
    "norm_act_backward",
    "tap_norm",
    "tap_fuse",
    "tap_fuse_spatial",
    "tap_path",
    "solver_step",
)
EVERY = pytest.mark.parametrize("name", NAMES)
DERIVED = pytest.mark.parametrize("name", ["norm_act", "tap_norm", "tap_fuse", "tap_fuse_spatial"])


def pair(name: str) -> tuple[Case, Case]:
    """The native case and the same of the reference, on equal parameters."""
    native = native_or_skip()
    torch.manual_seed(1)
    ours = case(name, native)
    torch.manual_seed(1)
    return ours, case(name, "reference")


def assert_alike(actual: object, expected: object, tolerance: float = 2e-5) -> None:
    actual, expected = (t if isinstance(t, tuple) else (t,) for t in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@EVERY
def test_compiles_to_one_graph_that_a_second_call_reuses(name):
    ours, reference = pair(name)
    compiles = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.run, fullgraph=True, backend=compiles)
    assert_alike(compiled(*ours.activations), reference.run(*ours.activations))
    compiled(*(t.flip(0).contiguous() if t.ndim != 4 else t * 2 for t in ours.activations))
    assert compiles.frame_count == 1


# of the others, more arguments of the example have the size of the batch
@pytest.mark.parametrize("name", ["tap_norm", "tap_fuse", "tap_fuse_spatial", "tap_path"])
def test_exports_with_a_dynamic_batch(name):
    ours, reference = pair(name)

    class Module(torch.nn.Module):
        def forward(self, *activations):
            return ours.run(*activations)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Module(), ours.activations, dynamic_shapes=(tuple({0: batch} for _ in ours.activations),)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(t.startswith("fastscore_native.") for t in targets), targets
    more = [
        torch.cat((t, t, t)).contiguous(memory_format=torch.channels_last) for t in ours.activations
    ]
    assert_alike(program.module()(*more), reference.run(*more))


@EVERY
def test_exports(name):
    ours, reference = pair(name)

    class Module(torch.nn.Module):
        def forward(self, *activations):
            return ours.run(*activations)

    program = torch.export.export(Module(), ours.activations)
    assert_alike(program.module()(*ours.activations), reference.run(*ours.activations))


@DERIVED
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_vjp_equals_autograd_of_the_reference(name, compiled):
    ours, reference = pair(name)
    expected = reference.run(*ours.activations)
    cotangents = tuple(torch.randn_like(t) for t in _tuple(expected))

    def pull(*activations):
        _, back = torch.func.vjp(lambda *a: _tuple(ours.run(*a)), *activations)
        return back(cotangents)

    if compiled:
        pull = torch.compile(pull, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in ours.activations]
    found = torch.autograd.grad(_tuple(reference.run(*leaves)), leaves, cotangents)
    assert_alike(pull(*ours.activations), found)


@DERIVED
def test_traces_to_a_flat_graph_of_forward_and_backward(name):
    ours, _ = pair(name)

    def pull(*activations):
        _, back = torch.func.vjp(lambda *a: _tuple(ours.run(*a))[0], *activations)
        return back(torch.ones_like(_tuple(ours.run(*activations))[0]))

    graph = make_fx(pull)(*ours.activations)
    called = [n.target for n in graph.graph.nodes if str(n.target).startswith("fastscore_native")]
    assert any("backward" in str(target) for target in called), called
    assert_alike(graph(*ours.activations), pull(*ours.activations))


@DERIVED
def test_vmap_equals_a_loop(name):
    ours, _ = pair(name)
    if name == "norm_act":
        # FiLM of this example belongs to a batch of two
        weight, bias = torch.randn(12), torch.randn(12)
        ours = ours._replace(run=lambda x: norm_act(x, 4, weight, bias, backend="native"))
    many = [torch.stack((t, 2 * t, t - 1)) for t in ours.activations]
    actual = torch.func.vmap(lambda *a: _tuple(ours.run(*a)))(*many)
    rows = [_tuple(ours.run(*(m[i] for m in many))) for i in range(3)]
    expected = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    assert_alike(actual, expected)


def test_vmap_over_film_and_over_weights():
    native_or_skip()
    x, films = last(2, 12, 5, 3), torch.randn(4, 2, 24)
    weights, bias = torch.randn(4, 12), torch.randn(12)
    ours = torch.func.vmap(lambda f, w: norm_act(x, 4, w, bias, f, backend="native"))
    expected = [
        norm_act(x, 4, w, bias, f, backend="reference") for f, w in zip(films, weights, strict=True)
    ]
    assert_alike(ours(films, weights), torch.stack(expected))


def test_vmap_over_cotangents_runs_once(monkeypatch):
    """Several cotangents of one forward pass: one call of the kernel, no copy of the input."""
    native_or_skip()
    x, weight, bias = last(2, 12, 5, 3), torch.randn(12), torch.randn(12)
    _, pull = torch.func.vjp(lambda t: norm_act(t, 4, weight, bias, backend="native"), x)
    cotangents = torch.randn(3, *x.shape)

    expected = torch.stack([pull(c)[0] for c in cotangents])
    called, look_up = [], cpu._function
    monkeypatch.setattr(cpu, "_function", lambda name: called.append(name) or look_up(name))
    actual = torch.func.vmap(pull)(cotangents)[0]
    assert called == ["fs_norm_act_backward"]
    assert_alike(actual, expected)


@EVERY
def test_opcheck(name):
    """Schema, fake kernel and autograd registration of the operators behind a function."""
    ours, _ = pair(name)
    recorded: list[tuple] = []
    mode = _Recorder(recorded)
    with mode:
        ours.run(*ours.activations)
    assert recorded
    for op, args in recorded:
        if ours.differentiable and name != "tap_path":
            args = tuple(
                a.clone().requires_grad_() if isinstance(a, Tensor) and i == 0 else a
                for i, a in enumerate(args)
            )
        torch.library.opcheck(op, args)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the native operators that are called, with their arguments."""

    def __init__(self, calls: list[tuple]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastscore_native":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def test_normals_pass_opcheck():
    native_or_skip()
    seeds = torch.tensor([1, 2])
    normals(seeds, seeds, seeds, 8, backend="native")
    torch.library.opcheck(torch.ops.fastscore_native.normals.default, (seeds, seeds, seeds, 8, 0))


def _tuple(outputs: object) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_a_call_that_nobody_watches_skips_the_dispatcher():
    native_or_skip()
    x, weight = last(2, 12, 5, 3), torch.ones(12)
    watched: list[tuple] = []
    with _Recorder(watched):
        expected = norm_act(x, 4, weight, weight, backend="native")
    assert [str(op) for op, _ in watched] == ["fastscore_native.norm_act.default"]
    assert direct((x, weight))
    assert torch.equal(norm_act(x, 4, weight, weight, backend="native"), expected)
    leaf = weight.clone().requires_grad_()
    assert not direct((x, leaf))
    with torch.no_grad():
        assert direct((x, leaf))
        with torch.profiler.profile() as profile:
            assert not direct((x, leaf))
            norm_act(x, 4, leaf, weight, backend="native")
    assert "fastscore_native::norm_act" in {e.key for e in profile.key_averages()}
    with _Recorder([]):
        assert not direct((x, weight))
    torch.func.vjp(lambda t: _no(direct((t, weight)), t), x)
    torch.func.vmap(lambda t: _no(direct((t, weight)), t))(x)


def _no(answer: bool, t: Tensor) -> Tensor:
    assert not answer
    return t
