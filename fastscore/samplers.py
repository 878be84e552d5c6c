"""Samplers: pure functions of a denoiser, a start, a sigma schedule and a noise source.

The state x lives in the network's coordinates x0 + sigma eps; `fastscore.sde` maps every SDE to
them. Randomness is asked for by step number, so a sample depends on its own seed only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from fastscore.config import SigmaRange
from fastscore.noise import INITIAL_STEP
from fastscore.plans import (
    Plan,
    ancestral_plan,
    dpmpp_2m_plan,
    dpmpp_2m_sde_plan,
    dpmpp_3m_sde_plan,
    euler_maruyama_plan,
    euler_plan,
    reverse_diffusion_plan,
    unipc_plan,
)
from fastscore.sde import (
    EDM,
    SDE,
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
from fastscore.solver import (
    Common,
    Guidance,
    Precision,
    Run,
    Sample,
    SamplingCancelledError,
)
from fastscore.trajectory import Denoiser, Noise

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Churn",
    "Denoiser",
    "Guidance",
    "Noise",
    "Precision",
    "Sample",
    "SamplerSpec",
    "SamplingCancelledError",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "heun",
    "initial_state",
    "predictor_corrector",
    "sampler_named",
    "schedule_for",
    "unipc",
]


_EDM = EDM()


def initial_state(noise: Noise, shape: Sequence[int], sigma: float) -> Tensor:
    """Start sigma * eps of ``shape`` [B, ...], fp32, from the noise of step 0."""
    return noise(INITIAL_STEP, shape) * sigma


def euler(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], **common: Unpack[Common]
) -> Sample:
    """Euler on the probability-flow ODE; first order, one evaluation a step."""
    return _follow(Run(denoise, x, sigmas, False, **common), euler_plan(sigmas))


def euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    **common: Unpack[Common],
) -> Sample:
    """Ancestral sampling with Euler steps; see `fastscore.plans.ancestral_plan`."""
    plan = ancestral_plan(sigmas, eta, s_noise)
    return _follow(Run(denoise, x, sigmas, eta > 0, **common), plan)


def euler_maruyama(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    sde: SDE,
    **common: Unpack[Common],
) -> Sample:
    """Euler-Maruyama on the reverse SDE of ``sde``, in its own coordinates; last step denoises."""
    plan = euler_maruyama_plan(sigmas, sde)
    return _follow(Run(denoise, x, sigmas, True, **common), plan)


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], **common: Unpack[Common]
) -> Sample:
    """DPM-Solver++(2M) on the probability-flow ODE; second order, one evaluation a step."""
    return _follow(Run(denoise, x, sigmas, False, **common), dpmpp_2m_plan(sigmas))


def dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    s_noise_below: float = math.inf,
    **common: Unpack[Common],
) -> Sample:
    """DPM-Solver++(2M) on the reverse SDE; see `fastscore.plans.dpmpp_2m_sde_plan`."""
    plan = dpmpp_2m_sde_plan(sigmas, eta, s_noise, solver, s_noise_below)
    return _follow(Run(denoise, x, sigmas, eta > 0, **common), plan)


def dpmpp_3m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "published",
    **common: Unpack[Common],
) -> Sample:
    """DPM-Solver++(3M) on the reverse SDE; see `fastscore.plans.dpmpp_3m_sde_plan`."""
    plan = dpmpp_3m_sde_plan(sigmas, eta, s_noise, solver)
    return _follow(Run(denoise, x, sigmas, eta > 0, **common), plan)


def unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    order: int | None = None,
    variant: str = "bh2",
    **common: Unpack[Common],
) -> Sample:
    """UniPC, the predictor-corrector of one evaluation a step; see `fastscore.plans.unipc_plan`.

    The x that a callback sees is the predicted state, at which the denoiser was asked.
    """
    plan = unipc_plan(sigmas, order, variant)
    return _follow(Run(denoise, x, sigmas, False, **common), plan)


@torch.no_grad()
def _follow(run: Run, plan: Plan) -> Sample:
    return run.follow(plan)


@dataclass(frozen=True)
class Churn:
    """S_churn, S_tmin, S_tmax and S_noise of EDM algorithm 2; defaults: its ImageNet-64 ones."""

    amount: float = 40.0
    sigma_min: float = 0.05
    sigma_max: float = 50.0
    s_noise: float = 1.003

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.s_noise < math.inf):
            raise ValueError(
                f"churn amount {self.amount} and s_noise {self.s_noise} must be finite and not "
                "negative"
            )
        if not 0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(
                f"churn sigma_min {self.sigma_min} must lie from 0 to sigma_max {self.sigma_max}"
            )

    def raised(self, sigma: float, steps: int) -> float:
        """The level to which ``sigma`` is raised by fresh noise before a step."""
        if not self.sigma_min <= sigma <= self.sigma_max:
            return sigma
        return sigma * (1 + min(self.amount / steps, math.sqrt(2) - 1))


@torch.no_grad()
def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    sde: SDE = _EDM,
    churn: Churn | None = None,
    **common: Unpack[Common],
) -> Sample:
    """Heun on the probability-flow ODE in the coordinates of ``sde`` (EDM algorithm 1).

    With ``churn`` it is the stochastic algorithm 2, in EDM coordinates only (ValueError otherwise);
    noise never lifts a level above the denoiser's trained range. 2 n - 1 evaluations; the last step
    denoises.
    """
    if churn is not None and not isinstance(sde, EDM):
        raise ValueError(f"churn is defined in EDM coordinates; drop it or {sde.name}")
    run = Run(denoise, x, sigmas, churn is not None, **common)
    x, count = run.x, len(run.sigmas) - 1
    for i, (sigma, low) in enumerate(zip(run.sigmas[:-2], run.sigmas[1:-1], strict=True)):
        x, sigma = _lift(run, churn, x, i, sigma, count)
        x0 = run.evaluate(x, sigma)
        run.report(i, sigma, x, x0)
        t, t_next = float(sde.t(sigma)), float(sde.t(low))
        scale, scale_next = float(sde.alpha(t)), float(sde.alpha(t_next))
        slope = _slope(sde, t, x, x0)
        guess = (x * scale).add_(slope * (t_next - t)).div_(scale_next)
        slope = slope.add_(_slope(sde, t_next, guess, run.evaluate(guess, low)))
        x = (x * scale).add_(slope * (0.5 * (t_next - t))).div_(scale_next)
    x, sigma = _lift(run, churn, x, count - 1, run.sigmas[-2], count)
    x0 = run.evaluate(x, sigma)
    run.report(count - 1, sigma, x, x0)
    return run.sample(x0)


def _lift(
    run: Run, churn: Churn | None, x: Tensor, step: int, sigma: float, steps: int
) -> tuple[Tensor, float]:
    """State and level after churn has added fresh noise, or both unchanged."""
    raised = sigma if churn is None else churn.raised(sigma, steps)
    if run.trained is not None:
        raised = max(sigma, min(raised, run.trained.max))
    if raised == sigma:
        return x, sigma
    added = math.sqrt((raised - sigma) * (raised + sigma)) * churn.s_noise
    return x + run.eps(step) * added, raised


def _slope(sde: SDE, t: float, x: Tensor, x0: Tensor) -> Tensor:
    """d x_t / dt of the probability-flow ODE at x = x_t / alpha, from the denoised x0."""
    alpha = float(sde.alpha(t))
    # f x_t - g^2 / 2 grad_{x_t} log p, with g^2 = alpha^2 d(sigma^2)/dt
    pull = alpha * float(sde.variance_rate(t)) / (2 * float(sde.sigma(t)) ** 2)
    return (x * (alpha * float(sde.drift_rate(t)) + pull)).sub_(x0 * pull)


@torch.no_grad()
def predictor_corrector(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    sde: SDE,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    **common: Unpack[Common],
) -> Sample:
    """Predictor-corrector sampling (Song et al. 2021, algorithm 1 with 2 to 5); last step denoises.

    ``predictor`` is "reverse_diffusion" or "ancestral"; after each, ``corrector_steps`` Langevin
    steps of size 2 a (snr |z| / |score|)^2 at the new level, where a = (alpha / alpha')^2, their
    alpha_i. Norms are taken a sample, not averaged over the batch, so that samples stay
    independent.
    """
    plans = {
        "reverse_diffusion": lambda: reverse_diffusion_plan(sigmas, sde),
        "ancestral": lambda: ancestral_plan(sigmas),
    }
    if predictor not in plans:
        raise ValueError(f"predictor {predictor!r} is unknown; choose one of {', '.join(plans)}")
    if corrector_steps < 0 or not 0 < snr < math.inf:
        raise ValueError(
            f"corrector_steps {corrector_steps} must not be negative and snr {snr} must be positive"
        )
    run = Run(denoise, x, sigmas, True, **common)
    x, plan = run.x, plans[predictor]()
    for i, step in enumerate(plan[:-1]):
        sigma, low = run.sigmas[i], run.sigmas[i + 1]
        x0 = run.evaluate(x, sigma)
        run.report(i, sigma, x, x0)
        x = (x * step.keep).add_(x0 * step.pull).add_(run.eps(i) * step.kick)
        shrink = float(sde.alpha(sde.t(sigma)) / sde.alpha(sde.t(low)))
        for draw in range(1, corrector_steps + 1):
            score = (run.evaluate(x, low) - x).div_(low**2)
            z = run.eps(i, draw)
            size = _square_norm(z).div_(_square_norm(score)).mul_(2 * (shrink * snr) ** 2)
            x = x + score * size + z * (2 * size).sqrt()
    x0 = run.evaluate(x, run.sigmas[-2])
    run.report(len(plan) - 1, run.sigmas[-2], x, x0)
    return run.sample(x0)


def _square_norm(x: Tensor) -> Tensor:
    """Sum of squares a sample, [B, 1, ...], added in halves: an order no batch can change."""
    rest = x.flatten(1).square()
    while rest.shape[1] > 1:
        half = rest.shape[1] // 2
        tail = rest[:, 2 * half :]
        rest = torch.cat((rest[:, :half] + rest[:, half : 2 * half], tail), dim=1)
    return rest.view(-1, *[1] * (x.ndim - 1))


# named sigma schedules: (steps, sigma_min, sigma_max, options of its own) -> levels
SCHEDULES: dict[str, Callable[..., tuple[float, ...]]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "leap": leap_sigmas,
    "vp_linear": functools.partial(uniform_sigmas, sde=VP()),
    "cosine": cosine_sigmas,
    # the earlier name of vp_linear
    "uniform_vp": functools.partial(uniform_sigmas, sde=VP()),
    "uniform_subvp": functools.partial(uniform_sigmas, sde=SubVP()),
}


@dataclass(frozen=True)
class SamplerSpec:
    """A named sampler: ``run(denoise, x, sigmas, **common) -> Sample``, its cost and schedule.

    ``plan(sigmas, **options)`` is the plan that ``run`` follows, None where it is no plan of one
    evaluation a step.
    """

    name: str
    run: Callable[..., Sample]
    evaluations: int
    stochastic: bool
    schedule: str
    summary: str
    plan: Callable[..., Plan] | None = None

    def nfe(self, steps: int) -> int:
        """Denoiser evaluations of ``steps`` steps: the last step, which denoises, takes one."""
        return self.evaluations * (steps - 1) + 1


def _specs() -> Iterator[SamplerSpec]:
    yield _planned("euler", euler, euler_plan, False, "Euler on the ODE")
    yield SamplerSpec("heun", heun, 2, False, "karras", "Heun on the ODE (EDM algorithm 1)")
    churned = functools.partial(heun, churn=Churn())
    yield SamplerSpec("heun_churn", churned, 2, True, "karras", "Heun with churn (EDM algorithm 2)")
    yield _planned("euler_ancestral", euler_ancestral, ancestral_plan, True, "ancestral (DDPM)")
    yield _planned("dpmpp_2m", dpmpp_2m, dpmpp_2m_plan, False, "DPM-Solver++(2M) on the ODE")
    yield _planned(
        "dpmpp_2m_sde", dpmpp_2m_sde, dpmpp_2m_sde_plan, True, "DPM-Solver++(2M) on the SDE"
    )
    yield _planned(
        "dpmpp_3m_sde", dpmpp_3m_sde, dpmpp_3m_sde_plan, True, "DPM-Solver++(3M) on the SDE"
    )
    yield _planned("unipc", unipc, unipc_plan, False, "UniPC on the ODE")
    # uniform in the time of each SDE; EDM, whose time is sigma, has its own spacing
    spacing = {"vp": "vp_linear", "subvp": "uniform_subvp", "ve": "exponential", "edm": "karras"}
    for sde in (VP(), SubVP(), VE(), EDM()):
        run = functools.partial(euler_maruyama, sde=sde)
        plan = functools.partial(euler_maruyama_plan, sde=sde)
        text = f"Euler-Maruyama on the reverse {sde.name} SDE"
        yield _planned(f"em_{sde.name}", run, plan, True, text, spacing[sde.name])
    for sde in (VP(), SubVP(), VE(), EDM()):
        run = functools.partial(predictor_corrector, sde=sde)
        text = f"reverse-diffusion predictor and Langevin corrector, {sde.name}"
        yield SamplerSpec(f"pc_{sde.name}", run, 2, True, spacing[sde.name], text)


def _planned(
    name: str,
    run: Callable[..., Sample],
    plan: Callable[..., Plan],
    stochastic: bool,
    summary: str,
    schedule: str = "karras",
) -> SamplerSpec:
    return SamplerSpec(name, run, 1, stochastic, schedule, summary, plan)


SAMPLERS: dict[str, SamplerSpec] = {spec.name: spec for spec in _specs()}


def sampler_named(name: str) -> SamplerSpec:
    """The sampler of that name; ValueError that lists the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def schedule_for(
    sampler: str | SamplerSpec,
    nfe: int,
    trained: SigmaRange,
    *,
    schedule: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    options: Mapping[str, float] | None = None,
) -> tuple[float, ...]:
    """The finest schedule with which ``sampler`` needs at most ``nfe`` denoiser evaluations.

    From sigma_max (default: the trained maximum) to sigma_min (default: the trained minimum) and 0,
    by ``schedule`` (one of `SCHEDULES`; default: the sampler's own) with its ``options``. A sampler
    of two evaluations a step uses one less than an even ``nfe``. ValueError for nfe < 1, an unknown
    name or a level outside the trained range.
    """
    spec = sampler_named(sampler) if isinstance(sampler, str) else sampler
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"steps {nfe!r} must be a whole number of at least 1 evaluation")
    n = (nfe - 1) // spec.evaluations + 1
    low = trained.min if sigma_min is None else sigma_min
    high = trained.max if sigma_max is None else sigma_max
    kind = spec.schedule if schedule is None else schedule
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    return check_sigmas(SCHEDULES[kind](n, low, high, **(options or {})), trained)
