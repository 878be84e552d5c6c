"""Forward processes against their definitions, their own reverse dynamics, and the schedules."""

import itertools
import math

import numpy as np
import pytest

from fastscore.config import SigmaRange
from fastscore.sde import (
    EDM,
    SDES,
    VE,
    VP,
    SubVP,
    check_sigmas,
    cosine_sigmas,
    exponential_sigmas,
    karras_sigmas,
    leap_sigmas,
    uniform_sigmas,
)

ALL = [VP(), SubVP(), VE(), EDM(), VP(beta_min=0.5, beta_max=0.5), SubVP(0.2, 12.0)]
TIMES = np.linspace(0.02, 0.98, 25)
# gaussian data, for which every marginal and every solution is known
MEAN, VARIANCE = 0.7, 0.3


@pytest.fixture(params=ALL, ids=lambda sde: f"{sde.name}")
def sde(request):
    return request.param


def test_registry_names_every_process():
    assert {name: cls.name for name, cls in SDES.items()} == {
        name: name for name in ("vp", "subvp", "ve", "edm")
    }


def test_rates_are_derivatives(sde):
    step = 1e-6
    log_alpha = (np.log(sde.alpha(TIMES + step)) - np.log(sde.alpha(TIMES - step))) / (2 * step)
    np.testing.assert_allclose(sde.drift_rate(TIMES), log_alpha, rtol=1e-7, atol=1e-8)
    variance = (sde.sigma(TIMES + step) ** 2 - sde.sigma(TIMES - step) ** 2) / (2 * step)
    np.testing.assert_allclose(sde.variance_rate(TIMES), variance, rtol=1e-6)
    np.testing.assert_allclose(sde.s(TIMES), sde.alpha(TIMES) * sde.sigma(TIMES), rtol=1e-15)


def test_time_inverts_sigma(sde):
    np.testing.assert_allclose(sde.t(sde.sigma(TIMES)), TIMES, rtol=1e-12)
    assert float(sde.t(0.5)) == float(sde.t(np.array([0.5]))[0])


def test_marginal_variance_solves_the_forward_sde(sde):
    # d s^2 / dt = 2 f s^2 + g^2, integrated by Runge-Kutta from s^2(0.02)
    def rate(t, v):
        return 2 * sde.drift_rate(t) * v + sde.diffusion(t) ** 2

    variance = float(sde.s(0.02)) ** 2
    n = 400
    h = 0.96 / n
    for i in range(n):
        variance = runge_kutta(rate, 0.02 + i * h, variance, h)
    assert math.isclose(variance, float(sde.s(0.98)) ** 2, rel_tol=1e-6)


def test_closed_forms_of_the_papers():
    beta = 0.1 + 19.9 * TIMES
    integral = 0.1 * TIMES + 19.9 / 2 * TIMES**2
    vp, subvp, ve = VP(), SubVP(), VE(0.02, 50.0)
    np.testing.assert_allclose(vp.alpha(TIMES) ** 2 + vp.s(TIMES) ** 2, 1, rtol=1e-12)
    np.testing.assert_allclose(vp.diffusion(TIMES), np.sqrt(beta), rtol=1e-12)
    np.testing.assert_allclose(subvp.s(TIMES), 1 - np.exp(-integral), rtol=1e-12)
    np.testing.assert_allclose(
        subvp.diffusion(TIMES), np.sqrt(beta * (1 - np.exp(-2 * integral))), rtol=1e-12
    )
    np.testing.assert_allclose(
        ve.diffusion(TIMES), ve.sigma(TIMES) * math.sqrt(2 * math.log(2500)), rtol=1e-12
    )
    np.testing.assert_allclose(EDM().diffusion(TIMES), np.sqrt(2 * TIMES), rtol=1e-12)


def runge_kutta(rate, t, y, h):
    a = rate(t, y)
    b = rate(t + h / 2, y + h / 2 * a)
    c = rate(t + h / 2, y + h / 2 * b)
    return y + h / 6 * (a + 2 * b + 2 * c + rate(t + h, y + h * c))


def gaussian_score(sde, x_t, t):
    """grad_x log p at x = x_t / alpha."""
    return -(x_t / sde.alpha(t) - MEAN) / (VARIANCE + sde.sigma(t) ** 2)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda s: s.name)
def test_one_ode_solution_in_all_coordinates(sde):
    high, low = 8.0, 0.2
    x = np.array([-9.0, 0.0, 3.0, 20.0])
    # known: the standardised deviation from the mean is kept
    expected = MEAN + (x - MEAN) * math.sqrt((VARIANCE + low**2) / (VARIANCE + high**2))
    t, end = float(sde.t(high)), float(sde.t(low))
    n = 200
    h = (end - t) / n
    x_t = x * sde.alpha(t)
    for i in range(n):
        x_t = runge_kutta(
            lambda u, y: sde.reverse_drift(y, u, gaussian_score(sde, y, u), ode=True),
            t + i * h,
            x_t,
            h,
        )
    np.testing.assert_allclose(x_t / sde.alpha(end), expected, rtol=1e-6)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda s: s.name)
def test_reverse_sde_keeps_the_marginals(sde):
    high, low = 8.0, 0.2
    t, end = float(sde.t(high)), float(sde.t(low))

    # the reverse drift is affine in x_t, so mean and variance obey ordinary equations
    def rates(u, y):
        mean, variance = y
        at_mean = sde.reverse_drift(mean, u, gaussian_score(sde, mean, u))
        slope = sde.reverse_drift(mean + 1, u, gaussian_score(sde, mean + 1, u)) - at_mean
        # the Wiener process runs backwards: its variance grows as u falls
        return np.array([at_mean, 2 * slope * variance - sde.diffusion(u) ** 2])

    scale = float(sde.alpha(t))
    y = np.array([MEAN * scale, (VARIANCE + high**2) * scale**2])
    n = 300
    h = (end - t) / n
    for i in range(n):
        y = runge_kutta(rates, t + i * h, y, h)
    scale = float(sde.alpha(end))
    np.testing.assert_allclose(y, [MEAN * scale, (VARIANCE + low**2) * scale**2], rtol=1e-6)


def test_levels_a_process_never_reaches():
    top = float(VP().sigma(1.0))
    assert math.isclose(float(VP().t(top)), 1.0)
    with pytest.raises(ValueError, match="vp: sigma 200 is above 152"):
        VP().t(200.0)
    with pytest.raises(ValueError, match="subvp: sigma 200"):
        SubVP().t(np.array([1.0, 200.0]))
    with pytest.raises(ValueError, match="never reached"):
        VE().t(0.0)
    for bad in (-1.0, math.nan, math.inf):
        for process in (VP(), SubVP(), VE(), EDM()):
            with pytest.raises(ValueError, match="finite and not negative"):
                process.t(bad)
    with pytest.raises(ValueError, match=r"vp: time 1.5 is outside \[0, 1\]"):
        VP().alpha(1.5)


@pytest.mark.parametrize(
    "make", [lambda: VP(0.0, 1.0), lambda: SubVP(3.0, 1.0), lambda: VE(2.0, 1.0)]
)
def test_bad_processes(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


SCHEDULES = [
    karras_sigmas,
    leap_sigmas,
    exponential_sigmas,
    cosine_sigmas,
    lambda n, low, high: cosine_sigmas(n, low, high, offset=0.0),
    lambda n, low, high: uniform_sigmas(n, low, high, VP()),
    lambda n, low, high: uniform_sigmas(n, low, high, SubVP()),
    lambda n, low, high: uniform_sigmas(n, low, high, VE()),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 200])
def test_schedules_decrease_between_exact_ends(schedule, n):
    sigmas = schedule(n, 0.01, 40.0)
    assert len(sigmas) == n + 1
    assert all(isinstance(sigma, float) for sigma in sigmas)
    assert sigmas[0] == 40.0
    assert sigmas[-1] == 0.0
    if n > 1:
        assert sigmas[-2] == 0.01
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    assert check_sigmas(sigmas, SigmaRange(0.01, 40.0)) == sigmas


def test_spacing_of_the_schedules():
    def spread(values):
        return np.ptp(np.diff(values)) / abs(values[0] - values[-1])

    assert spread(np.array(karras_sigmas(9, 0.01, 40.0)[:-1]) ** (1 / 7)) < 1e-12
    assert spread(np.array(karras_sigmas(9, 0.01, 40.0, rho=3.0)[:-1]) ** (1 / 3)) < 1e-12
    assert spread(np.log(exponential_sigmas(9, 0.01, 40.0)[:-1])) < 1e-12
    assert spread(VP().t(np.array(uniform_sigmas(9, 0.01, 40.0, VP())[:-1]))) < 1e-12
    np.testing.assert_allclose(
        uniform_sigmas(9, 0.01, 40.0, VE()), exponential_sigmas(9, 0.01, 40.0), rtol=1e-12
    )


def test_cosine_schedule_of_the_paper():
    # betas of a thousand steps as in eq. 17 and what follows it, and the levels they lead to
    steps = 1000
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps)]
    betas = [1 - b / a for a, b in itertools.pairwise(f)]
    alpha_bar = np.cumprod(1 - np.array(betas))
    levels = np.sqrt(1 / alpha_bar - 1)[::-1]
    ours = cosine_sigmas(steps - 1, levels[-1], levels[0])
    np.testing.assert_allclose(ours[:-1], levels, rtol=1e-9)
    # levels that round away beside 1 come back as they were asked for
    assert cosine_sigmas(2, 1e-12, 40.0) == (40.0, 1e-12, 0.0)
    # without an offset the level is the tangent of the angle
    angles = np.arctan(cosine_sigmas(9, 0.01, 40.0, offset=0.0)[:-1])
    assert np.ptp(np.diff(angles)) < 1e-12


@pytest.mark.parametrize("offset", [-0.1, math.nan, math.inf])
def test_bad_offset(offset):
    with pytest.raises(ValueError, match=f"offset {offset} must be finite"):
        cosine_sigmas(5, 0.01, 40.0, offset)


@pytest.mark.parametrize("n", [0, -3, 2.0, True])
def test_steps_below_one(n):
    with pytest.raises(ValueError, match=r"steps .* at least 1"):
        karras_sigmas(n, 0.01, 40.0)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)]
)
def test_empty_ranges(low, high):
    with pytest.raises(ValueError, match=r"sigma_min .* must be positive and below sigma_max"):
        exponential_sigmas(5, low, high)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ((0.0,), "steps 0 is below 1"),
        ((2.0, 1.0), "append a 0"),
        ((2.0, 2.0, 0.0), "from 2 to 2 at step 0"),
        ((1.0, 2.0, 0.0), "from 1 to 2 at step 0"),
        ((math.nan, 1.0, 0.0), "from nan to 1"),
        ((math.inf, 1.0, 0.0), "from inf to 1"),
        ((50.0, 1.0, 0.0), "sigma 50 is outside the range 0.01 to 40"),
        ((30.0, 0.001, 0.0), "sigma 0.001 is outside the range 0.01 to 40"),
    ],
)
def test_unusable_schedules(sigmas, message):
    with pytest.raises(ValueError, match=message):
        check_sigmas(sigmas, SigmaRange(0.01, 40.0))


def test_bad_rho():
    with pytest.raises(ValueError, match="rho 0"):
        karras_sigmas(5, 0.01, 40.0, rho=0)


class TestLeap:
    def test_leaps_once_and_is_uniform_below(self):
        levels = leap_sigmas(8, 0.08, 20.0, leap=0.3)
        assert (levels[0], levels[1], levels[-2], levels[-1]) == (20.0, pytest.approx(6), 0.08, 0)
        ratios = [a / b for a, b in itertools.pairwise(levels[1:-1])]
        assert ratios == pytest.approx([75 ** (1 / 6)] * 6)
        assert leap_sigmas(1, 0.08, 20.0) == (20.0, 0.0)
        assert leap_sigmas(2, 0.08, 20.0) == (20.0, 0.08, 0.0)

    @pytest.mark.parametrize("leap", [0.0, 0.004, 1.0, 2.0, float("nan")])
    def test_refuses_to_leap_nowhere(self, leap):
        with pytest.raises(ValueError, match=r"leap .* must lead .* 0\.3 is usual"):
            leap_sigmas(8, 0.08, 20.0, leap=leap)
