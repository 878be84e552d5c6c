"""What a convolution's output lacks, added by one Triton kernel: against the reference."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, TOLERANCES, activation, assert_near, name, poison

# isort: split
from fastscore_kernels import bias_add, reference
from fastscore_kernels.gpu import bias_add as gpu
from fastscore_kernels.gpu.launch import parameters
from small_models import SPACE, inputs, randomise, small_classifier
from test_stacked import UNET

from fastscore.config import SigmaRange
from fastscore.denoiser import GuidedUNet
from fastscore.layers import Conv2d, ResBlock, Upsample, set_backend
from fastscore.unet import UNet

# odd sizes, one position, one channel
SHAPES = [(2, 16, 4, 6), (3, 5, 7, 3), (1, 8, 1, 1), (2, 1, 3, 2)]


@pytest.fixture
def _poisoned(monkeypatch):
    poison(monkeypatch)


def arguments(shape, dtype, last, banded, residual):
    x = activation(*shape, dtype=dtype, last=last)
    bias = torch.randn(shape[1], device=DEVICE).to(dtype if banded else torch.float32)
    band = torch.randn(1, shape[1], shape[2], 1, device=DEVICE) if banded else None
    if banded and last:
        # as a model lies whose weights are channels-last
        band = band.contiguous(memory_format=torch.channels_last)
    # the residual may lie in the other layout
    return x, bias, band, activation(*shape, dtype=dtype, last=not last) if residual else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("banded", [False, True], ids=["plain", "band"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.usefixtures("_poisoned")
def test_values(shape, banded, residual, last):
    for dtype in DTYPES:
        given = arguments(shape, dtype, last, banded, residual)
        with parameters("bias_add", block=32):
            y = gpu.bias_add(*given)
        assert (y.dtype, y.stride()) == (dtype, given[0].stride())
        assert_near(y, reference.bias_add(*given), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_and_registration(dtype):
    given = arguments((2, 6, 3, 4), dtype, True, True, True)
    leaves = [t.requires_grad_() for t in given]
    grad = torch.randn_like(given[0])
    found = []
    for backend in ("triton", "reference"):
        y = bias_add(*leaves, backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        assert_near(actual, expected, 2 * TOLERANCES[dtype])
    op = torch.ops.fastscore_triton.bias_add.default
    torch.library.opcheck(op, tuple(leaves))
    torch.library.opcheck(op, (given[0].detach(), given[1].detach(), None, None))


def test_vmap_folds_into_the_batch():
    x, bias, band, residual = arguments((2, 6, 3, 4), torch.float32, True, True, True)
    several = torch.stack((x, 2 * x))
    y = torch.func.vmap(lambda t: bias_add(t, bias, band, residual, backend="triton"))(several)
    for actual, one in zip(y, several, strict=True):
        assert_near(actual, reference.bias_add(one, bias, band, residual), 1e-5)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: ResBlock(8, 4, 16), ((2, 8, 5, 4), (2, 16))),
        (lambda: Upsample(8, 4), ((2, 8, 3, 2), (2, 4, 6, 4))),
    ],
    ids=["block", "upsampling"],
)
def test_layers_that_leave_their_bias_out_train_alike(make, given):
    module = randomise(make()).to(DEVICE)
    x, *rest = (torch.randn(shape, device=DEVICE) for shape in given)
    x.requires_grad_()
    leaves = [x, *module.parameters()]
    found = []
    for backend in ("triton", "reference"):
        set_backend(module, backend)
        y = module(x, *rest)
        torch.manual_seed(5)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_block_adds_its_biases_elsewhere_and_pulls_back_the_same():
    module = randomise(ResBlock(8, 4, 16)).to(DEVICE).requires_grad_(False)
    x, emb = activation(2, 8, 5, 4), torch.randn(2, 16, device=DEVICE)
    grad = activation(4, 8, 5, 4)
    found, biases = [], []

    def watched(conv, args, y):
        biases.append(conv.bias)

    for conv in (module.conv1, module.conv2):
        conv.register_forward_hook(watched)
    for backend in ("triton", "reference"):
        set_backend(module, backend)
        y, pull = module.linearize(x, emb)
        found.append((y, pull(grad)))
        # a convolution with its bias is a layer's forward, which runs on one backend alone
        assert len(biases) == (0 if backend == "triton" else 2)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_without_bias_leaves_nothing_out():
    conv = Conv2d(4, 4, 3, padding=1, bias=False).to(DEVICE)
    x = activation(1, 4, 3, 3)
    set_backend(conv, "triton")
    assert conv.deferred is None
    assert torch.equal(conv.complete(conv.product(x), x), x + conv(x))


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_of_the_usual_pair(guided):
    net = GuidedUNet(randomise(UNet(UNET)), small_classifier(), SPACE, SigmaRange()).eval()
    net = net.requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
    args = tuple(t.to(DEVICE) for t in inputs(2))
    if guided:
        args += torch.tensor([1, -1], device=DEVICE), torch.tensor([2.0, 5.0], device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        set_backend(net, backend)
        with torch.no_grad():
            found.append(net(*args))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
