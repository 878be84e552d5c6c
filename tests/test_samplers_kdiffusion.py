"""Our samplers and schedules against k-diffusion's, with the same denoiser and the same noise."""

import pytest
import torch
from oracles.k_diffusion import sampling as kd

from fastscore.samplers import (
    Churn,
    Guidance,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    heun,
)
from fastscore.sde import VP, exponential_sigmas, karras_sigmas, uniform_sigmas

SHAPE = (2, 1, 80, 64)
LOW, HIGH = 0.01, 40.0


class Network:
    """A small preconditioned random network, conditioned on label and gamma; not a linear map."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.first = torch.randn(6, 1, 3, 3, generator=generator) / 3
        self.second = torch.randn(1, 6, 3, 3, generator=generator) / 7
        self.classes = torch.randn(10, 1, 80, 64, generator=generator)

    def __call__(self, x, sigma, label, gamma):
        s = sigma[:, None, None, None]
        inner = torch.nn.functional.conv2d(x / (s**2 + 1).sqrt(), self.first, padding=1)
        inner = torch.nn.functional.conv2d(torch.tanh(inner + s.log() / 4), self.second, padding=1)
        x0 = x / (s**2 + 1) + s / (s**2 + 1).sqrt() * inner
        if label is not None:
            pull = (gamma * s.flatten() / (1 + s.flatten()))[:, None, None, None]
            x0 = x0 + 0.1 * pull * self.classes[label]
        return x0


@pytest.fixture(scope="module")
def network():
    return Network()


@pytest.fixture
def noises():
    """Noise of every step, as k-diffusion's noise_sampler and as ours."""
    values = torch.randn(40, *SHAPE)
    levels = []

    def theirs(sigma, sigma_next):
        levels.append((float(sigma), float(sigma_next)))
        return values[len(levels) - 1]

    def ours(step, shape, draw=0):
        assert tuple(shape) == SHAPE
        assert draw == 0
        return values[step - 1]

    return theirs, ours


LABEL, GAMMA = torch.tensor([3, 7]), torch.tensor([1.0, 3.0])
EXTRA = {"label": LABEL, "gamma": GAMMA}


@pytest.fixture(params=["karras", "exponential"])
def sigmas(request):
    make = {"karras": karras_sigmas, "exponential": exponential_sigmas}[request.param]
    return make(14, LOW, HIGH)


def start():
    return HIGH * torch.randn(SHAPE)


def check(ours, theirs, evaluations):
    assert ours.nfe == evaluations
    assert ours.x.dtype == torch.float32
    torch.testing.assert_close(ours.x, theirs, rtol=2e-5, atol=2e-5)


def theirs_of(sampler, network, x, sigmas, **options):
    levels = torch.tensor(sigmas, dtype=torch.float32)
    return sampler(network, x, levels, extra_args=EXTRA, disable=True, **options)


def test_schedules():
    for n in (2, 10, 60):
        for ours, theirs in (
            (karras_sigmas(n, LOW, HIGH), kd.get_sigmas_karras(n, LOW, HIGH)),
            (karras_sigmas(n, LOW, HIGH, 5.0), kd.get_sigmas_karras(n, LOW, HIGH, rho=5.0)),
            (exponential_sigmas(n, LOW, HIGH), kd.get_sigmas_exponential(n, LOW, HIGH)),
        ):
            # theirs are float32 throughout
            torch.testing.assert_close(torch.tensor(ours).float(), theirs, rtol=4e-5, atol=0)
        ours = uniform_sigmas(n, float(VP().sigma(1e-3)), float(VP().sigma(1.0)), VP())
        # exp(B) - 1 in float32 loses four digits where B is 1e-4
        torch.testing.assert_close(
            torch.tensor(ours).float(), kd.get_sigmas_vp(n), rtol=5e-4, atol=0
        )


def test_ordinary_samplers(network, sigmas):
    x = start()
    guidance = Guidance(LABEL, GAMMA)
    for ours, theirs, evaluations in (
        (euler, kd.sample_euler, 14),
        (heun, kd.sample_heun, 27),
        (dpmpp_2m, kd.sample_dpmpp_2m, 14),
    ):
        result = ours(network, x, sigmas, guidance=guidance)
        check(result, theirs_of(theirs, network, x, sigmas), evaluations)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_euler_ancestral(network, sigmas, noises, eta):
    x = start()
    result = euler_ancestral(
        network, x, sigmas, eta=eta, guidance=Guidance(LABEL, GAMMA), noise=noises[1]
    )
    theirs = theirs_of(
        kd.sample_euler_ancestral, network, x, sigmas, eta=eta, noise_sampler=noises[0]
    )
    check(result, theirs, 14)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.01)])
def test_dpmpp_2m_sde(network, sigmas, noises, solver, eta, s_noise):
    x = start()
    options = {"eta": eta, "s_noise": s_noise}
    result = dpmpp_2m_sde(
        network,
        x,
        sigmas,
        solver=solver,
        guidance=Guidance(LABEL, GAMMA),
        noise=noises[1],
        **options,
    )
    theirs = theirs_of(
        kd.sample_dpmpp_2m_sde,
        network,
        x,
        sigmas,
        solver_type=solver,
        noise_sampler=noises[0],
        **options,
    )
    check(result, theirs, 14)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.01), (0.0, 1.0)])
def test_dpmpp_3m_sde(network, sigmas, noises, eta, s_noise):
    x = start()
    options = {"eta": eta, "s_noise": s_noise}
    guidance = Guidance(LABEL, GAMMA)
    result = dpmpp_3m_sde(network, x, sigmas, guidance=guidance, noise=noises[1], **options)
    theirs = theirs_of(
        kd.sample_dpmpp_3m_sde, network, x, sigmas, noise_sampler=noises[0], **options
    )
    check(result, theirs, 14)


def test_heun_with_churn(network, sigmas):
    x = start()
    torch.manual_seed(11)
    # k-diffusion draws with torch.randn_like at every step, used or not
    draws = [torch.randn_like(x) for _ in range(14)]
    result = heun(
        network,
        x,
        sigmas,
        churn=Churn(5.0, 0.05, 30.0, 1.003),
        guidance=Guidance(LABEL, GAMMA),
        noise=lambda step, shape, draw=0: draws[step - 1],
    )
    torch.manual_seed(11)
    theirs = theirs_of(
        kd.sample_heun,
        network,
        x,
        sigmas,
        s_churn=5.0,
        s_tmin=0.05,
        s_tmax=30.0,
        s_noise=1.003,
    )
    check(result, theirs, 27)


def test_callback_sees_what_theirs_sees(network, sigmas):
    x = start()
    ours, theirs = [], []
    dpmpp_2m(
        network,
        x,
        sigmas,
        guidance=Guidance(LABEL, GAMMA),
        callback=lambda step, sigma, x, x0: ours.append((step, sigma, x.clone(), x0.clone())),
    )
    theirs_of(kd.sample_dpmpp_2m, network, x, sigmas, callback=lambda info: theirs.append(info))
    assert [seen[0] for seen in ours] == [seen["i"] for seen in theirs] == list(range(14))
    for (_, sigma, x, x0), seen in zip(ours, theirs, strict=True):
        assert sigma == pytest.approx(float(seen["sigma"]), rel=1e-6)
        torch.testing.assert_close(x, seen["x"], rtol=2e-5, atol=5e-5)
        torch.testing.assert_close(x0, seen["denoised"], rtol=2e-5, atol=5e-5)
