"""Multiply-accumulates and bytes against sums by hand."""

import copy
import json

import pytest
import torch
from small_models import SPACE, small_classifier, small_denoiser
from torch import nn

from fastscore.config import SigmaRange, UNetConfig
from fastscore.cost import on_meta, step_macs
from fastscore.denoiser import GuidedUNet, set_precision
from fastscore.layers import Conv2d, Linear, ResBlock
from fastscore.measure import macs, work
from fastscore.measure.roofline import Level, Peaks
from fastscore.unet import SelfAttention, UNet

UNET = UNetConfig(
    n_mels=16,
    frames=24,
    channels=(8, 16),
    blocks=(1, 1),
    attention=(False, True),
    groups=4,
    heads=2,
    emb_dim=16,
)
# positions of the three scales of the small models, of Mels 16 x 24 in patches of 2 x 2
N1, N2, N3 = 8 * 12, 4 * 6, 2 * 3
# convolutions of the small classifier, from its shallowest tap up, and below it
UPPER = 9 * (N2 * (8 * 16 + 2 * 16 * 16) + N3 * (16 * 24 + 2 * 24 * 24)) + 24 * 4
LOWER = 9 * N1 * (4 * 8 + 2 * 8 * 8)
# embedding of the noise level, and FiLM of one block a stage
EMBEDDING = 32 * 16 + 16 * 16
FILM = 16 * 2 * (8 + 16 + 24)


def test_a_strided_convolution():
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    counted = macs.of(conv, torch.zeros(2, 8, 10, 12))
    # 5 x 6 outputs a channel, each a sum over 3 x 3 x 8 inputs
    assert counted.rows == (macs.Row("", "forward", 2 * 16 * 5 * 6 * 3 * 3 * 8),)


def test_a_linear_layer():
    counted = macs.of(nn.Sequential(nn.Linear(32, 64), nn.SiLU()), torch.zeros(5, 32))
    assert counted.rows == (macs.Row("0", "forward", 5 * 32 * 64),)


def test_attention():
    counted = macs.of(SelfAttention(16, 4, 2), torch.zeros(1, 16, 4, 6))
    n = 4 * 6
    assert counted.modules() == {
        "qkv": n * 16 * 48,
        # every query with every key, and every weight with every value: all channels once each
        "": 2 * n * n * 16,
        "out": n * 16 * 16,
    }
    assert counted.parts() == {"forward": counted.total}


def test_the_vjp_of_a_convolution():
    conv = Conv2d(8, 16, 3, stride=2, padding=1).to("meta")
    x, grad = (torch.zeros(2, *shape, device="meta") for shape in ((8, 10, 12), (16, 5, 6)))

    def run() -> None:
        _, pull = conv.linearize(x)
        # two cotangents of every sample
        assert pull(torch.cat((grad, grad))).shape == (4, 8, 10, 12)

    forward = 2 * 16 * 5 * 6 * 9 * 8
    assert macs.count(conv, run).parts() == {"forward": forward, "vjp": 2 * forward}


def test_the_vjp_of_a_linear_layer():
    layer = Linear(32, 64).to("meta")
    counted = macs.count(layer, lambda: layer.pull(torch.zeros(5, 64, device="meta")))
    assert counted.rows == (macs.Row("", "vjp", 5 * 32 * 64),)


def test_a_residual_block_and_its_vjp():
    block = on_meta(ResBlock(8, 4, 16))
    x, emb = torch.zeros(1, 8, 6, 4, device="meta"), torch.zeros(1, 16, device="meta")

    def run() -> None:
        y, pull = block.linearize(x, emb)
        pull(y)

    conv = 8 * 8 * 9 * 6 * 4
    assert {(r.module, r.part): r.macs for r in macs.count(block, run).rows} == {
        ("conv1", "forward"): conv,
        ("norm2.film", "forward"): 16 * 2 * 8,
        ("conv2", "forward"): conv,
        ("conv2", "vjp"): conv,
        ("conv1", "vjp"): conv,
    }


@pytest.fixture(scope="module")
def denoiser():
    return small_denoiser()


@pytest.fixture(scope="module")
def steps(denoiser):
    return macs.step(denoiser)


@pytest.fixture(scope="module")
def done(denoiser):
    return work.step(denoiser, 2)


def test_a_step_by_part(denoiser, steps):
    unguided, guided = (steps[name].parts() for name in ("unguided", "guided"))
    forward = EMBEDDING + FILM + LOWER + UPPER
    assert unguided == {"forward": forward, "jem_vjp": UPPER, "subnet": unguided["subnet"]}
    assert guided == {**unguided, "class_vjp": UPPER + LOWER}
    # rows of both VJPs add up to what ran, and nothing is lost on the way
    assert {name: counted.total for name, counted in steps.items()} == step_macs(denoiser)
    assert steps["guided"].modules(1) == {
        "classifier": forward + 2 * UPPER + LOWER,
        "subnet": guided["subnet"],
    }
    json.dumps(steps["guided"].describe())


def test_a_classifier_that_leaves_its_vjps_to_pytorch(denoiser, steps):
    plain = small_denoiser()
    plain.classifier = _Wrapped(plain.classifier)
    found = macs.step(plain)
    for name, counted in steps.items():
        assert found[name].parts() == counted.parts()


class _Wrapped(nn.Module):
    """The small classifier by the smaller of both interfaces."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.embed, self.lower, self.upper = inner.embed, inner.lower, inner.upper

    def __deepcopy__(self, memo: dict) -> nn.Module:
        return _Wrapped(copy.deepcopy(self.inner, memo))


def test_the_usual_pair(steps):
    pair = GuidedUNet(UNet(UNET), small_classifier(), SPACE, SigmaRange())
    found = macs.step(pair)
    assert found["unguided"].parts() == {"unet": found["unguided"].total}
    assert found["guided"].parts() == {
        "unet": found["unguided"].total,
        "forward": steps["guided"].parts()["forward"],
        "class_vjp": UPPER + LOWER,
    }
    alone = GuidedUNet(pair.unet, None, SPACE, SigmaRange())
    assert list(macs.step(alone)) == ["unguided"]
    with pytest.raises(ValueError, match="cannot be guided"):
        work.step(alone)
    done = work.step(pair, tf32=True)
    assert done.macs == found["guided"].total
    assert {op.dtype for op in done.ops} == {"tf32"}


def test_work_of_a_step(done, steps):
    assert done.macs == 2 * steps["guided"].total
    by_place = {(op.module, op.part): op for op in done.ops}
    # inputs and outputs of both samples, and the weight, once each
    down = by_place["classifier.stages.1.down", "forward"]
    assert (down.name, down.dtype) == ("conv", "fp32")
    assert down.weights == 4 * (9 * 8 * 16 + 16)
    assert down.bytes == 4 * 2 * (8 * N1 + 16 * N2) + down.weights
    assert down.products == down.macs
    # cotangents of the JEM and of the class, through one reading of the weight
    pulled = by_place["classifier.stages.1.down", "vjp"]
    assert pulled.macs == 2 * down.macs
    assert pulled.weights == 4 * 9 * 8 * 16
    assert pulled.bytes == 4 * 4 * (8 * N1 + 16 * N2) + pulled.weights
    # Winograd's 16 products for 36
    conv = by_place["classifier.stages.1.blocks.0.conv1", "forward"]
    assert conv.products == conv.macs * 4 // 9
    norm = by_place["classifier.stages.1.blocks.0.norm1", "forward"]
    assert (norm.macs, norm.bytes) == (0, 2 * 4 * 2 * 16 * N2)
    # two cotangents in and out, the input once
    norm = by_place["classifier.stages.1.blocks.0.norm1", "vjp"]
    assert norm.bytes == (2 + 2 + 1) * 4 * 2 * 16 * N2
    fused = by_place["subnet.fusion.2", "subnet"]
    assert fused.name == "tap_path"
    # both taps and the fused one, and log RMS of the gradient
    assert fused.bytes == 4 * 2 * ((24 + 24 + 16) * N3 + 1) + fused.weights
    assert fused.macs == 2 * (
        N3 * (24 * 16 + 2 * 24 * 32 + 48 * 16 + 16 * 16) + 2 * N3 * 2 * N3 * 16
    )


def test_the_least_bytes_of_a_step(denoiser, done):
    unguided = work.step(denoiser, 2, guided=False)
    weights = 4 * sum(p.numel() for p in denoiser.parameters())
    assert unguided.weights == done.weights == weights
    assert done.bytes == weights + 2 * 4 * 2 * 16 * 24
    assert done.moved > unguided.moved > unguided.bytes
    assert weights < unguided.working_set < unguided.moved


def test_bounds_of_a_step(done):
    products = sum(op.products for op in done.ops)
    fast = Peaks("cpu", 1, (Level("memory", None, 1, 1e3, 1e3),), {"fp32": 1e12})
    assert done.bound(fast) == {"name": "bandwidth memory", "seconds": done.bytes / 1e3}
    slow = Peaks("cpu", 1, (Level("memory", None, 1, 1e15, 1e15),), {"fp32": 1e6, "bf16": 2e6})
    assert done.bound(slow)["name"] == "compute fp32"
    assert done.bound(slow)["seconds"] == pytest.approx(products / 1e6)
    assert done.bound_by_ops(fast) == pytest.approx(done.moved / 1e3)
    assert done.bound_by_ops(slow) >= done.bound(slow)["seconds"]


def test_work_in_bf16(done):
    narrowed = small_denoiser()
    set_precision(narrowed, "bf16")
    narrow = work.step(narrowed, 2)
    assert narrow.macs == done.macs
    types = {op.name: op.dtype for op in narrow.ops}
    assert types["conv"] == types["tap_path"] == "bf16"
    assert types["linear"] == "fp32"
    # nothing is saved by Winograd there
    assert all(op.products == op.macs for op in narrow.ops)
    assert narrow.weights < 0.6 * done.weights
