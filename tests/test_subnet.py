"""ScoreSubnet: which taps it reads, odd sizes and magnitudes, and its size."""

from dataclasses import replace

import pytest
import torch
from small_models import CLASSIFIER, SUBNET, inputs, randomise, small_subnet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastscore.config import CLASSIFIERS, SUBNETS
from fastscore.subnet import ScoreSubnet

Taps = tuple[Tensor, ...]


def taps(batch: int, frames: int = 24, channels: tuple[int, ...] = CLASSIFIER.channels) -> Taps:
    return tuple(torch.randn(batch, c, 8 >> i, frames // 2 >> i) for i, c in enumerate(channels))


@pytest.mark.parametrize("frames", [8, 24, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_output_is_shaped_as_the_input(batch, frames):
    subnet = small_subnet()
    x, c_noise = inputs(batch, frames=frames)
    out = subnet(x, c_noise, taps(batch, frames), taps(batch, frames))
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_untrained_output_is_zero():
    """So that D = c_skip x before training, whatever the taps hold."""
    subnet = ScoreSubnet(SUBNET, CLASSIFIER)
    x, c_noise = inputs(2)
    assert (subnet(x, c_noise, taps(2), taps(2)) == 0).all()


@pytest.mark.parametrize("kind", ["feature", "gradient"])
def test_a_tap_that_is_switched_off_is_not_read(kind):
    """Not by a bit, not even when it is not a number; the other tap is read at every scale."""
    only = replace(SUBNET, feature_taps=kind == "feature", gradient_taps=kind == "gradient")
    subnet = small_subnet(only)
    x, c_noise = inputs(2)
    used, unused = taps(2), taps(2)
    absent = tuple(torch.full_like(t, float("nan")) for t in unused)

    def out(read: Taps, other: Taps) -> Tensor:
        features, gradients = (read, other) if kind == "feature" else (other, read)
        return subnet(x, c_noise, features, gradients)

    expected = out(used, unused)
    assert torch.equal(out(used, absent), expected)
    for i in range(len(used)):
        moved = tuple(t + torch.randn_like(t) if j == i else t for j, t in enumerate(used))
        assert (out(moved, unused) - expected).abs().max() > 1e-4


def test_both_taps_are_read_at_every_scale():
    subnet = small_subnet()
    x, c_noise = inputs(2)
    f, g = taps(2), taps(2)
    expected = subnet(x, c_noise, f, g)
    for i in range(len(f)):
        swap = tuple(torch.randn_like(t) if j == i else t for j, t in enumerate(f))
        assert (subnet(x, c_noise, swap, g) - expected).abs().max() > 1e-4
        assert (subnet(x, c_noise, f, swap) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("switches", [(True, True), (True, False), (False, True)])
def test_everything_in_use_is_trained(switches):
    """Parameters without a gradient are those of the tap that is switched off, and no others.

    Except queries where a position attends to one tap of its own only: nothing is to be weighed.
    """
    feature, gradient = switches
    subnet = small_subnet(replace(SUBNET, feature_taps=feature, gradient_taps=gradient)).train()
    x, c_noise = inputs(2)
    subnet(x, c_noise, taps(2), taps(2)).square().sum().backward()
    idle = {name for name, p in subnet.named_parameters() if p.grad is None or not p.grad.any()}
    expected = set()
    if not (feature and gradient):
        off = "gradient_" if feature else "feature_"
        kinds = (f"{off}weight", f"{off}bias", "query.weight", "query.bias")
        expected = {f"fusion.{i}.{kind}" for i in range(3) for kind in kinds}
        expected -= {"fusion.2.query.weight", "fusion.2.query.bias"}  # attends to all positions
    if not gradient:
        expected |= {"magnitude.weight", "magnitude.bias"}
    assert idle == expected


def test_gradient_magnitude_is_told_by_the_embedding_alone():
    subnet = small_subnet()
    x, c_noise = inputs(2)
    f, g = taps(2), taps(2)
    expected = subnet(x, c_noise, f, g)
    tiny = tuple(1e-6 * t for t in g)
    assert (subnet(x, c_noise, f, tiny) - expected).abs().max() > 1e-3
    with torch.no_grad():
        subnet.magnitude.weight.zero_()
    expected = subnet(x, c_noise, f, g)
    torch.testing.assert_close(subnet(x, c_noise, f, tiny), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["feature", "gradient", "both"])
def test_dead_taps_stay_finite(kind):
    """A saturated classifier may hand over zeros; output and parameter gradients stay finite."""
    subnet = small_subnet().train()
    x, c_noise = inputs(2)
    f, g = taps(2), taps(2)
    dead = tuple(torch.zeros_like(t) for t in f)
    out = subnet(x, c_noise, f if kind == "gradient" else dead, g if kind == "feature" else dead)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in subnet.parameters())


def test_one_scale_without_attention_over_positions():
    config = replace(SUBNET, channels=(8,), blocks=(1,), attention=(False,))
    subnet = randomise(ScoreSubnet(config, replace(CLASSIFIER, channels=(8,), blocks=(1,))))
    x, c_noise = inputs(2)
    f, g = taps(2, channels=(8,)), taps(2, channels=(8,))
    assert subnet(x, c_noise, f, g).shape == x.shape


def test_scales_must_match_taps():
    config = replace(SUBNET, channels=(8, 16), blocks=(1, 1), attention=(False, False))
    with pytest.raises(ValueError, match="2 scales for a classifier with 3 taps"):
        ScoreSubnet(config, CLASSIFIER)
    x, c_noise = inputs(2)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        small_subnet()(x, c_noise, taps(2)[:2], taps(2))


def test_autocast_stays_near_fp32():
    subnet = small_subnet()
    x, sigma = inputs(3)
    x, c_noise = x / x.std(dim=(1, 2, 3), keepdim=True), sigma.log() / 4
    f, g = taps(3), taps(3)
    exact = subnet(x, c_noise, f, g)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = subnet(x, c_noise, f, g)
    assert narrow.dtype == torch.bfloat16
    # a few roundings of 2^-8 over the depth of the decoder
    assert (narrow.float() - exact).abs().max() <= 10 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("tiny", 1.27e6, 0.241e9), ("paper", 4.4e6, 3.3e9)]
)
def test_size_and_cost_of_the_presets(name, parameters, macs):
    """The published ScoreSubnet: 4.4 M trainable parameters and, inferred, 3.3 GMACs at 80 x 64."""
    config, classifier = SUBNETS[name], CLASSIFIERS[name]
    with torch.device("meta"):
        subnet = ScoreSubnet(config, classifier).eval()
        at = [torch.empty(1, c, 40 >> i, 32 >> i) for i, c in enumerate(classifier.channels)]
        with FlopCounterMode(display=False) as counter:
            subnet(torch.empty(1, 1, 80, 64), torch.empty(1), tuple(at), tuple(at))
    count = sum(p.numel() for p in subnet.parameters())
    assert count == pytest.approx(parameters, rel=0.03)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.03)
