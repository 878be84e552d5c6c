"""Single-evaluation plans: identities between them, and their weak order, measured exactly.

For Gaussian data the denoiser is affine, so every output is an affine function of the start and of
the noise of each step. Exciting one of these at a time gives the exact mean and variance of the
output: the order of a stochastic sampler without a single random number.
"""

import functools
import math

import numpy as np
import pytest
import torch

from fastscore.plans import (
    ancestral_plan,
    dpmpp_2m_plan,
    dpmpp_2m_sde_plan,
    dpmpp_3m_sde_plan,
    euler_maruyama_plan,
    euler_plan,
    reverse_diffusion_plan,
)
from fastscore.samplers import (
    Precision,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    euler_maruyama,
    heun,
    predictor_corrector,
    unipc,
)
from fastscore.sde import EDM, VE, VP, SubVP, exponential_sigmas, karras_sigmas, uniform_sigmas

DOUBLE = Precision(torch.float64, torch.float64)
LOW, HIGH = 0.05, 10.0
MEAN, VARIANCE = 0.7, 0.3
# the last step returns E[x0 | x] at LOW, whose variance is below that of the data
EXACT = VARIANCE**2 / (VARIANCE + LOW**2)


def gaussian(x, sigma, label, gamma):
    noise = sigma[:, None] ** 2
    return (VARIANCE * x + noise * MEAN) / (VARIANCE + noise)


def moments(sampler, sigmas):
    """Exact mean and variance of the output of a sampler that draws once a step."""
    rows = len(sigmas) + 1

    def one_at_a_time(step, shape, draw=0):
        z = torch.zeros(shape, dtype=torch.float64)
        z[step + 1] = 1  # step counts from 1
        return z

    x = torch.full((rows, 1), MEAN, dtype=torch.float64)
    x[1] += math.sqrt(VARIANCE + HIGH**2)
    out = sampler(gaussian, x, sigmas, noise=one_at_a_time, precision=DOUBLE).x[:, 0]
    return float(out[0]), float((out[1:] - out[0]).square().sum())


def uniform(sde):
    return lambda n: uniform_sigmas(n, LOW, HIGH, sde)


def karras(n):
    return karras_sigmas(n, LOW, HIGH)


reverse_diffusion = functools.partial(predictor_corrector, corrector_steps=0)
ancestral_predictor = functools.partial(reverse_diffusion, sde=VP(), predictor="ancestral")


@pytest.mark.parametrize(
    ("sampler", "schedule", "order"),
    [
        pytest.param(euler, karras, 1, id="euler"),
        pytest.param(euler_ancestral, karras, 1, id="ancestral"),
        pytest.param(functools.partial(euler_ancestral, eta=0.5), karras, 1, id="ancestral-half"),
        pytest.param(ancestral_predictor, uniform(VP()), 1, id="ancestral-predictor"),
        *(
            pytest.param(functools.partial(sampler, sde=sde), schedule, 1, id=f"{name}-{sde.name}")
            for sde, schedule in (
                (VP(), uniform(VP())),
                (SubVP(), uniform(SubVP())),
                (VE(), uniform(VE())),
                (EDM(), karras),
            )
            for name, sampler in (("em", euler_maruyama), ("rd", reverse_diffusion))
        ),
        pytest.param(heun, karras, 2, id="heun"),
        pytest.param(dpmpp_2m, karras, 2, id="dpmpp-2m"),
        pytest.param(dpmpp_2m_sde, karras, 2, id="dpmpp-2m-sde-midpoint"),
        pytest.param(
            functools.partial(dpmpp_2m_sde, solver="heun"), karras, 2, id="dpmpp-2m-sde-heun"
        ),
        pytest.param(functools.partial(dpmpp_2m_sde, eta=0.5), karras, 2, id="dpmpp-2m-sde-half"),
        pytest.param(functools.partial(unipc, order=1), karras, 2, id="unipc-1"),
        pytest.param(unipc, karras, 3, id="unipc-2"),
        *(
            pytest.param(
                functools.partial(dpmpp_3m_sde, eta=eta), karras, 2, id=f"dpmpp-3m-sde-{eta}"
            )
            for eta in (0.0, 0.5, 1.0)
        ),
    ],
)
def test_weak_order(sampler, schedule, order):
    errors = []
    for n in (65, 129, 257):
        mean, variance = moments(sampler, schedule(n))
        errors.append((abs(mean - MEAN), abs(variance - EXACT)))
    means, variances = np.array(errors).T
    slopes = np.log2(variances[:-1] / variances[1:])
    assert (slopes > order - 0.12).all(), slopes
    # for a step as fine as this the constant is small as well
    assert variances[-1] < (0.05 if order == 1 else 6e-4) * EXACT
    # the mean is kept exactly, except where the SDE's own drift is discretised
    assert means[-1] < 1e-12 or (np.log2(means[:-1] / means[1:]) > order - 0.08).all()


def test_the_whole_parabola_is_worth_an_order():
    """On the ODE: with half of it, as published, DPM-Solver++(3M) is of second order."""
    errors = {}
    for solver in ("published", "exact"):
        sampler = functools.partial(dpmpp_3m_sde, eta=0.0, solver=solver)
        errors[solver] = [abs(moments(sampler, karras(n))[1] - EXACT) for n in (65, 129)]
    gain = {solver: math.log2(coarse / fine) for solver, (coarse, fine) in errors.items()}
    assert gain["published"] < 2.1
    assert gain["exact"] > 2.7
    assert errors["exact"][1] < errors["published"][1] / 5


def test_the_parabola_takes_its_exact_integral():
    """x0 quadratic in lambda is followed without error once there are three answers."""
    sigmas = exponential_sigmas(5, 0.5, 3.0)
    levels = [-math.log(sigma) for sigma in sigmas[:-1]]

    def answer(at):
        return 0.3 - 1.1 * at + 0.8 * at * at

    step = dpmpp_3m_sde_plan(sigmas, eta=0.0, solver="exact")[2]
    moved = step.keep * 1.7 + step.pull * answer(levels[2])
    moved += step.pull_old * answer(levels[1]) + step.pull_older * answer(levels[0])
    # dx / dlambda = x0 - x from 1.7: the quadratic that solves it, and what decays
    particular = [
        value - (2 * 0.8 * at - 1.1) + 2 * 0.8 for at, value in ((t, answer(t)) for t in levels)
    ]
    expected = particular[3] + (1.7 - particular[2]) * sigmas[3] / sigmas[2]
    assert moved == pytest.approx(expected, rel=1e-12)


def test_noise_free_limits():
    sigmas = karras(12)
    assert ancestral_plan(sigmas, eta=0.0) == pytest.approx(euler_plan(sigmas))
    assert dpmpp_2m_sde_plan(sigmas, eta=0.0) == dpmpp_2m_plan(sigmas)
    for make in (ancestral_plan, dpmpp_2m_sde_plan, dpmpp_3m_sde_plan):
        assert all(step.kick == 0 for step in make(sigmas, s_noise=0.0))
    assert all(step.kick == 0 for step in dpmpp_3m_sde_plan(sigmas, eta=0.0))
    # two steps and fewer know no parabola: the line of the second order
    for solver in ("published", "exact"):
        few = dpmpp_3m_sde_plan(sigmas[-4:], solver=solver)
        assert few == dpmpp_2m_sde_plan(sigmas[-4:], solver="heun")


def test_ancestral_draws_from_the_exact_posterior():
    # q(x' | x, x0): mean and variance of two gaussians multiplied
    for (high, low), step in zip(
        zip(karras(9), karras(9)[1:-1], strict=False), ancestral_plan(karras(9)), strict=False
    ):
        variance = 1 / (1 / low**2 + 1 / (high**2 - low**2))
        assert step.keep == pytest.approx(variance / (high**2 - low**2), rel=1e-12)
        assert step.pull == pytest.approx(variance / low**2, rel=1e-12)
        assert step.kick == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_reverse_diffusion_of_song():
    sigmas = uniform_sigmas(20, LOW, HIGH, VP())
    for i, step in enumerate(reverse_diffusion_plan(sigmas, VP())[:-1]):
        # algorithm 3: x' = (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z in x_t
        alpha, alpha_next = (float(VP().alpha(VP().t(sigmas[j]))) for j in (i, i + 1))
        beta = 1 - (alpha / alpha_next) ** 2
        pull = beta / (alpha * alpha_next * sigmas[i] ** 2)
        assert step.pull == pytest.approx(pull, rel=1e-9)
        assert step.kick == pytest.approx(math.sqrt(beta) / alpha_next, rel=1e-9)
        keep = (2 - math.sqrt(1 - beta)) * alpha / alpha_next
        assert step.keep + step.pull == pytest.approx(keep, rel=1e-9)
    for i, step in enumerate(reverse_diffusion_plan(sigmas, EDM())[:-1]):
        # algorithm 2: x' = x + (sigma^2 - sigma'^2) score + sqrt(sigma^2 - sigma'^2) z
        gap = sigmas[i] ** 2 - sigmas[i + 1] ** 2
        assert step.pull == pytest.approx(gap / sigmas[i] ** 2, rel=1e-9)
        assert step.keep == pytest.approx(1 - gap / sigmas[i] ** 2, rel=1e-9)
        assert step.kick == pytest.approx(math.sqrt(gap), rel=1e-9)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda sde: sde.name)
def test_euler_maruyama_is_one_explicit_step(sde):
    sigmas = exponential_sigmas(6, LOW, HIGH)
    x, x0, z = 1.3, -0.4, 0.7
    for i, step in enumerate(euler_maruyama_plan(sigmas, sde)[:-1]):
        t, t_next = float(sde.t(sigmas[i])), float(sde.t(sigmas[i + 1]))
        score = (x0 - x) / sigmas[i] ** 2
        x_t = x * sde.alpha(t)
        moved = x_t + sde.reverse_drift(x_t, t, score) * (t_next - t)
        moved += sde.diffusion(t) * math.sqrt(t - t_next) * z
        got = step.keep * x + step.pull * x0 + step.kick * z
        assert got == pytest.approx(moved / sde.alpha(t_next), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ancestral_plan(s, eta=1.5), "eta 1.5"),
        (lambda s: ancestral_plan(s, eta=math.nan), "eta nan"),
        (lambda s: dpmpp_2m_sde_plan(s, eta=-1), "eta -1"),
        (lambda s: dpmpp_2m_sde_plan(s, eta=math.inf), "eta inf"),
        (lambda s: dpmpp_2m_sde_plan(s, s_noise=-1), "s_noise -1"),
        (lambda s: dpmpp_2m_sde_plan(s, solver="euler"), "choose midpoint or heun"),
        (lambda s: dpmpp_3m_sde_plan(s, eta=-1), "eta -1"),
        (lambda s: dpmpp_3m_sde_plan(s, s_noise=math.nan), "s_noise nan"),
        (lambda s: dpmpp_3m_sde_plan(s, solver="heun"), "choose published or exact"),
    ],
)
def test_bad_plans(call, message):
    with pytest.raises(ValueError, match=message):
        call(karras(5))


class TestNoiseBelow:
    LEVELS = (40.0, 6.0, 2.0, 0.5, 0.1, 0.0)

    def test_scales_the_noise_of_low_levels_alone(self):
        plain = dpmpp_2m_sde_plan(self.LEVELS)
        scaled = dpmpp_2m_sde_plan(self.LEVELS, s_noise=0.7, s_noise_below=2.0)
        ratios = [b.kick / a.kick for a, b in zip(plain[:-1], scaled[:-1], strict=True)]
        assert ratios == pytest.approx([1.0, 0.7, 0.7, 0.7])
        for one, two in zip(plain, scaled, strict=True):
            assert (one.keep, one.pull, one.pull_old) == (two.keep, two.pull, two.pull_old)
        assert dpmpp_2m_sde_plan(self.LEVELS, s_noise=0.7, s_noise_below=6.0) == dpmpp_2m_sde_plan(
            self.LEVELS, s_noise=0.7
        )

    @pytest.mark.parametrize("level", [0.0, -1.0, float("nan")])
    def test_refuses_what_is_no_level(self, level):
        with pytest.raises(ValueError, match=r"s_noise_below .* must be a noise level above 0"):
            dpmpp_2m_sde_plan(self.LEVELS, s_noise_below=level)
