"""Host-side plans of samplers that evaluate the denoiser once a step: one linear update a step.

With x0 the denoiser's answer at (x, sigma), x0_old and x0_older those one and two steps before, and
z ~ N(0, I),
    x' = keep x + pull x0 + pull_old x0_old + pull_older x0_older + kick z,
where the five numbers follow from the schedule alone. They are computed here in float64, so a loop,
a compiled step or a captured graph needs nothing else to run Euler-Maruyama, ancestral sampling,
DPM-Solver++ or UniPC. Every plan ends by x' = x0, the denoised estimate at the lowest level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastscore.sde import SDE, check_sigmas


@dataclass(frozen=True, slots=True)
class Step:
    """Weights of x' = keep x + pull x0 + pull_old x0_old + pull_older x0_older + kick z."""

    keep: float
    pull: float
    pull_old: float = 0.0
    kick: float = 0.0
    pull_older: float = 0.0


Plan = tuple[Step, ...]
LAST = Step(0.0, 1.0)


def euler_plan(sigmas: Sequence[float]) -> Plan:
    """Euler steps on dx/dsigma = (x - x0) / sigma, the ODE of Karras et al. 2022 (eq. 3)."""
    return (*(Step(low / high, 1 - low / high) for high, low in _pairs(sigmas)), LAST)


def ancestral_plan(sigmas: Sequence[float], eta: float = 1.0, s_noise: float = 1.0) -> Plan:
    """Euler to a lower level sigma_down, then noise back up to sigma'; eta = 0 is `euler_plan`.

    With eta = 1 it draws from q(x' | x, x0) exactly, which is the ancestral sampler of DDPM and of
    Song et al. 2021 (appendix F), the same in the coordinates of every SDE. ValueError unless
    0 <= eta <= 1 and s_noise >= 0.
    """
    _check_eta(eta, s_noise, limit=1.0)
    steps = []
    for high, low in _pairs(sigmas):
        up = eta * low * math.sqrt((high - low) * (high + low)) / high
        down = math.sqrt((low - up) * (low + up))
        steps.append(Step(down / high, 1 - down / high, kick=s_noise * up))
    return (*steps, LAST)


def euler_maruyama_plan(sigmas: Sequence[float], sde: SDE) -> Plan:
    """Euler-Maruyama on the reverse SDE in x_t and t of ``sde`` (Song et al. 2021, eq. 6)."""
    steps = []
    for high, low in _pairs(sigmas):
        t, t_next = float(sde.t(high)), float(sde.t(low))
        alpha, alpha_next = float(sde.alpha(t)), float(sde.alpha(t_next))
        dt = t - t_next
        # x_t' = x_t - dt (f x_t - g^2 score / alpha) + g sqrt(dt) z, score = (x0 - x) / sigma^2
        variance = float(sde.diffusion(t)) ** 2 * dt
        pull = variance / (alpha * alpha_next * high**2)
        keep = alpha / alpha_next * (1 - dt * float(sde.drift_rate(t))) - pull
        steps.append(Step(keep, pull, kick=math.sqrt(variance) / alpha_next))
    return (*steps, LAST)


def reverse_diffusion_plan(sigmas: Sequence[float], sde: SDE) -> Plan:
    """Reverse-diffusion predictor of Song et al. 2021 (eq. 46) on the exact forward transitions.

    The forward step x_t = A x_t' + G z with A = alpha / alpha' and G^2 = s^2 - A^2 s'^2 is undone
    by x_t' = (2 - A) x_t + G^2 grad_{x_t} log p + G z; for VP and VE these are their algorithms 3
    and 2.
    """
    steps = []
    for high, low in _pairs(sigmas):
        alpha, alpha_next = (float(sde.alpha(sde.t(sigma))) for sigma in (high, low))
        ratio = alpha / alpha_next
        pull = ratio * (high - low) * (high + low) / high**2
        kick = ratio * math.sqrt((high - low) * (high + low))
        steps.append(Step((2 - ratio) * ratio - pull, pull, kick=kick))
    return (*steps, LAST)


def dpmpp_2m_plan(sigmas: Sequence[float]) -> Plan:
    """DPM-Solver++(2M) on the ODE (Lu et al. 2022, algorithm 2, alpha = 1)."""
    return dpmpp_2m_sde_plan(sigmas, eta=0.0)


def dpmpp_2m_sde_plan(
    sigmas: Sequence[float],
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    s_noise_below: float = math.inf,
) -> Plan:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix A), alpha = 1, lambda = -log sigma.

    Solves the linear part and the noise exactly and extrapolates x0 linearly in lambda, integrated
    exactly ("heun") or at the middle of the step ("midpoint"); both are of second order. eta scales
    the noise: 0 is the ODE, 1 the reverse SDE. s_noise scales what noise is added on the way to
    levels of at most ``s_noise_below``, as S_tmax bounds churn: less noise above would draw samples
    to the data's mean, and with it to what lies nearest. ValueError unless eta >= 0, s_noise >= 0,
    s_noise_below > 0 and the solver is one of the two.
    """
    # where guidance switches on or off between two steps, looking back stays right: the jump lies
    # half a step back on average, which is what the extrapolation takes it for
    _check_eta(eta, s_noise, limit=math.inf)
    if solver not in ("midpoint", "heun"):
        raise ValueError(f"solver {solver!r} is unknown; choose midpoint or heun")
    if not s_noise_below > 0:
        raise ValueError(f"s_noise_below {s_noise_below} must be a noise level above 0")
    steps = []
    h_old = None
    for high, low in _pairs(sigmas):
        h = math.log(high / low)
        total = -math.expm1(-(1 + eta) * h)
        back = 0.0
        if h_old is not None:
            weight = 0.5 * total if solver == "midpoint" else 1 - total / ((1 + eta) * h)
            back = weight * h / h_old
        kick = low * math.sqrt(-math.expm1(-2 * eta * h))
        kick *= s_noise if low <= s_noise_below else 1.0
        steps.append(Step(low / high * math.exp(-eta * h), total + back, -back, kick))
        h_old = h
    return (*steps, LAST)


def dpmpp_3m_sde_plan(
    sigmas: Sequence[float], eta: float = 1.0, s_noise: float = 1.0, solver: str = "published"
) -> Plan:
    """DPM-Solver++(3M) SDE of k-diffusion, alpha = 1, lambda = -log sigma.

    Solves the linear part and the noise exactly and follows x0 along the parabola through its last
    three answers (the line through two, the constant, while there are no more). The published
    solver halves the integral of the parabola's square term, which leaves it at second order;
    "exact" takes all of it, which is third order on the ODE (eta = 0) and second on the SDE.
    ValueError unless eta >= 0, s_noise >= 0 and the solver is one of the two.
    """
    _check_eta(eta, s_noise, limit=math.inf)
    if solver not in ("published", "exact"):
        raise ValueError(f"solver {solver!r} is unknown; choose published or exact")
    share = 0.5 if solver == "published" else 1.0
    steps: list[Step] = []
    widths: list[float] = []
    for high, low in _pairs(sigmas):
        h = math.log(high / low)
        total, slope, curve = _moments((1 + eta) * h)
        old = older = 0.0
        if len(widths) >= 2:
            r, s = widths[-1] / h, (widths[-1] + widths[-2]) / h
            # lagrange's parabola through u = 0, -r and -s, where u counts this step's length
            curve = share * curve
            old = -(slope * s + curve) / (r * (s - r))
            older = (slope * r + curve) / (s * (s - r))
        elif widths:
            old = -slope * h / widths[-1]
        kick = s_noise * low * math.sqrt(-math.expm1(-2 * eta * h))
        keep = low / high * math.exp(-eta * h)
        steps.append(Step(keep, total - old - older, old, kick, older))
        widths.append(h)
    return (*steps, LAST)


def unipc_plan(sigmas: Sequence[float], order: int | None = None, variant: str = "bh2") -> Plan:
    """UniPC of order 1 or 2 on the ODE, data prediction (Zhao et al. 2023, alpha = 1).

    Their predictor (UniP) and corrector (UniC), lower orders first, share one evaluation a step: it
    is made at the predicted state, and what it corrects there goes into the next step, so x here is
    the predicted state throughout. The error falls with one power more than ``order``. ``variant``
    is their B: -h for "bh1", e^-h - 1 for "bh2". Order None is 2, or 1 for a single step.
    ValueError for another order or variant and for fewer steps than ``order``.
    """
    levels = check_sigmas(sigmas)
    order = _unipc_order(order, len(levels) - 1)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant {variant!r} is unknown; choose bh1 or bh2")
    steps: list[Step] = []
    correct = (0.0, 0.0, 0.0)  # corrected minus predicted state, in x0, x0_old, x0_older
    h_old = None
    for high, low in _pairs(levels):
        h = math.log(high / low)
        total, slope, curve = _moments(h)
        half = 0.5 * (h if variant == "bh1" else total)
        # what both add to keep x: the predictor in x0, x0_old; the corrector one answer later
        if h_old is None or order == 1:
            predicted, corrected = (total, 0.0), (half, total - half, 0.0)
        else:
            r = h_old / h
            back = half / r
            # through x0_old at -r, x0 at 0 and the new answer at 1, exact for a parabola
            new, old = (slope * r + curve) / (1 + r), (curve - slope) / (r * (1 + r))
            predicted, corrected = (total + back, -back), (new, total - new - old, old)
        keep = low / high
        pulls = [keep * c for c in correct]
        steps.append(
            Step(keep, pulls[0] + predicted[0], pulls[1] + predicted[1], pull_older=pulls[2])
        )
        correct = (corrected[0], corrected[1] - predicted[0], corrected[2] - predicted[1])
        h_old = h
    return (*steps, LAST)


def _unipc_order(order: int | None, steps: int) -> int:
    if order is None:
        return min(2, steps)
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(
            f"order {order!r} of UniPC is not offered, as a step looks two answers back; choose 1 "
            "or 2"
        )
    if steps < order:
        raise ValueError(
            f"{steps} step is below the order {order} of UniPC; take {order} steps or order 1"
        )
    return order


def _moments(h: float) -> tuple[float, float, float]:
    """Integrals of h e^(-h (1 - u)) u^k over 0 < u < 1 for k = 0, 1, 2."""
    total = -math.expm1(-h)
    slope = 1 - total / h
    return total, slope, 1 - 2 * slope / h


def _pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    levels = check_sigmas(sigmas)[:-1]
    return list(itertools.pairwise(levels))


def _check_eta(eta: float, s_noise: float, limit: float) -> None:
    if not 0 <= eta <= limit or eta == math.inf:
        raise ValueError(f"eta {eta} must be finite and from 0 to {limit:g}")
    if not 0 <= s_noise < math.inf:
        raise ValueError(
            f"s_noise {s_noise} must be finite and not negative; 1 adds the exact amount"
        )
