"""What every sampler shares: checked arguments, the state of a run, its callback and its result.

Knows a denoiser callable and nothing of what is behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastscore.config import SigmaRange
from fastscore.plans import Plan
from fastscore.sde import check_sigmas
from fastscore.trajectory import Denoiser, Noise, Setting, course, trajectory

Callback = Callable[[int, float, Tensor, Tensor], Any]


class SamplingCancelledError(RuntimeError):
    """A callback returned False at ``step``, after ``nfe`` denoiser evaluations."""

    def __init__(self, step: int, nfe: int) -> None:
        super().__init__(f"sampling was cancelled at step {step} after {nfe} evaluations")
        self.step = step
        self.nfe = nfe


@dataclass(frozen=True)
class Sample:
    """Result ``x`` in the denoiser's dtype, ``nfe`` evaluations spent, and the schedule used."""

    x: Tensor
    nfe: int
    sigmas: tuple[float, ...]


@dataclass(frozen=True)
class Guidance:
    """Classifier guidance: label [B] int64 (-1: none for this sample), gamma [B] or one number.

    Outside ``interval``, low < sigma <= high, the denoiser gets label None and can skip the class
    gradient (Kynkaanniemi et al. 2024).
    """

    label: Tensor | None = None
    gamma: Tensor | float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)


@dataclass(frozen=True)
class Precision:
    """Floating types of the solver's state and of what the denoiser gets: float32 or float64."""

    state: torch.dtype = torch.float32
    denoiser: torch.dtype = torch.float32


class Common(TypedDict, total=False):
    """Keywords of every sampler; the callback is called with (step, sigma, x, x0)."""

    guidance: Guidance
    noise: Noise | None
    callback: Callback | None
    precision: Precision


class Run:
    """One sampling call: checked arguments, the evaluation count and the callback.

    ValueError for a start, schedule, guidance or precision that cannot be sampled, and for a
    denoiser whose answer has another shape or dtype than asked.
    """

    def __init__(
        self,
        denoise: Denoiser,
        x: Tensor,
        sigmas: Sequence[float],
        stochastic: bool,
        guidance: Guidance = Guidance(),
        noise: Noise | None = None,
        callback: Callback | None = None,
        precision: Precision = Precision(),
    ) -> None:
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(
                f"the start is {x.dtype} of shape {tuple(x.shape)}; pass floats [batch, ...]"
            )
        for kind in (precision.state, precision.denoiser):
            if kind not in (torch.float32, torch.float64):
                raise ValueError(
                    f"precision {kind} is not offered; choose torch.float32 or float64"
                )
        if stochastic and noise is None:
            raise ValueError("this sampler is stochastic; pass noise=NoiseSource(seeds)")
        self.trained: SigmaRange | None = getattr(denoise, "sigma_range", None)
        self.sigmas = check_sigmas(sigmas, self.trained)
        label, gamma = check_guidance(guidance, x, precision.denoiser)
        self.setting = Setting(denoise, label, gamma, noise, precision.denoiser)
        self.interval, self.callback, self.precision = guidance.interval, callback, precision
        self.x = x.to(precision.state)
        self.nfe = 0

    def guided(self, sigma: float) -> bool:
        """Whether the denoiser gets labels at this level."""
        low, high = self.interval
        return self.setting.label is not None and low < sigma <= high

    def evaluate(self, x: Tensor, sigma: float) -> Tensor:
        """Denoised x0 [B, ...] in the state's dtype; counts one evaluation."""
        level = torch.full((1,), sigma, dtype=self.precision.denoiser, device=x.device)
        x0 = self.setting.evaluate(x, level, self.guided(sigma))
        self.nfe += 1
        return x0

    def eps(self, step: int, draw: int = 0) -> Tensor:
        """Fresh noise [B, ...] of a step, in the state's dtype."""
        return self.setting.eps(step, self.x, draw)

    def follow(self, plan: Plan) -> Sample:
        """The sample at the end of a plan of one evaluation a step."""
        route = course(plan, self.sigmas, self.guided)
        dtype = torch.promote_types(self.precision.state, self.precision.denoiser)

        def watch(step: int, x: Tensor, x0: Tensor) -> None:
            self.nfe += 1
            self.report(step, self.sigmas[step], x, x0)

        table = route.table(dtype).to(self.x.device)
        return self.sample(trajectory(self.setting, route.kinds, table, self.x, watch))

    def report(self, step: int, sigma: float, x: Tensor, x0: Tensor) -> None:
        """Call the callback; SamplingCancelledError when it returns False."""
        if self.callback is not None and self.callback(step, sigma, x, x0) is False:
            raise SamplingCancelledError(step, self.nfe)

    def sample(self, x: Tensor) -> Sample:
        """The result, in the denoiser's dtype."""
        return Sample(x.to(self.precision.denoiser), self.nfe, self.sigmas)


def check_guidance(
    guidance: Guidance, x: Tensor, kind: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Label and gamma as the denoiser gets them, both None when unguided; ValueError if unfit."""
    low, high = guidance.interval
    if not 0 <= low <= high:
        raise ValueError(f"guidance interval {low} .. {high} must run from a low to a high sigma")
    label, gamma = guidance.label, guidance.gamma
    if label is None:
        return None, None
    if label.dtype != torch.int64 or label.shape != x.shape[:1]:
        raise ValueError(
            f"label is {label.dtype} of shape {tuple(label.shape)}; a batch of {len(x)} needs "
            f"int64 of shape ({len(x)},)"
        )
    if not isinstance(gamma, Tensor):
        gamma = torch.full(label.shape, float(gamma), dtype=kind)
    if gamma.shape != label.shape or not gamma.is_floating_point():
        raise ValueError(
            f"gamma is {gamma.dtype} of shape {tuple(gamma.shape)}; a batch of {len(x)} needs "
            f"floats of shape ({len(x)},)"
        )
    if len(label) and int(label.min()) < -1:
        raise ValueError(f"label {int(label.min())} is below -1; -1 leaves a sample unguided")
    for value in gamma.tolist():
        if not 0 <= value < math.inf:
            raise ValueError(f"gamma {value} must be finite and not negative; 0 is unguided")
    return label.to(x.device), gamma.to(device=x.device, dtype=kind)
