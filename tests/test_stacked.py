"""FiLM layers in one matrix product: equal to single ones, true to their weights, never stale."""

import copy

import pytest
import torch
from small_models import SPACE, inputs, randomise, small_classifier, small_denoiser
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastscore.checkpoint import weights_hash
from fastscore.config import SigmaRange, UNetConfig
from fastscore.denoiser import Denoiser, GuidedUNet
from fastscore.stacked import stack, unstack
from fastscore.unet import UNet

LABEL, GAMMA = torch.tensor([2, -1, 0]), torch.tensor([1.0, 5.0, 3.0])
UNET = UNetConfig(
    n_mels=16,
    frames=24,
    channels=(8, 16),
    blocks=(1, 1),
    attention=(False, True),
    heads=2,
    groups=4,
    emb_dim=16,
)


class Products(TorchDispatchMode):
    """Counts matrix products with a bias."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten.addmm.default
        return op(*args, **(kwargs or {}))


def taps() -> Denoiser:
    return small_denoiser().requires_grad_(False)


def pair() -> Denoiser:
    net = GuidedUNet(randomise(UNet(UNET)), small_classifier(), SPACE, SigmaRange())
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("make", [taps, pair])
@pytest.mark.parametrize("guided", [False, True])
def test_a_stacked_step_equals_the_plain_one_in_fewer_products(make, guided):
    net = make()
    args = (*inputs(3), LABEL, GAMMA) if guided else inputs(3)
    with Products() as before:
        expected = net(*args)
    layers = stack(net)
    assert layers == sum(name.endswith("film.weight") for name in net.state_dict()) > 5
    with Products() as after:
        actual = net(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # the classifier runs unless an unguided U-Net stands alone
    classifier = sum(name.endswith("film.weight") for name in net.classifier.state_dict())
    both = guided or make is taps
    used = layers if both else layers - classifier
    assert before.count - after.count == used - (2 if both else 1)
    unstack(net)
    assert torch.equal(net(*args), expected)


def test_what_is_written_into_a_weight_is_in_the_product():
    net, args = taps(), inputs(2)
    stack(net)
    before = net(*args)
    net.load_state_dict({k: 1.1 * v for k, v in net.state_dict().items()})
    after = net(*args)
    assert not torch.allclose(after, before, atol=1e-3)
    unstack(net)
    torch.testing.assert_close(after, net(*args), rtol=1e-5, atol=1e-5)


def test_moved_weights_are_refused_until_stacked_again():
    net, args = taps(), inputs(1)
    stack(net)
    expected = net(*args)
    net.subnet.stages[0][0].norm2.film.bias.data = torch.zeros(16)
    with pytest.raises(ValueError, match="moved or replaced since it was stacked; call"):
        net(*args)
    stack(net)
    assert not torch.equal(net(*args), expected)
    net.double().float()
    with pytest.raises(ValueError, match="moved or replaced"):
        net(*args)


def test_weights_of_several_types_are_named():
    net = taps()
    net.classifier.stages[0].blocks[0].norm2.film.double()
    with pytest.raises(ValueError, match=r"float32 on cpu and torch.float64 on cpu; bring"):
        stack(net)


def test_state_hash_and_copies_know_nothing_of_it():
    net, args = taps(), inputs(2)
    keys, digest = list(net.state_dict()), weights_hash(net)
    stack(net)
    assert list(net.state_dict()) == keys
    assert weights_hash(net) == digest
    twin = copy.deepcopy(net)
    assert twin.subnet.stacked is None
    assert net.subnet.stacked is not None
    torch.testing.assert_close(twin(*args), net(*args), rtol=1e-5, atol=1e-5)


def test_a_wanted_gradient_reaches_the_layers():
    net, (x, sigma) = taps(), inputs(2)
    net.classifier.requires_grad_(True)
    found = []
    for prepare in (unstack, stack):
        prepare(net)
        logits = net.classifier(x, sigma)
        weight = net.classifier.stages[1].blocks[0].norm2.film.weight
        found.append(torch.autograd.grad(logits.sum(), weight)[0])
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


@torch.no_grad()
def test_a_compiler_and_a_trace_take_the_product():
    net = taps()
    args = (*inputs(3), LABEL, GAMMA)
    stack(net)
    expected = net(*args)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5)
    graph = make_fx(lambda *a: net(*a))(*args)
    products = [n for n in graph.graph.nodes if n.target is torch.ops.aten.addmm.default]
    with Products() as eager:
        net(*args)
    assert len(products) == eager.count
    torch.testing.assert_close(graph(*args), expected, rtol=1e-5, atol=1e-5)
