"""Winograd's convolutions: equal to the plain sum, with bits that depend on the sample alone."""

import pytest
import torch
import torch.nn.functional as F
from fastscore_kernels import library
from fastscore_kernels.winograd import winograd, winograd_pack
from kernel_cases import native_or_skip

CASES = [
    (1, 1, 1, 1),
    (3, 5, 2, 3),
    (4, 32, 40, 32),
    (32, 4, 9, 7),
    (17, 33, 5, 6),
    (64, 64, 20, 16),
]


@pytest.fixture(autouse=True)
def _library():
    native_or_skip()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(inputs: int, outputs: int, height: int, width: int, batch: int = 3):
    rng = torch.Generator().manual_seed(inputs + outputs)
    x = torch.randn(batch, inputs, height, width, generator=rng)
    weight = torch.randn(outputs, inputs, 3, 3, generator=rng) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=rng)
    return x.contiguous(memory_format=torch.channels_last), weight, bias


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_plain_sum(case, biased):
    x, weight, bias = problem(*case)
    bias = bias if biased else None
    y = winograd(x, winograd_pack(weight), case[1], bias)
    wide = None if bias is None else bias.double()
    expected = F.conv2d(x.double(), weight.double(), wide, padding=1)
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # sums and differences of four terms before, and of nine products after, in fp32
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_turned_kernel_pulls_back(case):
    x, weight, _ = problem(*case)
    grad = torch.randn(len(x), case[1], *case[2:]).contiguous(memory_format=torch.channels_last)
    x = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight.double(), padding=1), x, grad.double())
    pulled = winograd(grad, winograd_pack(weight.transpose(0, 1).flip(2, 3)), case[0])
    assert (pulled - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("case", [*CASES, (48, 48, 40, 32)], ids=str)
def test_bits_depend_neither_on_the_batch_nor_on_the_threads(case, threads):
    x, weight, bias = problem(*case, batch=8)
    packed = winograd_pack(weight)
    threads(1)
    expected = winograd(x, packed, case[1], bias)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(winograd(x, packed, case[1], bias), expected)
        for part in (1, 2, 3):
            y = winograd(x[3 : 3 + part], packed, case[1], bias)
            assert torch.equal(y, expected[3 : 3 + part])


def test_what_does_not_fit_is_named():
    x, weight, bias = problem(4, 6, 5, 5)
    packed = winograd_pack(weight)
    for args, sentence in (
        ((x.double(), packed, 6), "x is torch.float64"),
        ((x.contiguous(), packed, 6), "expected channels-last float32"),
        ((x[0], packed, 6), "winograd: x"),
        ((x, packed, 17), "expected what winograd_pack returned for 4 onto 17"),
        ((x, packed.double(), 6), "packed is torch.float64"),
        ((x, packed, 6, bias[:3]), "winograd: bias"),
    ):
        with pytest.raises(ValueError, match=sentence):
            winograd(*args)
    for bad in (weight.double(), weight[0], torch.ones(4, 4, 5, 5)):
        with pytest.raises(ValueError, match=r"expected float32 \[out, in, 3, 3\]"):
            winograd_pack(bad)


def test_a_layout_of_another_instruction_set_is_refused():
    if library.instruction_set() == "portable":
        pytest.skip("this processor has one instruction set only")
    x, weight, _ = problem(4, 6, 5, 5)
    packed = winograd_pack(weight)
    native = library.native()
    native.fs_set_isa(b"portable")
    try:
        with pytest.raises(ValueError, match="instruction set"):
            winograd(x, packed, 6)
        again = winograd(x, winograd_pack(weight), 6)
    finally:
        native.fs_set_isa(b"auto")
    torch.testing.assert_close(again, winograd(x, packed, 6), rtol=1e-5, atol=1e-5)
