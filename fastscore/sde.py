"""Gaussian forward processes as coordinate changes of one trained network, and sigma schedules.

Host side, float64, standard library and numpy. A process x_t = alpha(t) x0 + s(t) eps is seen by
the network as x = x_t / alpha = x0 + sigma eps with sigma = s / alpha, so VP, sub-VP, VE and EDM
differ only in alpha(t) and sigma(t). From these follow the forward SDE dx_t = f x_t dt + g dw with
f = d log alpha / dt and g^2 = alpha^2 d(sigma^2)/dt, and its reverse (Song et al. 2021, eq. 6).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastscore.config import SigmaRange

# t or sigma as a float or a float64 array; results have the argument's shape
Real = Any


class SDE(ABC):
    """A forward process by alpha(t), sigma(t), their rates, and t(sigma); all float64."""

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Real) -> Real:
        """Scale alpha(t) of the clean signal."""

    @abstractmethod
    def sigma(self, t: Real) -> Real:
        """Noise level sigma(t) = s(t) / alpha(t) in the network's coordinates."""

    @abstractmethod
    def t(self, sigma: Real) -> Real:
        """Time at which the level is ``sigma``; ValueError where it is never reached."""

    @abstractmethod
    def drift_rate(self, t: Real) -> Real:
        """f(t) = d log alpha / dt of the forward drift f(t) x_t."""

    @abstractmethod
    def variance_rate(self, t: Real) -> Real:
        """d sigma^2 / dt."""

    def s(self, t: Real) -> Real:
        """Standard deviation s(t) = alpha(t) sigma(t) of the noise in x_t."""
        return self.alpha(t) * self.sigma(t)

    def diffusion(self, t: Real) -> Real:
        """g(t) = alpha sqrt(d sigma^2 / dt) of the forward SDE, and of its reverse."""
        return self.alpha(t) * np.sqrt(self.variance_rate(t))

    def reverse_drift(self, x_t: Any, t: Real, score: Any, ode: bool = False) -> Any:
        """Drift f x_t - g^2 grad_{x_t} log p of the reverse SDE; half the score term for the ODE.

        ``score`` is grad_x log p at x = x_t / alpha, what the network gives; grad_{x_t} is 1 /
        alpha of it. Arrays or tensors of one shape. Song et al. 2021, eqs. 6 and 13.
        """
        weight = (0.5 if ode else 1.0) * self.diffusion(t) ** 2 / self.alpha(t)
        return x_t * self.drift_rate(t) - score * weight


@dataclass(frozen=True)
class _LinearBeta(SDE):
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"{self.name}: beta_min {self.beta_min} must be positive and at most beta_max "
                f"{self.beta_max}"
            )

    def beta(self, t: Real) -> Real:
        """beta(t), linear from beta_min at t = 0 to beta_max at t = 1."""
        return self.beta_min + (self.beta_max - self.beta_min) * _unit_time(self.name, t)

    def beta_integral(self, t: Real) -> Real:
        """B(t), the integral of beta from 0 to t."""
        t = _unit_time(self.name, t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t: Real) -> Real:
        """exp(-B / 2)."""
        return np.exp(-0.5 * self.beta_integral(t))

    def drift_rate(self, t: Real) -> Real:
        """-beta / 2."""
        return -0.5 * self.beta(t)

    def _time(self, sigma: Real, integral: Real) -> Real:
        top = self.sigma(1.0)
        # sigma(t(sigma)) may miss by a rounding error at the end
        if np.any(sigma > top * (1 + 1e-9)):
            raise ValueError(
                f"{self.name}: sigma {np.max(sigma):g} is above {top:g}, which the process reaches "
                "at t = 1; use a smaller sigma or a larger beta_max"
            )
        slope = self.beta_max - self.beta_min
        return np.minimum(
            2 * integral / (self.beta_min + np.sqrt(self.beta_min**2 + 2 * slope * integral)), 1.0
        )


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance-preserving SDE: f = -beta / 2, g^2 = beta (Song et al. 2021, eq. 11)."""

    name: ClassVar[str] = "vp"

    def sigma(self, t: Real) -> Real:
        """sqrt(exp(B) - 1)."""
        return np.sqrt(np.expm1(self.beta_integral(t)))

    def t(self, sigma: Real) -> Real:
        """Time of noise level ``sigma``; ValueError above sigma(1)."""
        sigma = _level(sigma)
        return self._time(sigma, np.log1p(sigma**2))

    def variance_rate(self, t: Real) -> Real:
        """beta exp(B)."""
        return self.beta(t) * np.exp(self.beta_integral(t))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-VP SDE: f = -beta / 2, g^2 = beta (1 - exp(-2 B)) (Song et al. 2021, eq. 12)."""

    name: ClassVar[str] = "subvp"

    def sigma(self, t: Real) -> Real:
        """(1 - exp(-B)) exp(B / 2) = 2 sinh(B / 2)."""
        return 2 * np.sinh(0.5 * self.beta_integral(t))

    def t(self, sigma: Real) -> Real:
        """Time of noise level ``sigma``; ValueError above sigma(1)."""
        sigma = _level(sigma)
        return self._time(sigma, 2 * np.arcsinh(0.5 * sigma))

    def variance_rate(self, t: Real) -> Real:
        """2 beta sinh(B)."""
        return 2 * self.beta(t) * np.sinh(self.beta_integral(t))


@dataclass(frozen=True)
class VE(SDE):
    """Variance-exploding SDE: sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, eq. 9)."""

    name: ClassVar[str] = "ve"
    sigma_min: float = 0.01
    sigma_max: float = 40.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"ve: sigma_min {self.sigma_min} must be positive and below sigma_max "
                f"{self.sigma_max}"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Real) -> Real:
        """1."""
        return np.ones_like(np.asarray(t, dtype=np.float64))[()]

    def sigma(self, t: Real) -> Real:
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * np.exp(self._log_ratio * np.asarray(t, dtype=np.float64))

    def t(self, sigma: Real) -> Real:
        """Time of noise level ``sigma`` > 0; outside [0, 1] beyond sigma_min or sigma_max."""
        sigma = _level(sigma)
        if np.any(sigma == 0):
            raise ValueError("ve: sigma 0 is never reached; end the process above it and denoise")
        return np.log(sigma / self.sigma_min) / self._log_ratio

    def drift_rate(self, t: Real) -> Real:
        """0."""
        return np.zeros_like(np.asarray(t, dtype=np.float64))[()]

    def variance_rate(self, t: Real) -> Real:
        """2 sigma^2 log(sigma_max / sigma_min)."""
        return 2 * self._log_ratio * self.sigma(t) ** 2


@dataclass(frozen=True)
class EDM(SDE):
    """Karras et al. 2022: alpha = 1, sigma = t, the network's own coordinates."""

    name: ClassVar[str] = "edm"

    def alpha(self, t: Real) -> Real:
        """1."""
        return np.ones_like(np.asarray(t, dtype=np.float64))[()]

    def sigma(self, t: Real) -> Real:
        """t."""
        return _level(t)

    def t(self, sigma: Real) -> Real:
        """sigma."""
        return _level(sigma)

    def drift_rate(self, t: Real) -> Real:
        """0."""
        return np.zeros_like(np.asarray(t, dtype=np.float64))[()]

    def variance_rate(self, t: Real) -> Real:
        """2 t."""
        return 2 * _level(t)


SDES: dict[str, type[SDE]] = {sde.name: sde for sde in (VP, SubVP, VE, EDM)}


def karras_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> tuple[float, ...]:
    """n decreasing levels from sigma_max to sigma_min, uniform in sigma^(1/rho), then 0.

    Karras et al. 2022, eq. 5. ValueError for n < 1, rho <= 0 or an empty range; so for all
    schedules.
    """
    _check_schedule(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho {rho} must be positive and finite; Karras et al. use 7")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _finish([(high + u * (low - high)) ** rho for u in _ramp(n)], sigma_min, sigma_max)


def exponential_sigmas(n: int, sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """n decreasing levels from sigma_max to sigma_min, uniform in log sigma, then 0."""
    _check_schedule(n, sigma_min, sigma_max)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _finish([math.exp(high + u * (low - high)) for u in _ramp(n)], sigma_min, sigma_max)


def leap_sigmas(n: int, sigma_min: float, sigma_max: float, leap: float = 0.3) -> tuple[float, ...]:
    """sigma_max, then n - 1 decreasing levels from leap sigma_max to sigma_min, uniform in log, 0.

    One evaluation among noise that hides everything finds the data's mean, and more of them there
    find nothing else: few steps are better spent below. ValueError also unless sigma_min < leap
    sigma_max < sigma_max.
    """
    _check_schedule(n, sigma_min, sigma_max)
    if not sigma_min < leap * sigma_max < sigma_max:
        raise ValueError(
            f"leap {leap} must lead from sigma_max {sigma_max} to a level above sigma_min "
            f"{sigma_min}; 0.3 is usual"
        )
    if n == 1:
        return _finish([sigma_max], sigma_min, sigma_max)
    low, high = math.log(sigma_min), math.log(leap * sigma_max)
    rest = [math.exp(high + u * (low - high)) for u in _ramp(n - 1)]
    return _finish([sigma_max, *rest], sigma_min, sigma_max)


def uniform_sigmas(n: int, sigma_min: float, sigma_max: float, sde: SDE) -> tuple[float, ...]:
    """n decreasing levels from sigma_max to sigma_min, uniform in the time t of ``sde``, then 0."""
    _check_schedule(n, sigma_min, sigma_max)
    low, high = float(sde.t(sigma_min)), float(sde.t(sigma_max))
    levels = [float(sde.sigma(high + u * (low - high))) for u in _ramp(n)]
    return _finish(levels, sigma_min, sigma_max)


def cosine_sigmas(
    n: int, sigma_min: float, sigma_max: float, offset: float = 0.008
) -> tuple[float, ...]:
    """n decreasing levels from sigma_max to sigma_min, uniform in t of the cosine schedule, then 0.

    Nichol and Dhariwal 2021, eq. 17: 1 / (1 + sigma^2) = f(t) / f(0) with f(t) = cos^2 of
    (t + offset) / (1 + offset) pi / 2. ValueError unless 0 <= offset < inf.
    """
    _check_schedule(n, sigma_min, sigma_max)
    if not 0 <= offset < math.inf:
        raise ValueError(
            f"offset {offset} must be finite and not negative; Nichol and Dhariwal use 0.008"
        )
    first = offset / (1 + offset) * math.pi / 2  # the angle at t = 0, in which t is affine
    high, low = (
        math.acos(math.cos(first) / math.hypot(1, sigma)) for sigma in (sigma_max, sigma_min)
    )
    angles = [high + u * (low - high) for u in _ramp(n)]
    # cos^2 a / cos^2 b - 1 without the cancellation of small levels
    squares = [math.sin(a - first) * math.sin(a + first) / math.cos(a) ** 2 for a in angles]
    return _finish([math.sqrt(max(0.0, q)) for q in squares], sigma_min, sigma_max)


def check_sigmas(sigmas: Sequence[float], trained: SigmaRange | None = None) -> tuple[float, ...]:
    """``sigmas`` as floats; ValueError unless they fall strictly to 0 in the ``trained`` range."""
    levels = tuple(float(sigma) for sigma in sigmas)
    if len(levels) < 2:
        raise ValueError(
            f"steps {len(levels) - 1} is below 1; a schedule is one level a step and a 0"
        )
    if levels[-1] != 0:
        raise ValueError(f"the sigma schedule ends in {levels[-1]:g}; append a 0")
    for i, (high, low) in enumerate(itertools.pairwise(levels)):
        # written so that NaN fails too
        if not math.inf > high > low:
            raise ValueError(
                f"the sigma schedule goes from {high:g} to {low:g} at step {i}; it must be finite "
                "and decrease strictly"
            )
    if trained is not None:
        for sigma in (levels[0], levels[-2]):
            # a level may have passed through a root and a power
            if not trained.min * (1 - 1e-9) <= sigma <= trained.max * (1 + 1e-9):
                raise ValueError(
                    f"sigma {sigma:g} is outside the range {trained.min:g} to {trained.max:g} on "
                    "which the denoiser was trained; choose sigma_min and sigma_max within it"
                )
    return levels


def _ramp(n: int) -> list[float]:
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.0]


def _finish(levels: list[float], sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    # the ends went through a root and a power, or through t: give them back exactly
    if len(levels) > 1:
        levels[-1] = float(sigma_min)
    levels[0] = float(sigma_max)
    return check_sigmas([*levels, 0.0])


def _check_schedule(n: int, sigma_min: float, sigma_max: float) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"steps {n!r} must be a whole number of at least 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min {sigma_min} must be positive and below sigma_max {sigma_max}, both finite"
        )


def _unit_time(name: str, t: Real) -> Real:
    t = np.asarray(t, dtype=np.float64)[()]
    if not np.all((t >= 0) & (t <= 1)):
        raise ValueError(f"{name}: time {t} is outside [0, 1], on which the process is defined")
    return t


def _level(sigma: Real) -> Real:
    sigma = np.asarray(sigma, dtype=np.float64)[()]
    if not np.all((sigma >= 0) & (sigma < math.inf)):
        raise ValueError(f"sigma {sigma} must be finite and not negative")
    return sigma
