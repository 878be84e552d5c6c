"""The Triton kernels of the solver step and its noise against the reference, bit for bit."""

import pytest
import torch
from interpreter import DEVICE, name, poison

# isort: split
from fastscore_kernels import noise, reference
from fastscore_kernels.gpu.launch import parameters
from fastscore_kernels.gpu.solver_step import normals, solver_step


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def counters(batch):
    seeds = torch.tensor([0, 2**63 - 1, 2**32 + 5, 7][:batch])
    samples = torch.tensor([0, 3, 2**32 - 1, 2**31][:batch])
    steps = torch.tensor([0, 9, 2**31 + 7, 1][:batch])
    return torch.stack((seeds, samples, steps), dim=1).to(DEVICE)


@pytest.mark.parametrize("size", [1, 6, 131])
@pytest.mark.parametrize("draw", [0, 2**32 - 1])
def test_noise_has_the_bits_of_the_reference(size, draw):
    seeds, samples, _ = counters(4).unbind(1)
    steps = torch.tensor([0, 1, 2**32 - 1], device=DEVICE)
    with parameters("normals", quads=32):
        actual = normals(seeds.contiguous(), samples.contiguous(), steps, size, draw)
    assert torch.equal(actual, noise.normals(seeds, samples, steps, size, draw))


def test_many_draws_have_the_bits_of_the_reference():
    """Enough of them that every exponent and octant of the transformation occurs."""
    seeds, steps = torch.tensor([11], device=DEVICE), torch.tensor([4], device=DEVICE)
    with parameters("normals", quads=16384):
        actual = normals(seeds, seeds, steps, 260001, 0)
    assert torch.equal(actual, noise.normals(seeds, seeds, steps, 260001, 0))


def test_a_sample_keeps_its_noise_in_any_batch_and_block():
    seeds, samples, steps = (c.contiguous() for c in counters(4).unbind(1))
    whole = normals(seeds, samples, steps[:2], 50, 3)
    with parameters("normals", quads=4):
        alone = normals(seeds[2:3].clone(), samples[2:3].clone(), steps[1:2].clone(), 50, 3)
    assert torch.equal(whole[1, 2], alone[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize(
    "given",
    [("raw",), ("raw", "guidance"), ("denoised", "old"), ("raw", "guidance", "old", "noise")],
    ids="+".join,
)
def test_a_step_has_the_bits_of_the_reference(given, dtype):
    shape = (3, 1, 7, 11)
    tensors = {n: torch.randn(shape, device=DEVICE) for n in ("denoised", "old") if n in given}
    narrow = {n: torch.randn(shape).to(DEVICE, dtype) for n in ("raw", "guidance") if n in given}
    raw, guidance, denoised, old = (
        {**tensors, **narrow}.get(n) for n in ("raw", "guidance", "denoised", "old")
    )
    # magnitudes of every noise level: sums whose rounding a contraction would change
    levels = torch.tensor([40.0, 1.0, 0.01])[:, None, None, None]
    x = (torch.randn(shape) * levels).to(DEVICE)
    coefficients = (torch.randn(3, 7) * torch.logspace(-3, 3, 7)).to(DEVICE)
    words = counters(3) if "noise" in given else None
    z = None
    if words is not None:
        seeds, samples, steps = words.unbind(1)
        every = noise.normals(seeds, samples, steps, 77, 2)
        z = every.diagonal(dim1=0, dim2=1).T.reshape(shape)
    with parameters("solver_step", quads=8):
        actual = solver_step(x, raw, guidance, denoised, old, coefficients, words, 2)
    expected = reference.solver_step(x, raw, guidance, denoised, old, coefficients, z)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == x.stride()
