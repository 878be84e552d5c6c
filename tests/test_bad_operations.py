"""What no operation accepts: a ValueError that names the argument, from every backend alike."""

import ctypes
import re

import pytest
import torch
from fastscore_kernels import (
    Norms,
    Projections,
    bias_add,
    checks,
    class_cotangents,
    edm_inputs,
    library,
    norm_act,
    norm_act_backward,
    normals,
    solver_step,
    tap_fuse,
    tap_norm,
    tap_path,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import native_or_skip

X = torch.randn(2, 8, 4, 3)
W = torch.ones(8)
STATS = torch.ones(2, 2, 4)
KV = torch.randn(2, 16, 4, 3)
NORMS = Norms(W, W, W, W)
SIZES = [(4, 8), (8, 8), (8, 8), (4, 16), (4, 4)]
PROJECTIONS = Projections(*(p for n, m in SIZES for p in (torch.ones(n, m, 1, 1), torch.ones(n))))
STATE = torch.randn(2, 1, 4, 3)
ONE = torch.ones(2)
COUNTERS = torch.zeros(2, 3, dtype=torch.int64)
SEEDS = torch.zeros(2, dtype=torch.int64)
COEFFICIENTS = torch.zeros(2, 7)
EMPTY = torch.empty(0, 8, 4, 3)
HUGE = torch.empty(1, device="meta").expand(2**29, 8, 1, 1)
SLICED = torch.randn(2, 8, 4, 6)[..., ::2]

BAD = {
    "norm_act: x": [
        lambda k: norm_act(X[0], 4, W, W, backend=k),
        lambda k: norm_act(X.int(), 4, W, W, backend=k),
        lambda k: norm_act(SLICED, 4, W, W, backend=k),
        lambda k: norm_act(EMPTY, 4, W, W, backend=k),
        lambda k: norm_act(HUGE, 4, W, W, backend=k),
    ],
    "norm_act: groups": [
        lambda k: norm_act(X, 3, W, W, backend=k),
        lambda k: norm_act(X, 0, W, W, backend=k),
        lambda k: norm_act(X, -4, W, W, backend=k),
        lambda k: norm_act(X, 2.0, W, W, backend=k),
    ],
    "norm_act: weight": [
        lambda k: norm_act(X, 4, W[:4], W, backend=k),
        lambda k: norm_act(X, 4, W.half(), W, backend=k),
        lambda k: norm_act(X, 4, torch.ones(16)[::2], W, backend=k),
        lambda k: norm_act(X, 4, W.to("meta"), W, backend=k),
    ],
    "norm_act: bias": [lambda k: norm_act(X.half(), 4, W, W.half(), backend=k)],
    "norm_act: pre_bias": [
        lambda k: norm_act(X, 4, W, W, pre_bias=W[:4], backend=k),
        lambda k: norm_act(X, 4, W, W, pre_bias=W.half(), backend=k),
    ],
    "norm_act: film": [
        lambda k: norm_act(X, 4, W, W, torch.ones(2, 8), backend=k),
        lambda k: norm_act(X, 4, W, W, torch.ones(1, 16), backend=k),
        lambda k: norm_act(X, 4, W, W, torch.ones(2, 16).int(), backend=k),
    ],
    "norm_act: grad": [
        lambda k: norm_act_backward(X[:, :4].contiguous(), X, STATS, 4, W, W, backend=k),
        lambda k: norm_act_backward(X[:1].repeat(3, 1, 1, 1), X, STATS, 4, W, W, backend=k),
        lambda k: norm_act_backward(X.half(), X, STATS, 4, W, W, backend=k),
    ],
    "norm_act: addend": [
        lambda k: norm_act_backward(X, X, STATS, 4, W, W, addend=X[:1], backend=k),
        lambda k: norm_act_backward(X, X, STATS, 4, W, W, addend=X.half(), backend=k),
        lambda k: norm_act_backward(X, X, STATS, 4, W, W, addend=SLICED, backend=k),
    ],
    "bias_add: x": [lambda k: bias_add(X[0], W, backend=k)],
    "bias_add: bias": [
        lambda k: bias_add(X, W[:4], backend=k),
        lambda k: bias_add(X, W.double(), backend=k),
    ],
    "bias_add: band": [
        lambda k: bias_add(X, W, torch.ones(1, 8, 3, 2), backend=k),
        lambda k: bias_add(X, W, torch.ones(1, *X.shape[1:3], 1).half(), backend=k),
        lambda k: bias_add(X, W, torch.ones(1, *X.shape[1:3], 1, device="meta"), backend=k),
    ],
    "bias_add: residual": [
        lambda k: bias_add(X, W, residual=X[:1], backend=k),
        lambda k: bias_add(X, W, residual=X.half(), backend=k),
        lambda k: bias_add(X, W, residual=SLICED, backend=k),
    ],
    "class_cotangents: logits": [
        lambda k: class_cotangents(W, COUNTERS[0], k),
        lambda k: class_cotangents(COUNTERS, SEEDS, k),
    ],
    "class_cotangents: label": [
        lambda k: class_cotangents(COEFFICIENTS, SEEDS[:1], k),
        lambda k: class_cotangents(COEFFICIENTS, ONE, k),
    ],
    "edm_inputs: x": [
        lambda k: edm_inputs(X, ONE, None, W, 0.5, 1, torch.float32, k),
        lambda k: edm_inputs(STATE.half(), ONE, None, W, 0.5, 1, torch.float32, k),
    ],
    "edm_inputs: sigma": [
        lambda k: edm_inputs(STATE, ONE[:1], None, W, 0.5, 1, torch.float32, k),
        lambda k: edm_inputs(STATE, ONE.double(), None, W, 0.5, 1, torch.float32, k),
    ],
    "edm_inputs: gamma": [lambda k: edm_inputs(STATE, ONE, W, W, 0.5, 1, torch.float32, k)],
    "edm_inputs: freqs": [lambda k: edm_inputs(STATE, ONE, ONE, X, 0.5, 1, torch.float32, k)],
    "edm_inputs: patch": [
        lambda k: edm_inputs(STATE, ONE, ONE, W, 0.5, 2, torch.float32, k),
        lambda k: edm_inputs(STATE, ONE, ONE, W, 0.5, 0, torch.float32, k),
    ],
    "edm_inputs: dtype": [lambda k: edm_inputs(STATE, ONE, ONE, W, 0.5, 1, torch.int32, k)],
    "norm_act: stats": [
        lambda k: norm_act_backward(X, X, STATS[:1], 4, W, W, backend=k),
        lambda k: norm_act_backward(X, X, STATS.half(), 4, W, W, backend=k),
    ],
    "tap_norm: feature": [lambda k: tap_norm(SLICED, X, 4, W, W, W, W, backend=k)],
    "tap_norm: gradient": [
        lambda k: tap_norm(X, X[:1], 4, W, W, W, W, backend=k),
        lambda k: tap_norm(X, X.half(), 4, W, W, W, W, backend=k),
        lambda k: tap_norm(X, X.to("meta"), 4, W, W, W, W, backend=k),
    ],
    "tap_norm: gradient_bias": [
        lambda k: tap_norm(X, X, 4, W, W, W, W[:2], backend=k),
        lambda k: tap_norm(X.half(), X.half(), 4, W, W, W, W.half(), backend=k),
    ],
    "tap_fuse: q": [lambda k: tap_fuse(EMPTY, KV, KV, 2, True, k)],
    "tap_fuse: heads": [lambda k: tap_fuse(X, KV, KV, 3, True, k)],
    "tap_fuse: first": [
        lambda k: tap_fuse(X, X, KV, 2, True, k),
        lambda k: tap_fuse(X, KV.half(), KV, 2, True, k),
    ],
    "tap_fuse: second": [
        lambda k: tap_fuse(X, KV, KV[:1], 2, True, k),
        lambda k: tap_fuse(X, KV, KV[..., :2].contiguous(), 2, False, k),
    ],
    "tap_path: heads": [lambda k: tap_path(X, X, NORMS, PROJECTIONS, 4, 3, True, backend=k)],
    "tap_path: groups": [lambda k: tap_path(X, X, NORMS, PROJECTIONS, 5, 2, True, backend=k)],
    "tap_path: skip": [
        lambda k: tap_path(
            X, X, NORMS, PROJECTIONS._replace(skip=torch.ones(4, 8, 1, 1)), 4, 2, True, backend=k
        ),
    ],
    "tap_path: feature_weight": [
        lambda k: tap_path(
            X, X, NORMS._replace(feature_weight=W[:3]), PROJECTIONS, 4, 2, True, backend=k
        ),
        # each of a type that goes with the taps, but not with one another
        lambda k: tap_path(
            *(X.half(), X.half(), NORMS, Projections(*(p.half() for p in PROJECTIONS)), 4, 2, True),
            backend=k,
        ),
    ],
    "solver_step: x": [
        lambda k: solver_step(STATE.half(), COEFFICIENTS, raw=STATE, backend=k),
        lambda k: solver_step(STATE[:0], COEFFICIENTS[:0], raw=STATE[:0], backend=k),
        lambda k: solver_step(STATE[..., ::2], COEFFICIENTS, raw=STATE[..., ::2], backend=k),
    ],
    "solver_step: give raw or denoised": [
        lambda k: solver_step(STATE, COEFFICIENTS, backend=k),
        lambda k: solver_step(STATE, COEFFICIENTS, raw=STATE, denoised=STATE, backend=k),
    ],
    "solver_step: guidance": [
        lambda k: solver_step(STATE, COEFFICIENTS, denoised=STATE, guidance=STATE, backend=k),
        lambda k: solver_step(STATE, COEFFICIENTS, raw=STATE, guidance=STATE.half(), backend=k),
    ],
    "solver_step: old": [
        lambda k: solver_step(STATE, COEFFICIENTS, raw=STATE, old=STATE[:1], backend=k),
        lambda k: solver_step(STATE, COEFFICIENTS, raw=STATE, old=STATE.half(), backend=k),
    ],
    "solver_step: coefficients": [
        lambda k: solver_step(STATE, COEFFICIENTS[:, :6], raw=STATE, backend=k),
        lambda k: solver_step(STATE, COEFFICIENTS.double(), raw=STATE, backend=k),
    ],
    "solver_step: counters": [
        lambda k: solver_step(STATE, COEFFICIENTS, raw=STATE, counters=COUNTERS[:1], backend=k),
        lambda k: solver_step(STATE, COEFFICIENTS, raw=STATE, counters=COUNTERS.int(), backend=k),
    ],
    "normals: samples": [lambda k: normals(SEEDS, SEEDS[:1], SEEDS, 4, backend=k)],
    "normals: steps": [lambda k: normals(SEEDS, SEEDS, SEEDS.int(), 4, backend=k)],
    "normals: size": [
        lambda k: normals(SEEDS, SEEDS, SEEDS, 0, backend=k),
        lambda k: normals(SEEDS, SEEDS, SEEDS, 2**30, backend=k),
    ],
}


@pytest.mark.parametrize(
    ("sentence", "call"), [(name, call) for name, calls in BAD.items() for call in calls]
)
def test_is_named(sentence, call, backend):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        call(backend)
    assert (
        "expected" in str(caught.value)
        or "give" in str(caught.value)
        or "not given" in str(caught.value)
    )


def test_limit_is_that_of_32_bit_indices():
    assert HUGE.numel() == 2**32 > checks.LIMIT == 2**31


SIZE = 1 << 15
GUARD = 64


class Arguments:
    """Random arguments of one C function; tensors lie in buffers of their own, between guards."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        # mostly one thing is wrong at a time, or nothing: more would be refused for the first
        wrong = data.draw(
            st.sampled_from(["nothing", "nothing", "sizes", "strides", "types", "pointers", "all"])
        )
        self.wrong = {"sizes", "strides", "types", "pointers"} if wrong == "all" else {wrong}
        low = -2 if "sizes" in self.wrong else 1
        self.batch, self.channels, self.positions = (self.number(low, 17) for _ in range(3))
        self.parts = self.number(low, 9)
        if "sizes" not in self.wrong:
            self.parts = max(d for d in range(1, self.parts + 1) if self.channels % d == 0)
        self.outputs: list[torch.Tensor] = []

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def kind(self) -> int:
        return self.number(-1, 3) if "types" in self.wrong else 0

    def pointer(self, output: bool = False) -> int | None:
        if "pointers" in self.wrong and self.number(0, 4) == 0:
            return None
        buffer = torch.full((SIZE + 2 * GUARD,), 7.0) if output else torch.randn(SIZE)
        self.outputs.append(buffer)
        return buffer.data_ptr() + (4 * GUARD if output else 0)

    def tensor(self, wide: int = 1, axes: int = 3, output: bool = False) -> list[int | None]:
        """Pointer and strides (batch, channel where ``axes`` is 3, position)."""
        b, n, channels = self.batch, self.positions, self.channels * wide
        strides = [channels * n, 1, channels]
        if "strides" in self.wrong:
            strides = [self.number(-2, 200) for _ in range(3)]
        if axes == 2:
            strides[1] = 1
        sizes = (max(1, b), max(1, channels), max(1, n))
        furthest = sum((k - 1) * abs(s) for k, s in zip(sizes, strides, strict=True))
        if furthest >= SIZE // 2:
            strides = [0, 1, 0]
        return [self.pointer(output), strides[0], *([strides[1]] if axes == 3 else []), strides[2]]

    @property
    def sizes(self) -> list[int]:
        return [self.batch, self.channels, self.positions, self.parts]


def _norm(a: Arguments) -> list:
    film = [a.pointer(), 2 * a.channels, 0] if a.number(0, 1) else [None, 0, 0]
    return [a.pointer(), a.pointer(), a.kind(), *film]


def _answer(a: Arguments) -> list:
    """raw, guidance and their type, and denoised: raw or denoised, rarely both or none."""
    raw = a.number(0, 1)
    both = "pointers" in a.wrong
    given = a.pointer() if raw or both else None
    return [
        given,
        a.pointer() if raw else None,
        a.kind(),
        None if raw and not both else a.pointer(),
    ]


FUZZED = {
    "fs_norm_act": lambda a: [
        *(*a.tensor(), *a.tensor(output=True), a.kind(), *_norm(a)),
        *(a.pointer(True), a.pointer(True), *a.sizes, a.number(0, 1), 1e-5),
    ],
    "fs_norm_act_backward": lambda a: [
        *(*a.tensor(), *a.tensor(), *a.tensor(output=True), a.kind(), *_norm(a)),
        *(a.pointer(), a.pointer(), a.pointer(True)),
        *(a.batch, a.number(1, 2), *a.sizes[1:], a.number(0, 1)),
    ],
    "fs_tap_norm": lambda a: [
        *(*a.tensor(), *a.tensor(), *a.tensor(2, 2, output=True), a.kind()),
        *(a.pointer(), a.pointer(), a.pointer(), a.pointer(), a.kind()),
        *(a.pointer(True), a.pointer(True), *a.sizes, 1e-5),
    ],
    "fs_tap_fuse": lambda a: [
        *(*a.tensor(axes=2), *a.tensor(2, 2), *a.tensor(2, 2), *a.tensor(1, 2, output=True)),
        *(a.kind(), *a.sizes, a.number(0, 1)),
    ],
    "fs_tap_fuse_backward": lambda a: [
        *(*a.tensor(axes=2), *a.tensor(axes=2), *a.tensor(2, 2), *a.tensor(2, 2)),
        *(*a.tensor(1, 2, True), *a.tensor(2, 2, True), *a.tensor(2, 2, True)),
        *(a.kind(), *a.sizes, a.number(0, 1)),
    ],
    "fs_solver_step": lambda a: [
        *(a.pointer(), *_answer(a), a.pointer(), a.pointer()),
        *(None, a.number(-1 if "sizes" in a.wrong else 0, 2), a.pointer(True), a.pointer(True)),
        *(a.batch, a.channels * a.positions),
    ],
}


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_sizes_strides_and_types_never_crash_the_library(name, data):
    """Whatever it answers, it writes nothing outside its outputs, and nothing when it refuses."""
    native_or_skip()
    a = Arguments(data)
    code = getattr(library.native(), name)(*FUZZED[name](a))
    assert code in (0, 1, 2, 3)
    if name == "fs_solver_step":
        # it is told the product alone, which two negative sizes leave positive
        impossible = min(a.batch, a.channels * a.positions) < 1
    else:
        impossible = min(a.sizes) < 1 or a.channels % a.parts
    if impossible:
        assert code != 0
    for buffer in a.outputs:
        if len(buffer) > SIZE:
            assert (buffer[:GUARD] == 7).all()
            assert (buffer[-GUARD:] == 7).all()
            assert code == 0 or (buffer == 7).all()


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 33), st.integers(1, 6), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_random_shapes_equal_the_reference(shape, data):
    native_or_skip()
    c = shape[1]
    divisors = [d for d in range(1, c + 1) if c % d == 0]
    groups, heads = data.draw(st.sampled_from(divisors)), data.draw(st.sampled_from(divisors))
    layout = data.draw(st.sampled_from([torch.channels_last, torch.contiguous_format]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def draw(channels: int) -> torch.Tensor:
        t = torch.randn(shape[0], channels, *shape[2:], generator=rng)
        return t.contiguous(memory_format=layout)

    weights = [torch.randn(c, generator=rng) for _ in range(4)]
    x, gradient, first, second = draw(c), draw(c), draw(2 * c), draw(2 * c)
    spatial = data.draw(st.booleans())
    for run in (
        lambda k: norm_act(x, groups, *weights[:2], backend=k),
        lambda k: tap_norm(x, gradient, groups, *weights, backend=k)[0],
        lambda k: tap_fuse(x, first, second, heads, spatial, k),
    ):
        # groups of very few elements may have next to no variance, which magnifies roundings
        torch.testing.assert_close(run("native"), run("reference"), rtol=1e-3, atol=1e-3)


def test_null_pointers_are_refused():
    native = native_or_skip() and library.native()
    for name, types in library.SIGNATURES.items():
        if name == "fs_set_isa":
            assert native.fs_set_isa(b"none") != 0
            continue
        arguments = [
            1.0 if t is ctypes.c_double else None if t is ctypes.c_void_p else 1 for t in types
        ]
        assert getattr(native, name)(*arguments) == 1, name
