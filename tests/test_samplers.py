"""Samplers on a Gaussian mixture whose score, class gradient and posterior are known exactly."""

import functools
import itertools
import math

import pytest
import torch
from oracles.mixture import Mixture, three_classes
from oracles.plain import Plain
from torch.utils._python_dispatch import TorchDispatchMode

from fastscore.config import SigmaRange
from fastscore.noise import NoiseSource
from fastscore.samplers import (
    SAMPLERS,
    Churn,
    Guidance,
    Precision,
    SamplingCancelledError,
    dpmpp_2m,
    euler,
    heun,
    initial_state,
    predictor_corrector,
    schedule_for,
)
from fastscore.sde import EDM, VE, VP, SubVP, karras_sigmas

DOUBLE = Precision(torch.float64, torch.float64)
RANGE = SigmaRange(0.01, 40.0)
MIXTURE = three_classes()


def error(x, reference):
    return float((x - reference).square().mean().sqrt())


@pytest.fixture(scope="module")
def start():
    draws = MIXTURE.draw(24, 10.0, torch.Generator().manual_seed(1))
    return draws.view(24, 1, 2, 2)


@pytest.fixture(scope="module", params=["unguided", "guided"])
def guidance(request):
    if request.param == "unguided":
        return Guidance()
    generator = torch.Generator().manual_seed(2)
    label = torch.randint(-1, 3, (24,), generator=generator)
    return Guidance(label, torch.linspace(0, 4, 24))


@pytest.fixture(scope="module")
def reference(start, guidance):
    sigmas = karras_sigmas(769, 0.05, 10.0)
    return heun(MIXTURE, start, sigmas, guidance=guidance, precision=DOUBLE).x


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        pytest.param(euler, 1, id="euler"),
        pytest.param(dpmpp_2m, 2, id="dpmpp_2m"),
        *(
            pytest.param(functools.partial(heun, sde=sde), 2, id=f"heun-{sde.name}")
            for sde in (EDM(), VP(), SubVP(), VE())
        ),
    ],
)
def test_order_on_the_ordinary_equation(start, guidance, reference, sampler, order):
    errors = []
    for n in (33, 65, 129):
        sigmas = karras_sigmas(n, 0.05, 10.0)
        result = sampler(MIXTURE, start, sigmas, guidance=guidance, precision=DOUBLE)
        errors.append(error(result.x, reference))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) > (0.95 if order == 1 else 1.8), slopes
    assert max(slopes) < order + 0.3, slopes
    assert errors[-1] < (2e-2 if order == 1 else 5e-4)


def test_gamma_one_is_the_exact_posterior(start):
    sigmas = karras_sigmas(12, 0.05, 10.0)
    for label in range(3):
        guidance = Guidance(torch.full((24,), label), 1.0)
        guided = heun(MIXTURE, start, sigmas, guidance=guidance, precision=DOUBLE)
        posterior = heun(MIXTURE.given(label), start, sigmas, precision=DOUBLE)
        torch.testing.assert_close(guided.x, posterior.x, rtol=1e-9, atol=1e-9)


def check_moments(x, mixture, bias):
    """Mean, covariance and component weights of draws [n, d] against the mixture's.

    ``bias`` is what the discretisation may add to 4.5 standard errors.
    """
    n = len(x)
    covariance = mixture.covariance()
    standard = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mixture.mean()).abs() < 4.5 * standard / n**0.5 + bias).all()
    centred = x - mixture.mean()
    products = centred[:, :, None] * centred[:, None, :]
    spread = 4.5 * products.std(0) / n**0.5
    assert ((products.mean(0) - covariance).abs() < spread + bias).all()
    sigma = torch.full((n,), RANGE.min, dtype=torch.float64)
    share = mixture.log_joint(x, sigma).softmax(1).mean(0)
    weights = mixture.weights
    assert ((share - weights).abs() < 4.5 * (weights * (1 - weights) / n).sqrt() + bias / 2).all()


@pytest.mark.parametrize(
    "name",
    [
        "em_vp",
        "em_subvp",
        "em_ve",
        "em_edm",
        "euler_ancestral",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "heun_churn",
    ],
)
def test_stochastic_samplers_draw_from_the_mixture(name):
    n = 4000
    noise = NoiseSource(range(n))
    x = initial_state(noise, (n, 1, 2, 2), RANGE.max)
    sigmas = schedule_for(name, 101, RANGE)
    result = SAMPLERS[name].run(MIXTURE, x, sigmas, noise=noise)
    check_moments(result.x.flatten(1).double(), MIXTURE, bias=0.06)


@pytest.mark.parametrize(
    "name", ["dpmpp_2m_sde", "dpmpp_3m_sde", "euler_ancestral", "em_vp", "heun", "unipc"]
)
def test_guided_samples_follow_the_posterior(name):
    n = 3000
    noise = NoiseSource(range(n))
    # neighbours with other labels, and every fourth sample unguided
    label = torch.arange(n) % 4 - 1
    gamma = torch.ones(n)
    x = initial_state(noise, (n, 1, 2, 2), RANGE.max)
    sigmas = schedule_for(name, 61, RANGE)
    result = SAMPLERS[name].run(MIXTURE, x, sigmas, noise=noise, guidance=Guidance(label, gamma))
    draws = result.x.flatten(1).double()
    check_moments(draws[label == -1], MIXTURE, bias=0.08)
    for y in range(3):
        check_moments(draws[label == y], MIXTURE.given(y), bias=0.08)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda sde: sde.name)
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_predictor_corrector_draws_from_a_mixture(sde, predictor):
    # norms of scores and noise, which set the corrector's step, only settle in many dimensions
    size, n = 256, 300
    mixture = Mixture(
        torch.stack((torch.full((size,), 0.5), torch.full((size,), -0.25))).double(),
        torch.tensor([0.3, 0.6], dtype=torch.float64),
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.tensor([0, 1]),
    )
    noise = NoiseSource(range(n))
    x = initial_state(noise, (n, 1, 16, 16), RANGE.max)
    sigmas = schedule_for(f"pc_{sde.name}", 101, RANGE)
    run = functools.partial(predictor_corrector, sde=sde, predictor=predictor)
    draws = run(mixture, x, sigmas, noise=noise).x.flatten(1).double()
    first = (draws.mean(1) > 0.125).double()
    assert abs(float(first.mean()) - 0.4) < 4.5 * math.sqrt(0.24 / n)
    for which, mean, variance in ((first == 1, 0.5, 0.3), (first == 0, -0.25, 0.6)):
        cluster = draws[which]
        assert abs(float(cluster.mean()) - mean) < 0.02
        within = float((cluster - cluster.mean(0)).square().mean()) * len(cluster)
        # unadjusted Langevin steps of this size widen or narrow what they keep by a few per cent
        assert within / (len(cluster) - 1) == pytest.approx(variance, rel=0.08)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sample_does_not_know_its_batch(name):
    seeds = [5, 11, 2**50, 3, 5]
    label = torch.tensor([2, -1, 0, 9, 2])
    gamma = torch.tensor([3.0, 1.0, 0.0, 0.5, 1.5])
    shape = (1, 9, 7)
    sigmas = schedule_for(name, 13, RANGE)

    def draw(rows):
        noise = NoiseSource([seeds[i] for i in rows])
        x = initial_state(noise, (len(rows), *shape), RANGE.max)
        guidance = Guidance(label[rows], gamma[rows], (0.1, 10.0))
        return SAMPLERS[name].run(Plain(), x, sigmas, noise=noise, guidance=guidance).x

    together = draw([0, 1, 2, 3, 4])
    assert torch.equal(draw([4, 3, 2, 1, 0]).flip(0), together)
    for i in range(5):
        assert torch.equal(draw([i])[0], together[i])
    assert not torch.equal(together[0], together[4])


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("budget", [1, 2, 3, 12, 25])
def test_evaluations_are_as_announced(name, budget):
    spec = SAMPLERS[name]
    sigmas = schedule_for(name, budget, RANGE)
    denoise = Plain()
    noise = NoiseSource([1, 2])
    x = initial_state(noise, (2, 1, 4, 4), sigmas[0])
    kept = x.clone()
    seen = []
    result = spec.run(
        denoise, x, sigmas, noise=noise, callback=lambda *state: seen.append(state[:2])
    )
    assert result.nfe == len(denoise.calls) == spec.nfe(len(sigmas) - 1)
    assert budget - spec.evaluations < result.nfe <= budget
    assert result.sigmas == sigmas
    assert result.x.dtype == torch.float32
    assert result.x.shape == x.shape
    assert torch.equal(x, kept)
    assert [step for step, _ in seen] == list(range(len(sigmas) - 1))
    assert all(RANGE.min <= sigma <= RANGE.max for _, sigma in seen)
    for sigma, label, gamma in denoise.calls:
        assert sigma.dtype == torch.float32
        assert sigma.shape == (2,)
        assert label is None
        assert gamma is None


def test_stochastic_samplers_say_so():
    for spec in SAMPLERS.values():
        x = torch.ones(1, 1, 2, 2)
        sigmas = schedule_for(spec, 5, RANGE)
        if not spec.stochastic:
            spec.run(Plain(), x, sigmas)
            continue
        with pytest.raises(ValueError, match="stochastic; pass noise"):
            spec.run(Plain(), x, sigmas)
        one, two = (spec.run(Plain(), x, sigmas, noise=NoiseSource([seed])).x for seed in (0, 1))
        assert not torch.equal(one, two)


def test_guidance_interval_drops_the_label():
    denoise = Plain()
    guidance = Guidance(torch.tensor([1]), 2.0, (0.3, 8.0))
    sigmas = (40.0, 8.0, 2.0, 0.3, 0.1, 0.0)
    heun(denoise, torch.ones(1, 1, 2, 2), sigmas, guidance=guidance)
    guided = {round(float(sigma), 6): label is not None for sigma, label, _ in denoise.calls}
    assert guided == {40.0: False, 8.0: True, 2.0: True, 0.3: False, 0.1: False}
    assert all((label is None) == (gamma is None) for _, label, gamma in denoise.calls)


def test_callback_cancels():
    denoise = Plain()
    with pytest.raises(SamplingCancelledError, match="step 3 after 7 evaluations") as caught:
        heun(
            denoise,
            torch.ones(1, 1, 2, 2),
            karras_sigmas(10, 0.01, 40.0),
            callback=lambda step, sigma, x, x0: step < 3,
        )
    assert (caught.value.step, caught.value.nfe, len(denoise.calls)) == (3, 7, 7)

    def fails(step, sigma, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        euler(Plain(), torch.ones(1, 1, 2, 2), karras_sigmas(10, 0.01, 40.0), callback=fails)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_double_state_with_a_single_precision_denoiser(name):
    seen = []

    def denoise(x, sigma, label, gamma):
        assert x.dtype == sigma.dtype == gamma.dtype == torch.float32
        return Plain()(x, sigma, label, gamma)

    def run(precision):
        noise = NoiseSource([4])
        x = initial_state(noise, (1, 1, 4, 4), 40.0)
        return (
            SAMPLERS[name]
            .run(
                denoise,
                x,
                schedule_for(name, 25, RANGE),
                noise=noise,
                precision=precision,
                guidance=Guidance(torch.tensor([2]), 1.5),
                callback=lambda step, sigma, x, x0: seen.append((x.dtype, x0.dtype)),
            )
            .x
        )

    mixed = run(Precision(torch.float64, torch.float32))
    assert set(seen) == {(torch.float64, torch.float64)}
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(run(Precision()), mixed, rtol=2e-5, atol=2e-5)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value would be read by the host, which waits for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} inside the sampling loop")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_loop_reads_no_tensor(name):
    guard = NoHostReads()
    values = torch.randn(2, 1, 4, 4)
    entered = []

    def denoise(x, sigma, label, gamma):
        # checks of label and gamma come before the first evaluation and may read them
        if not entered:
            entered.append(True)
            guard.__enter__()
        return Plain()(x, sigma, label, gamma)

    try:
        SAMPLERS[name].run(
            denoise,
            values * 40,
            schedule_for(name, 9, RANGE),
            noise=lambda step, shape, draw=0: values,
            guidance=Guidance(torch.tensor([1, -1]), torch.tensor([1.0, 2.0])),
        )
    finally:
        guard.__exit__(None, None, None)
    with pytest.raises(AssertionError, match="inside the sampling loop"), NoHostReads():
        float(values.sum())


def test_churn_stays_inside_the_trained_range():
    denoise = Plain()
    sigmas = karras_sigmas(8, 0.01, 40.0)
    noise = NoiseSource([0])
    heun(denoise, torch.ones(1, 1, 2, 2), sigmas, churn=Churn(), noise=noise)
    levels = [float(sigma[0]) for sigma, _, _ in denoise.calls]
    assert max(levels) == 40.0
    # the first level stays, the second is raised by sqrt(2)
    assert levels[2] == pytest.approx(sigmas[1] * math.sqrt(2), rel=1e-6)
