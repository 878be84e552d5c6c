"""What the networks read, computed by one Triton kernel: against the reference, and in a step."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, TOLERANCES, assert_near, name, poison

# isort: split
from dataclasses import replace

from fastscore_kernels import edm_inputs, reference
from fastscore_kernels.gpu import edm_inputs as gpu
from fastscore_kernels.gpu.launch import parameters
from small_models import SPACE, inputs, randomise, small_classifier, small_denoiser
from test_stacked import UNET

from fastscore.config import SigmaRange
from fastscore.denoiser import GuidedUNet
from fastscore.layers import NoiseEmbedding, set_backend
from fastscore.stacked import stack
from fastscore.unet import UNet

FREQS = NoiseEmbedding(8).freqs.to(DEVICE)


def arguments(guided=True, patch=2, dtype=torch.float32, shape=(3, 1, 6, 10)):
    x = torch.randn(shape, device=DEVICE)
    # from the lowest level to the highest that models know
    sigma = torch.logspace(-2, 1.6, shape[0], device=DEVICE)
    gamma = torch.rand(shape[0], device=DEVICE) * 5 if guided else None
    return x, sigma, gamma, FREQS, 0.7, patch, dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("patch", "shape"), [(2, (3, 1, 6, 10)), (1, (2, 1, 5, 3)), (3, (1, 1, 9, 3))]
)
def test_values(dtype, guided, patch, shape, monkeypatch):
    given = arguments(guided, patch, dtype, shape)
    expected = reference.edm_inputs(*given)
    poison(monkeypatch)
    with parameters("edm_inputs", block=16):
        actual = gpu.edm_inputs(*given)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        # angles of up to 200 lose what one rounding of them is worth
        assert_near(one, other, max(TOLERANCES[one.dtype], 4e-5 if one.ndim == 2 else 0))
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_a_level_for_all_samples_need_not_be_copied():
    x, sigma, gamma, *rest = arguments()
    sigma, gamma = sigma[:1].expand(3), torch.stack((gamma, gamma), 1)[:, 0]
    actual = gpu.edm_inputs(x, sigma, gamma, *rest)
    for one, other in zip(actual, reference.edm_inputs(x, sigma, gamma, *rest), strict=True):
        assert_near(one, other, 4e-5)


def test_registration_and_derivatives():
    given = arguments()
    x = given[0].clone().requires_grad_()
    patches = edm_inputs(x, *given[1:], backend="triton")[0]
    torch.library.opcheck(torch.ops.fastscore_triton.edm_inputs.default, given)
    (slope,) = torch.autograd.grad(patches.sum(), x)
    sigma = given[1][:, None, None, None]
    assert_near(slope, (sigma**2 + 0.7**2).rsqrt().expand_as(x), 1e-5)
    pushed = torch.func.vjp(lambda t: edm_inputs(t, *given[1:], backend="triton")[0], given[0])
    assert_near(pushed[1](torch.ones_like(patches))[0], slope, 1e-6)


@torch.no_grad()
def test_a_compiled_step_is_one_graph_with_the_kernel_in_it():
    model = small_denoiser().requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
    set_backend(model, "triton")
    stack(model)
    guidance = torch.tensor([1, -1], device=DEVICE), torch.tensor([2.0, 5.0], device=DEVICE)
    args = (*(t.to(DEVICE) for t in inputs(2)), *guidance)
    targets = []

    def keep(graph, _):
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=keep)
    torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)
    for op in ("edm_inputs", "bias_add", "norm_act_backward"):
        assert any(f"fastscore_triton.{op}" in target for target in targets)
    assert not any("pixel_unshuffle" in target for target in targets)


@pytest.mark.parametrize("patch", [1, 2])
def test_networks_that_read_other_patches_read_their_own(patch):
    unet = randomise(UNet(replace(UNET, patch=patch)))
    net = GuidedUNet(unet, small_classifier(), SPACE, SigmaRange()).eval().requires_grad_(False)
    net = net.to(DEVICE, memory_format=torch.channels_last)
    guidance = torch.tensor([1, 3], device=DEVICE), torch.tensor([2.0, 5.0], device=DEVICE)
    args = (*(t.to(DEVICE) for t in inputs(2)), *guidance)
    found = []
    for backend in ("triton", "reference"):
        set_backend(net, backend)
        with torch.no_grad():
            found.append(net(*args))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
