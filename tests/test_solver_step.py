"""solver_step and its noise: the same bits from every backend, batch and slot."""

import itertools

import pytest
import torch
from fastscore_kernels import normals, solver_step
from kernel_cases import native_or_skip

SHAPE = (3, 1, 17, 13)
SEEDS = (0, 2**63 - 1, 1234567890123)


def tensors(raw_dtype=torch.float32):
    x, denoised, old = (torch.randn(SHAPE) for _ in range(3))
    raw, guidance = (torch.randn(SHAPE).to(raw_dtype) for _ in range(2))
    counters = torch.tensor([[seed, i, 7 * i] for i, seed in enumerate(SEEDS)])
    return x, raw, guidance, denoised, old, torch.randn(3, 7), counters


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("raw_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_equals_the_reference_to_the_bit(raw_dtype):
    native_or_skip()
    x, raw, guidance, denoised, old, coefficients, counters = tensors(raw_dtype)
    for guided, multistep, noisy in itertools.product((False, True), repeat=3):
        options = {"old": old if multistep else None, "counters": counters if noisy else None}
        parts = (
            {"raw": raw, "guidance": guidance if guided else None}
            if guided or multistep
            else {"denoised": denoised}
        )
        expected = solver_step(x, coefficients, **parts, **options, backend="reference")
        actual = solver_step(x, coefficients, **parts, **options, backend="native")
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_reference_is_the_formula():
    x, raw, guidance, _, old, coefficients, counters = tensors()
    following, x0 = solver_step(
        x, coefficients, raw=raw, guidance=guidance, old=old, counters=counters, backend="reference"
    )
    c = [k[:, None, None, None].double() for k in coefficients.unbind(1)]
    expected = c[0] * x + c[1] * raw + c[2] * guidance
    torch.testing.assert_close(x0.double(), expected, rtol=1e-5, atol=1e-6)
    z = torch.stack(
        [
            normals(*(t[None] for t in row), x[0].numel(), backend="reference")[0, 0]
            for row in counters
        ]
    ).reshape(SHAPE)
    expected = c[3] * x + c[4] * expected + c[5] * old + c[6] * z
    torch.testing.assert_close(following.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 67, 5120, 5123])
@pytest.mark.usefixtures("poisoned")
def test_native_normals_are_the_reference_s_bits(size):
    native_or_skip()
    seeds, samples = torch.tensor([*SEEDS, 2**62 + 3]), torch.tensor([0, 5, 2**32 - 1, 9])
    steps = torch.tensor([0, 1, 59, 2**32 - 1])
    for draw in (0, 1, 2**32 - 1):
        expected = normals(seeds, samples, steps, size, draw, backend="reference")
        assert torch.equal(normals(seeds, samples, steps, size, draw, backend="native"), expected)


def test_bits_do_not_depend_on_batch_slot_or_threads():
    native_or_skip()
    x, raw, guidance, _, old, coefficients, counters = tensors()
    whole = solver_step(
        x, coefficients, raw=raw, guidance=guidance, old=old, counters=counters, backend="native"
    )
    for i in range(3):
        one = [t[i : i + 1] for t in (x, coefficients, raw, guidance, old, counters)]
        alone = solver_step(
            *one[:2],
            raw=one[2],
            guidance=one[3],
            old=one[4],
            counters=one[5],
            backend="native",
        )
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))
