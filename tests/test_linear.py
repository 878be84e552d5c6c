"""Linear layers of our own: equal to the product, with rows that do not see each other."""

import pytest
import torch
from fastscore_kernels import library
from fastscore_kernels.linear import linear, linear_pack
from kernel_cases import native_or_skip

CASES = [(1, 1), (3, 5), (32, 128), (128, 100), (257, 17)]


@pytest.fixture(autouse=True)
def _library():
    native_or_skip()


@pytest.mark.parametrize(("inputs", "outputs"), CASES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_equals_the_product_row_by_row(inputs, outputs, rows):
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for packed, expected in (
        (linear_pack(weight, bias), x.double() @ weight.double().T + bias.double()),
        (linear_pack(weight), x.double() @ weight.double().T),
        (linear_pack(weight.T.contiguous().T), x.double() @ weight.double().T),
    ):
        y = linear(x, packed, outputs)
        # a chain of fp32 sums: its roundings grow with its length at most
        assert (y - expected).abs().max() <= 1e-6 * inputs**0.5 * expected.abs().max()
        for row in range(rows):
            assert torch.equal(linear(x[row : row + 1], packed, outputs)[0], y[row])


def test_what_does_not_fit_is_named():
    x, weight = torch.randn(2, 3), torch.randn(5, 3)
    packed = linear_pack(weight)
    for args, sentence in (
        ((x.double(), packed, 5), "x is torch.float64"),
        ((x.T, packed, 5), "expected contiguous float32"),
        ((x[:0], packed, 5), r"x is torch.float32 of shape \(0, 3\)"),
        ((x, packed, 17), "for 3 inputs and 17 outputs"),
    ):
        with pytest.raises(ValueError, match=sentence):
            linear(*args)
    with pytest.raises(ValueError, match="linear: weight"):
        linear_pack(weight.double())
    with pytest.raises(ValueError, match="linear: bias"):
        linear_pack(weight, torch.ones(4))


def test_a_layout_of_another_instruction_set_is_refused():
    if library.instruction_set() == "portable":
        pytest.skip("this processor has one instruction set only")
    packed = linear_pack(torch.randn(5, 3))
    native = library.native()
    native.fs_set_isa(b"portable")
    try:
        with pytest.raises(ValueError, match="instruction set"):
            linear(torch.randn(2, 3), packed, 5)
    finally:
        native.fs_set_isa(b"auto")
