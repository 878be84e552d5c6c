"""Prepared convolutions: equal to the plain ones, in use where they may be, loud when stale."""

import copy
import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastscore_kernels import library
from kernel_cases import native_or_skip
from small_models import (
    CLASSIFIER,
    SPACE,
    SUBNET,
    inputs,
    randomise,
    small_classifier,
    small_denoiser,
    small_subnet,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastscore import packed
from fastscore.checkpoint import weights_hash
from fastscore.config import CLASSIFIERS, SUBNETS, SigmaRange
from fastscore.denoiser import TapDenoiser
from fastscore.layers import Conv2d, Linear, set_backend
from fastscore.packed import obstacle, pack, unpack
from fastscore.subnet import ScoreSubnet

LABEL, GAMMA = torch.tensor([2, -1, 0]), torch.tensor([1.0, 5.0, 3.0])

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)


def frozen(dtype: torch.dtype = torch.float32) -> TapDenoiser:
    return small_denoiser().requires_grad_(False).to(dtype=dtype)


@pytest.fixture
def used(monkeypatch):
    """Calls of prepared weights so far."""
    calls = []
    for name in ("forward", "pull"):
        plain = getattr(packed.PackedConv, name)

        def counted(self, conv, *args, plain=plain, name=name):
            calls.append(name)
            return plain(self, conv, *args)

        monkeypatch.setattr(packed.PackedConv, name, counted)
    return calls


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [24, 40])
@pytest.mark.parametrize("guided", [False, True])
def test_a_packed_step_equals_the_plain_one(backend, dtype, frames, guided, used):
    denoiser = frozen(dtype)
    set_backend(denoiser, backend)
    x, sigma = inputs(3, frames=frames)
    args = (x, sigma, LABEL, GAMMA) if guided else (x, sigma)
    expected = denoiser(*args)
    assert pack(denoiser) == sum(isinstance(m, Conv2d) for m in denoiser.modules()) > 15
    used.clear()
    actual = denoiser(*args)
    # every convolution went that way, and those of the classifier back as well
    back = len([m for m in denoiser.classifier.modules() if isinstance(m, Conv2d)])
    lower = 1 + len([m for m in denoiser.classifier.stages[0].modules() if isinstance(m, Conv2d)])
    assert used.count("pull") == (back if guided else back - lower)
    assert used.count("forward") == sum(isinstance(m, Conv2d) for m in denoiser.modules())
    # sums in another order; some thirty layers of roundings to 2^-8 in bf16
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    unpack(denoiser)
    assert torch.equal(denoiser(*args), expected)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("size", [(7, 5), (8, 6), (3, 9)])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 1)])
def test_a_convolution_of_any_size_and_its_pull_back(size, stride, kernel, native):
    if native:
        native_or_skip()
    conv = randomise(Conv2d(6, 10, kernel, stride=stride, padding=kernel // 2))
    conv.requires_grad_(False)
    x = torch.randn(2, 6, *size, requires_grad=True)
    expected = conv(x)
    grad = torch.randn_like(expected)
    (pulled,) = torch.autograd.grad(expected, x, grad)
    with torch.no_grad():
        conv.prepared = packed.PackedConv(conv, x.shape, expected.shape, native)
        actual, pull = conv.linearize(x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pull(grad), pulled, rtol=1e-5, atol=1e-5)
        # packed for one size, used for another
        other = torch.randn(1, 6, 12, 11)
        torch.testing.assert_close(conv(other), conv._conv_forward(other, conv.weight, conv.bias))


def test_derivatives_traces_and_autocast_take_the_plain_convolution(used):
    denoiser = frozen()
    pack(denoiser)
    x, sigma = inputs(3)
    used.clear()
    denoiser.classifier(x.requires_grad_(), sigma).sum().backward()
    x = x.detach()
    with torch.no_grad():
        make_fx(lambda x, sigma: denoiser(x, sigma))(x, sigma)
        torch.func.vjp(lambda x: denoiser.subnet.stem(x), torch.randn(1, 4, 8, 12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        denoiser(x, sigma)
    assert not used
    with torch.no_grad():
        denoiser(x, sigma)
    assert used


def test_changed_weights_are_refused_until_packed_again():
    denoiser = frozen()
    pack(denoiser)
    x, sigma = inputs(1)
    before = denoiser(x, sigma)
    denoiser.load_state_dict({k: 1.1 * v for k, v in denoiser.state_dict().items()})
    with pytest.raises(ValueError, match="has changed since it was packed; call"):
        denoiser(x, sigma)
    pack(denoiser)
    after = denoiser(x, sigma)
    unpack(denoiser)
    torch.testing.assert_close(after, denoiser(x, sigma), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)
    pack(denoiser)
    denoiser.classifier.stem.weight = nn.Parameter(torch.zeros(8, 4, 3, 3), requires_grad=False)
    with pytest.raises(ValueError, match="changed since"):
        denoiser(x, sigma)
    pack(denoiser)
    denoiser.classifier.head.bias.add_(1.0)
    if library.problem() == "":
        with pytest.raises(ValueError, match="changed since"):
            denoiser(x, sigma)


def test_state_hash_and_copies_know_nothing_of_it():
    denoiser = frozen()
    keys, digest = list(denoiser.state_dict()), weights_hash(denoiser)
    pack(denoiser)
    assert list(denoiser.state_dict()) == keys
    assert weights_hash(denoiser) == digest
    twin = copy.deepcopy(denoiser)
    kinds = (Conv2d, Linear) if library.problem() == "" else Conv2d
    assert all(m.prepared is None for m in twin.modules() if isinstance(m, Conv2d | Linear))
    assert all(m.prepared is not None for m in denoiser.modules() if isinstance(m, kinds))
    twin.to(torch.bfloat16)
    assert pack(twin)


def test_what_cannot_be_packed_is_named():
    denoiser = frozen()
    assert obstacle(denoiser) == ""
    with pytest.raises(ValueError, match=r"float64; packed are float32 and bfloat16"):
        pack(copy.deepcopy(denoiser).double())
    with torch.device("meta"):
        elsewhere = TapDenoiser(small_classifier(), small_subnet(), SPACE, SigmaRange())
    assert "on meta" in obstacle(elsewhere.to("meta"))


@pytest.mark.parametrize("guided", [False, True])
def test_bits_of_a_sample_depend_neither_on_the_batch_nor_on_its_neighbours(guided):
    native_or_skip()
    # embeddings fill whole vectors, as those of every preset do
    classifier = replace(CLASSIFIER, emb_dim=32)
    subnet = randomise(ScoreSubnet(replace(SUBNET, emb_dim=32), classifier), seed=2)
    denoiser = TapDenoiser(small_classifier(classifier), subnet, SPACE, SigmaRange())
    denoiser.eval().requires_grad_(False)
    assert all(c.emb_dim % 32 == 0 for c in (*CLASSIFIERS.values(), *SUBNETS.values()))
    pack(denoiser)
    x, sigma = inputs(16)
    label, gamma = torch.arange(16) % 5 - 1, torch.linspace(0, 9, 16)
    args = (x, sigma, label, gamma) if guided else (x, sigma)
    together = denoiser(*args)
    for size in (1, 2, 3, 8):
        for i in range(0, 16 - size, size):
            some = denoiser(*(t[i : i + size] for t in args))
            assert torch.equal(some, together[i : i + size])
    if guided:
        # no label beside labels is what it is alone
        assert torch.equal(together[label < 0], denoiser(x, sigma)[label < 0])


DIGEST = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import test_packed
print(test_packed.digest())
"""


def digest() -> str:
    denoiser = frozen()
    pack(denoiser)
    x, sigma = inputs(3)
    with torch.no_grad():
        out = [denoiser(*(t[i : i + 1] for t in (x, sigma, LABEL, GAMMA))) for i in range(3)]
        again = [denoiser(*(t[i : i + 1] for t in (x, sigma, LABEL, GAMMA))) for i in range(3)]
    assert all(map(torch.equal, out, again))
    return hashlib.sha256(torch.cat(out).numpy().tobytes()).hexdigest()


def test_one_sample_has_the_same_bits_in_every_call_and_process():
    code = DIGEST.format(tests=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest()
