"""EDM scalings, and the denoiser against its formula written out by hand."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import (
    CLASSIFIER,
    SPACE,
    SUBNET,
    inputs,
    keep_double,
    small_classifier,
    small_denoiser,
)
from test_taps import by_autograd
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, SUBNETS, MelSpace, SigmaRange
from fastscore.denoiser import TapDenoiser, scalings, score_from_denoised, set_precision
from fastscore.layers import set_backend
from fastscore.subnet import ScoreSubnet
from fastscore.taps import read_taps

LABEL = torch.tensor([2, -1, 0, 3])
GAMMA = torch.tensor([1.0, 5.0, 0.0, 3.0])


def test_scalings_are_those_of_edm():
    sigma = torch.tensor([0.01, 0.5, 1.0, 40.0], dtype=torch.float64)
    for i, s in enumerate(sigma.tolist()):
        c = [float(v[i]) for v in scalings(sigma, 0.5)]
        total = s**2 + 0.25
        expected = [0.25 / total, s * 0.5 / math.sqrt(total), 1 / math.sqrt(total), math.log(s) / 4]
        assert c == pytest.approx(expected, rel=1e-12)


def test_scalings_keep_input_and_target_at_unit_variance():
    """What they were derived from (Karras et al. 2022, appendix B.6)."""
    sigma = torch.logspace(-2, 1.6, 50, dtype=torch.float64)
    data = 0.7
    c = scalings(sigma, data)
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c.c_in.square() * (sigma.square() + data**2), one)
    target = ((1 - c.c_skip) ** 2 * data**2 + c.c_skip**2 * sigma**2) / c.c_out**2
    torch.testing.assert_close(target, one)


def by_hand(
    x: Tensor,
    sigma: Tensor,
    label: Tensor | None = None,
    gamma: Tensor | None = None,
    denoiser: TapDenoiser | None = None,
) -> Tensor:
    """D + gamma sigma^2 grad_x log p(y|x), the gradient taken by autograd through c_in x."""
    model = copy.deepcopy(denoiser or small_denoiser()).to(x.dtype).requires_grad_(True)
    classifier, subnet = model.classifier, model.subnet
    s, data = sigma.numpy()[:, None, None, None], SPACE.sigma_data
    total = s**2 + data**2
    c_skip, c_out, c_in = (
        torch.from_numpy(np.asarray(v, dtype=s.dtype))
        for v in (data**2 / total, s * data / np.sqrt(total), 1 / np.sqrt(total))
    )
    c_noise = sigma.log() / 4
    taps = by_autograd(classifier, c_in * x, c_noise, torch.full((len(x),), -1))
    out = c_skip * x + c_out * subnet(c_in * x, c_noise, taps.features, taps.gradients)
    if label is not None and gamma is not None:
        leaf = x.clone().requires_grad_()
        log_p = classifier(c_in * leaf, c_noise).log_softmax(dim=1)
        chosen = sum(log_p[i, y] for i, y in enumerate(label.tolist()) if y >= 0)
        (slope,) = torch.autograd.grad(chosen, leaf)
        out = out + gamma[:, None, None, None] * torch.from_numpy(s**2) * slope
    return out.detach()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_formula_by_hand(dtype, tolerance, guided, monkeypatch):
    keep_double(monkeypatch)
    x, sigma = (t.to(dtype) for t in inputs(4))
    guidance = (LABEL, GAMMA.to(dtype)) if guided else (None, None)
    actual = small_denoiser().to(dtype)(x, sigma, *guidance)
    expected = by_hand(x, sigma, *guidance)
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_guidance_acts_where_it_is_asked_for_only():
    denoiser = small_denoiser()
    x, sigma = inputs(4)
    plain = denoiser(x, sigma)
    guided = denoiser(x, sigma, LABEL, GAMMA)
    moved = (guided - plain).abs().amax(dim=(1, 2, 3))
    # label -1 in slot 1, gamma 0 in slot 2; their gradient taps went back in a larger batch
    assert (moved[1:3] <= 1e-5 * plain[1:3].abs().amax(dim=(1, 2, 3))).all()
    assert (moved[[0, 3]] > 1e-3 * (GAMMA * sigma.square())[[0, 3]]).all()
    twice = denoiser(x, sigma, LABEL, 2 * GAMMA)
    torch.testing.assert_close(twice - plain, 2 * (guided - plain), rtol=1e-4, atol=1e-4)


def test_a_small_guided_step_raises_the_label_s_probability():
    denoiser = small_denoiser()
    x, sigma = inputs(4)
    label = torch.tensor([2, 1, 0, 3])
    slope = score_from_denoised(x, denoiser(x, sigma, label, torch.ones(4)), sigma)
    slope = slope - score_from_denoised(x, denoiser(x, sigma), sigma)
    step = 0.05 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    index = torch.arange(4)
    before, after = (
        denoiser.class_logits(at, sigma).log_softmax(dim=1)[index, label] for at in (x, x + step)
    )
    assert (after > before).all()


def test_score_from_denoised():
    x, sigma = inputs(3)
    denoised = torch.randn_like(x)
    for i in range(3):
        expected = (denoised[i] - x[i]) / sigma[i] ** 2
        torch.testing.assert_close(score_from_denoised(x, denoised, sigma)[i], expected)


def test_narrow_networks_take_and_return_fp32():
    denoiser = small_denoiser()
    x, sigma = inputs(4)
    exact = denoiser(x, sigma, LABEL, GAMMA)
    narrow = denoiser.bfloat16()(x, sigma, LABEL, GAMMA)
    assert narrow.dtype == torch.float32
    weight = scalings(sigma, SPACE.sigma_data).c_out + GAMMA * sigma
    error = (narrow - exact).abs().amax(dim=(1, 2, 3)) / weight
    # the networks' part is of order one: some roundings of 2^-8 over their depth
    assert (error < 0.2).all()
    # while the skip path is not rounded at all: at small sigma it is what counts
    assert (narrow[1] - exact[1]).abs().max() < 2**-5 * exact[1].abs().max()


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("guided", [False, True])
def test_bf16_stays_near_fp32_over_all_noise_levels(backend, guided):
    exact, narrow = small_denoiser().requires_grad_(False), small_denoiser().requires_grad_(False)
    set_precision(narrow, "bf16")
    set_backend(narrow, backend)
    sigma = torch.logspace(-2, math.log10(40), 16)
    x = 0.7 * torch.randn(16, 1, 16, 24) + sigma[:, None, None, None] * torch.randn(16, 1, 16, 24)
    guidance = (torch.arange(16) % 4, torch.full((16,), 3.0)) if guided else ()
    wide, small = exact(x, sigma, *guidance), narrow(x, sigma, *guidance)
    assert small.dtype == torch.float32
    # two roundings a layer, 2^-9 each, of some thirty layers, that add up at random; the skip path
    # is not rounded, so errors are measured by what the networks contribute
    networks = wide - scalings(sigma, SPACE.sigma_data).c_skip[:, None, None, None] * x
    error = (small - wide).flatten(1).norm(dim=1) / networks.flatten(1).norm(dim=1)
    assert (error <= 2 * math.sqrt(60) * 2**-9).all()
    assert (error > 2**-12).all()


def test_bf16_keeps_statistics_embeddings_and_sums_in_fp32():
    denoiser = small_denoiser()
    set_precision(denoiser, "bf16")
    kinds = {n: p.dtype for n, p in (*denoiser.named_parameters(), *denoiser.named_buffers())}
    narrow = {n for n, kind in kinds.items() if kind == torch.bfloat16}
    assert {n for n in kinds if "conv" in n or "fusion" in n or "stem" in n} <= narrow
    assert not {n for n in narrow if "embedding" in n or "norm" in n or "film" in n or "head" in n}
    x, sigma = inputs(4)
    parts = denoiser.parts(x, sigma, LABEL, GAMMA)
    assert parts.raw.dtype == parts.guidance.dtype == torch.bfloat16
    assert {t.dtype for t in parts[2:]} == {torch.float32}
    with pytest.raises(ValueError, match="rounded to bf16; load the model again"):
        set_precision(denoiser, "fp32")
    with pytest.raises(ValueError, match="precision 'fp8' is unknown; choose fp32 or bf16"):
        set_precision(denoiser, "fp8")


def test_frequencies_of_the_noise_embedding_are_never_rounded():
    denoiser = small_denoiser()
    freqs = denoiser.subnet.embedding.freqs.clone()
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        denoiser.to(kind)
        assert torch.equal(denoiser.subnet.embedding.freqs, freqs)
    assert torch.equal(denoiser.to("meta").to_empty(device="cpu").subnet.embedding.freqs, freqs)


@pytest.mark.parametrize("backend", ["reference", None])
def test_tiny_gradients_survive_bf16(backend):
    """A saturated classifier's: their direction is all that ScoreSubnet reads of them."""
    exact, narrow = small_denoiser().requires_grad_(False), small_denoiser().requires_grad_(False)
    for denoiser in (exact, narrow):
        denoiser.classifier.head.weight.mul_(1e-24)
    set_precision(narrow, "bf16")
    set_backend(narrow, backend)
    x, sigma = inputs(4)
    wide, small = (read_taps(d.classifier, x, sigma.log() / 4, LABEL) for d in (exact, narrow))
    for a, b in zip(
        (*small.gradients, small.guidance), (*wide.gradients, wide.guidance), strict=True
    ):
        assert 0 < b.abs().max() < 1e-23
        assert (a - b).norm() <= 0.05 * b.norm()
    out, expected = narrow(x, sigma), exact(x, sigma)
    assert (out - expected).abs().max() <= 0.05 * expected.abs().max()


def test_class_logits_are_the_classifier_s_at_scaled_input():
    denoiser = small_denoiser()
    x, sigma = inputs(3)
    logits = denoiser.class_logits(x, sigma)
    c_in = (sigma.square() + SPACE.sigma_data**2).rsqrt()
    expected = small_classifier()(c_in[:, None, None, None] * x, sigma.log() / 4)
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad


def test_classifier_is_frozen_and_the_subnet_is_not():
    denoiser = small_denoiser().train()
    assert denoiser.subnet.training
    assert not any(m.training for m in denoiser.classifier.modules())
    x, sigma = inputs(2)
    denoiser(x, sigma, torch.tensor([1, 2]), torch.ones(2)).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in denoiser.classifier.parameters())
    assert all(p.grad is not None for p in denoiser.subnet.parameters())


def test_label_and_gamma_go_together():
    denoiser = small_denoiser()
    x, sigma = inputs(2)
    for label, gamma in ((torch.tensor([0, 1]), None), (None, torch.ones(2))):
        with pytest.raises(ValueError, match="label and gamma together"):
            denoiser(x, sigma, label, gamma)


@pytest.mark.parametrize("switches", [(True, False), (False, True)])
def test_ablations_stay_guided(switches):
    feature, gradient = switches
    denoiser = small_denoiser(replace(SUBNET, feature_taps=feature, gradient_taps=gradient))
    x, sigma = inputs(4)
    plain, guided = denoiser(x, sigma), denoiser(x, sigma, LABEL, GAMMA)
    assert plain.isfinite().all()
    assert not torch.equal(plain, guided)
    reference = small_denoiser()
    torch.testing.assert_close(
        guided - plain,
        reference(x, sigma, LABEL, GAMMA) - reference(x, sigma),
        rtol=1e-3,
        atol=1e-4,
    )


def test_guided_step_traces_to_one_flat_graph_that_serves_every_label_and_strength():
    denoiser = small_denoiser().requires_grad_(False)
    x, sigma = inputs(4)
    graph = make_fx(lambda *args: denoiser(*args))(x, sigma, LABEL, GAMMA)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {node.op for node in graph.graph.nodes} <= {
        "placeholder",
        "get_attr",
        "call_function",
        "output",
    }
    assert all(isinstance(t, torch._ops.OpOverload) for t in calls if "getitem" not in str(t))
    x, sigma = inputs(4, seed=9)
    args = (x, sigma.flip(0), torch.tensor([-1, 1, 1, -1]), torch.tensor([2.0, 0.0, 8.0, 1.0]))
    torch.testing.assert_close(graph(*args), denoiser(*args), rtol=1e-4, atol=1e-4)


def test_cost_of_the_paper_preset_s_steps():
    """Published: 12.07 GMACs an unguided step and 16.44 a guided one, 12.3 M parameters in all."""
    with torch.device("meta"):
        denoiser = TapDenoiser(
            Classifier(CLASSIFIERS["paper"]),
            ScoreSubnet(SUBNETS["paper"], CLASSIFIERS["paper"]),
            MelSpace(),
            SigmaRange(),
        ).requires_grad_(False)
        x, sigma = torch.empty(1, 1, 80, 64), torch.ones(1)
        label = torch.ones(1, dtype=torch.int64)

        def gmacs(*guidance: Tensor) -> float:
            with FlopCounterMode(display=False) as counter:
                denoiser(x, sigma, *guidance)
            return counter.get_total_flops() / 2e9

        unguided, guided = gmacs(), gmacs(label, torch.ones(1))
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(12.3e6, rel=0.03)
    # the pass for the gradient taps ends at the shallowest tap: at most what was published
    assert unguided < 12.07 * 1.03
    assert guided < 16.44 * 1.03
    # and guidance costs one more pass, down to the input
    assert guided - unguided == pytest.approx(4.4, rel=0.05)


def test_denoiser_keeps_the_classifier_s_configuration():
    assert small_denoiser().classifier.config == CLASSIFIER
