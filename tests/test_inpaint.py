"""Inpainting: what is known stays to the bit, and what is drawn follows from it."""

import math

import pytest
import torch

from fastscore import Pipeline
from fastscore.config import SigmaRange
from fastscore.inpaint import Inpainting, prefix_mask, region_mask
from fastscore.noise import NoiseSource
from fastscore.samplers import (
    SAMPLERS,
    Guidance,
    Precision,
    SamplingCancelledError,
    initial_state,
    schedule_for,
)

RANGE = SigmaRange(0.01, 40.0)
SHAPE = (6, 8)


class Blur:
    """A denoiser whose answer at a place depends on its neighbours, on the label and on gamma."""

    sigma_range = RANGE

    def __init__(self):
        self.asked = []

    def __call__(self, x, sigma, label, gamma):
        self.asked.append(x)
        noise = (sigma * sigma)[:, None, None, None]
        near = 0.6 * x + 0.2 * (x.roll(1, -1) + x.roll(-1, -1))
        x0 = (near * 0.4 + noise * 0.3) / (noise + 0.4)
        if label is not None:
            x0 = x0 + (gamma * (label + 1) * 0.1)[:, None, None, None] / (noise + 1)
        return x0


def given(count=1, dtype=torch.float32):
    return torch.randn(count, 1, *SHAPE, dtype=dtype)


def draw(inpainting, name="dpmpp_2m_sde", nfe=13, seeds=(5, 2**40, 7), denoise=None, **common):
    noise = NoiseSource(seeds)
    sigmas = schedule_for(name, nfe, RANGE)
    x = initial_state(noise, (len(seeds), 1, *SHAPE), sigmas[0])
    run = SAMPLERS[name].run
    return inpainting.sample(run, denoise or Blur(), x, sigmas, noise=noise, **common)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("nfe", [1, 4, 13])
def test_what_is_known_stays_to_the_bit(name, nfe):
    known, mask = given(3), torch.rand(3, 1, *SHAPE) < 0.5
    seen = []
    guidance = Guidance(torch.tensor([1, -1, 0]), 2.0)
    result = draw(
        Inpainting(known, mask),
        name,
        nfe,
        guidance=guidance,
        callback=lambda step, sigma, x, x0: seen.append(x0.clone()),
    )
    assert result.nfe == SAMPLERS[name].nfe(len(result.sigmas) - 1)
    assert len(seen) == len(result.sigmas) - 1
    for x in (result.x, *seen):
        assert x.shape == known.shape
        assert x.dtype == torch.float32
        assert torch.equal(x[mask], known[mask])
        assert x.isfinite().all()
        assert not (x[~mask] == known[~mask]).any()


@pytest.mark.parametrize("name", [n for n in SAMPLERS if not n.startswith("pc_")])
def test_without_correlation_the_rest_is_drawn_as_ever(name):
    """Element by element nothing can be learned from what is known, and nothing else changes."""
    # the corrector's step is set by the norm of the whole score, hence without predictor-correctors

    def alone(x, sigma, label, gamma):
        noise = (sigma * sigma)[:, None, None, None]
        return (x * 0.4 + noise * 0.3) / (noise + 0.4)

    mask = prefix_mask(3, SHAPE)
    noise, sigmas = NoiseSource((5, 6)), schedule_for(name, 9, RANGE)
    x = initial_state(noise, (2, 1, *SHAPE), sigmas[0])
    expected = SAMPLERS[name].run(alone, x, sigmas, noise=noise).x
    result = Inpainting(given(), mask).sample(SAMPLERS[name].run, alone, x, sigmas, noise=noise).x
    free = ~mask.expand_as(x)
    assert torch.equal(result[free], expected[free])


def test_a_sample_does_not_know_its_batch():
    known, mask = given(3), torch.rand(3, 1, *SHAPE) < 0.5
    whole = Inpainting(known, mask)
    together = draw(whole).x
    for i, seed in enumerate((5, 2**40, 7)):
        assert torch.equal(draw(whole.rows([i]), seeds=(seed,)).x[0], together[i])
    assert torch.equal(draw(whole.rows([2, 0]), seeds=(7, 5)).x, together[[2, 0]])
    one = Inpainting(known[:1], mask[:1])
    assert torch.equal(draw(one).x[0], together[0])
    assert torch.equal(draw(one.rows([0, 0, 0])).x, draw(one).x)
    # one mask for all values, and one sample's values under all masks
    assert torch.equal(draw(Inpainting(known, mask[:1])).x[0], together[0])
    assert torch.equal(draw(Inpainting(known[:1], mask)).x[0], together[0])


def test_the_denoiser_gets_known_plus_noise():
    """With imputation alone, x - known shrinks as sigma does, from the start to the end."""
    known, mask, denoise = given(), prefix_mask(4, SHAPE), Blur()
    result = draw(Inpainting(known, mask, strength=0.0), "dpmpp_2m", denoise=denoise)
    eps = initial_state(NoiseSource((5, 2**40, 7)), (3, 1, *SHAPE), 1.0)
    for x, sigma in zip(denoise.asked, result.sigmas, strict=False):
        there = mask.expand_as(x)
        torch.testing.assert_close(x[there], (known + sigma * eps)[there], rtol=1e-4, atol=1e-4)


def test_values_outside_the_mask_do_not_matter():
    known, mask = given(), prefix_mask(4, SHAPE)
    other = torch.where(mask, known, math.nan)
    assert torch.equal(draw(Inpainting(known, mask)).x, draw(Inpainting(other, mask)).x)


def test_precision_and_the_trained_range():
    known = given(dtype=torch.float64)
    mixed = draw(
        Inpainting(known, prefix_mask(4, SHAPE)), precision=Precision(torch.float64, torch.float32)
    )
    assert mixed.x.dtype == torch.float32
    assert torch.equal(mixed.x[0, ..., :4], known[0, ..., :4].float())
    around = Inpainting(known, prefix_mask(4, SHAPE)).around(Blur())
    assert around.sigma_range == RANGE
    with pytest.raises(ValueError, match="sigma 80 is outside the range"):
        SAMPLERS["euler"].run(around, given(), (80.0, 0.0))
    bare = Inpainting(known, prefix_mask(4, SHAPE)).around(lambda x, *others: x)
    assert SAMPLERS["euler"].run(bare, given(), (80.0, 0.0)).nfe == 1


def test_callback_cancels():
    with pytest.raises(SamplingCancelledError, match="step 2 after 3"):
        draw(Inpainting(given(), prefix_mask(4, SHAPE)), callback=lambda step, *state: step < 2)


class Correlated:
    """Gaussian data of sixteen values, each 0.9 correlated with the next; the first eight known."""

    def __init__(self):
        i = torch.arange(16, dtype=torch.float64)
        self.covariance = 0.9 ** (i[:, None] - i).abs()
        self.values, self.vectors = torch.linalg.eigh(self.covariance)
        self.mask = (i < 8).view(1, 1, 1, 16)
        z = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.known = (torch.linalg.cholesky(self.covariance) @ z).view(1, 1, 1, 16)
        free, kept = self.covariance[8:], self.covariance[:8, :8]
        gain = free[:, :8] @ torch.linalg.inv(kept)
        self.mean = gain @ self.known[0, 0, 0, :8]
        self.conditional = free[:, 8:] - gain @ free[:, :8].T

    def __call__(self, x, sigma, label, gamma):
        """E[x0 | x]."""
        shrink = self.values / (self.values + sigma.double()[:, None] ** 2)
        return (x.flatten(1).double() @ self.vectors * shrink @ self.vectors.T).view_as(x).to(x)

    def errors(self, strength, nfe, count=3000, name="dpmpp_2m_sde", **options):
        """Relative errors of the conditional mean and covariance of what a sampler draws."""
        noise, sigmas = NoiseSource(range(count)), schedule_for(name, nfe, SigmaRange(0.03, 20.0))
        x = initial_state(noise, (count, 1, 1, 16), sigmas[0])
        inpainting = Inpainting(self.known, self.mask, strength)
        x = inpainting.sample(SAMPLERS[name].run, self, x, sigmas, noise=noise, **options).x
        free = x.flatten(1)[:, 8:].double()
        mean, covariance = free.mean(0) - self.mean, free.T.cov() - self.conditional
        return float(mean.norm() / self.mean.norm()), float(
            covariance.norm() / self.conditional.norm()
        )


@pytest.fixture(scope="module")
def correlated():
    return Correlated()


def test_where_the_denoiser_says_known_its_answer_is_the_conditional_mean(correlated):
    """What the strength aims at: for Gaussian data the exact answer, at any level."""
    precision = torch.linalg.inv(correlated.covariance)
    for sigma in (0.1, 1.0, 10.0):
        level = torch.full((1,), sigma, dtype=torch.float64)
        noisy = 3 * torch.randn(8, dtype=torch.float64)
        # E[free | free + sigma eps = noisy, known], by bayes' rule on the conditional gaussian
        inverse = torch.linalg.inv(correlated.conditional)
        total = inverse + torch.eye(8, dtype=torch.float64) / sigma**2
        expected = torch.linalg.solve(total, inverse @ correlated.mean + noisy / sigma**2)
        x0 = torch.cat((correlated.known[0, 0, 0, :8], expected))
        x = x0 + sigma**2 * precision @ x0
        torch.testing.assert_close(x[8:], noisy, rtol=1e-9, atol=1e-9)
        answer = correlated(x.view(1, 1, 1, 16), level, None, None).flatten()
        torch.testing.assert_close(answer, x0, rtol=1e-9, atol=1e-9)


def test_more_mixing_leads_to_the_conditional_distribution(correlated):
    """Noise that comes and goes lets the rest and the known part's copy settle with each other."""
    few = correlated.errors(0.5, 30)
    more = correlated.errors(0.5, 100, eta=5.0)
    most = correlated.errors(0.5, 400, eta=20.0)
    assert few[0] > 1.5 * more[0] > 3 * most[0]
    assert few[1] > 2 * more[1]
    assert most[0] < 0.1
    # what 3000 draws leave open of a covariance of eight values is some 0.04
    assert most[1] < 0.12


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "euler_ancestral", "dpmpp_2m", "unipc", "heun"])
def test_strength_brings_the_rest_nearer_to_the_conditional(correlated, name):
    """Neither is exact in few steps: imputation alone keeps about half of the mean's distance."""
    errors = [correlated.errors(strength, 30, name=name) for strength in (0.0, 0.5, 1.0)]
    means, covariances = zip(*errors, strict=True)
    assert 0.42 < means[0] < 0.66
    assert means[1] < 0.9 * means[0]
    assert means[2] < 0.9 * means[1]
    assert covariances[1] < 0.9 * covariances[0]
    assert covariances[2] < 0.9 * covariances[1]


def test_speech_goes_on_across_the_seam():
    """The shipped networks on a digit's first half, told to make another digit of it."""
    pipe = Pipeline.from_pretrained("digits")
    denoise, defaults, shape = pipe.denoiser, pipe.defaults, (2, 1, 80, 64)
    sigmas = schedule_for(
        "dpmpp_2m_sde",
        12,
        denoise.sigma_range,
        schedule=defaults.schedule,
        sigma_min=defaults.sigma_min,
        sigma_max=defaults.sigma_max,
        options=defaults.schedule_options,
    )

    def run(label, seeds, inpainting=None):
        noise = NoiseSource(seeds)
        strength = defaults.guidance
        guidance = Guidance(torch.tensor([label] * 2), strength, defaults.guidance_interval)
        options = {"noise": noise, "guidance": guidance, **defaults.sampler_options}
        x, sampler = initial_state(noise, shape, sigmas[0]), SAMPLERS["dpmpp_2m_sde"].run
        if inpainting is None:
            return sampler(denoise, x, sigmas, **options).x
        return inpainting.sample(sampler, denoise, x, sigmas, **options).x

    def steps(x, frame):
        return float((x[..., frame] - x[..., frame - 1]).abs().mean())

    one, eight = run(1, (1, 2)), run(8, (3, 4))
    mask = prefix_mask(30, shape[2:])
    drawn = run(8, (3, 4), Inpainting(one, mask))
    assert torch.equal(drawn[..., :30], one[..., :30])
    around = max(steps(drawn, frame) for frame in (27, 28, 29, 31, 32, 33))
    assert steps(drawn, 30) < 1.5 * around
    # two digits put side by side do not fit
    assert steps(torch.where(mask, one, eight), 30) > 3 * around
    lowest = torch.full((2,), denoise.sigma_range.min)
    log_p = denoise.class_logits(torch.cat((one, drawn)), lowest.repeat(2)).log_softmax(1)
    assert (log_p[2:, 8] > log_p[:2, 8] + 3).all()


def test_masks():
    mask = prefix_mask(3, SHAPE)
    assert mask.shape == (1, 1, *SHAPE)
    assert mask.dtype == torch.bool
    assert mask.sum() == 18
    assert mask[..., :3].all()
    region = region_mask((1, 4), (2, 8), SHAPE)
    assert region.sum() == 18
    assert region[0, 0, 1:4, 2:8].all()


NAN, KEEP = given().fill_(math.nan), prefix_mask(3, SHAPE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Inpainting(given().long(), KEEP), "the known values are torch.int64"),
        (lambda: Inpainting(torch.ones(3), KEEP), r"of shape \(3,\); pass floats \[batch"),
        (lambda: Inpainting(given(), KEEP.float()), "mask is torch.float32; pass torch.bool"),
        (lambda: Inpainting(given(), KEEP[..., :5]), r"mask has shape \(1, 1, 6, 5\), which does"),
        (lambda: Inpainting(given(), KEEP[0, 0]), r"mask has shape \(6, 8\), which does not fit"),
        (lambda: Inpainting(given(2), KEEP.repeat(3, 1, 1, 1)), "which does not fit the known"),
        (lambda: Inpainting(given(), ~KEEP & KEEP), "keeps nothing; sample without inpainting"),
        (lambda: Inpainting(given(), KEEP | ~KEEP), "leaves nothing to draw of sample 0"),
        (
            lambda: Inpainting(given(2), torch.cat((KEEP, KEEP | ~KEEP))),
            "leaves nothing to draw of sample 1",
        ),
        (lambda: Inpainting(NAN, KEEP), "18 of 18 known values are not finite"),
        (lambda: Inpainting(given() / 0, KEEP), "18 of 18 known values are not finite"),
        (lambda: Inpainting(given(), KEEP, 1.5), "inpainting strength 1.5 must lie from 0 to 1"),
        (lambda: Inpainting(given(), KEEP, math.nan), "inpainting strength nan"),
        (lambda: draw(Inpainting(given(2), KEEP)), r"\(2, 1, 6, 8\) and the samples \(3, 1, 6, 8"),
        (lambda: Inpainting(given(), KEEP).finish(torch.ones(1, 1, 6, 9)), "of their size"),
        (lambda: prefix_mask(0, SHAPE), "a prefix of 0 frames .* choose 1 to 7"),
        (lambda: prefix_mask(8, SHAPE), "a prefix of 8 frames"),
        (lambda: region_mask((2, 2), (0, 3), SHAPE), "bands 2 .. 2 are empty or outside the 6"),
        (lambda: region_mask((0, 3), (5, 9), SHAPE), "frames 5 .. 9 are empty or outside the 8"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
