"""Samplers that are no plan of one evaluation a step: Heun, with churn, and predictor-corrector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from fastscore.plans import ancestral_plan, reverse_diffusion_plan
from fastscore.sde import EDM, SDE
from fastscore.solver import Common, Run, Sample
from fastscore.trajectory import Denoiser

_EDM = EDM()


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
