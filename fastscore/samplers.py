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
from fastscore.loops import Churn, heun, predictor_corrector
from fastscore.noise import INITIAL_STEP
from fastscore.plans import (
    Plan,
    ancestral_plan,
    dpmpp_2m_plan,
    dpmpp_2m_sde_plan,
    dpmpp_3m_sde_plan,
    euler_maruyama_plan,
    euler_plan,
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
