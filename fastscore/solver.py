"""What every sampler shares: contracts of denoiser and noise, checked arguments, a run's state.

Knows a denoiser callable and nothing of what is behind it. Nothing here reads a device value once a
run has begun.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from fastscore_kernels import solver_step
from torch import Tensor

from fastscore.config import SigmaRange
from fastscore.noise import INITIAL_STEP
from fastscore.sde import check_sigmas


class Denoiser(Protocol):
    """``denoise(x [B, ...], sigma [B], label [B] int64 or None, gamma [B] or None) -> x0`` like x.

    It must not write later into what it returned: multistep solvers look one answer back. An
    attribute ``sigma_range: SigmaRange``, where there is one, bounds the schedules that samplers
    accept.
    """

    def __call__(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None
    ) -> Tensor:
        """Denoised x0 [B, ...] of x [B, ...] at sigma [B]."""
        ...


class Parts(NamedTuple):
    """A denoiser's answer before its last sum: x0 = c_skip x + c_out raw + weight guidance.

    raw and guidance [B, ...] of one dtype, guidance None when unguided; the rest [B] fp32.
    """

    raw: Tensor
    guidance: Tensor | None
    c_skip: Tensor
    c_out: Tensor
    weight: Tensor


@runtime_checkable
class PartsDenoiser(Protocol):
    """A denoiser that can leave its last sum to the solver, whose step then is one operation."""

    def parts(self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None) -> Parts:
        """What the answer at (x, sigma) is made of."""
        ...


@runtime_checkable
class CountedNoise(Protocol):
    """Noise that is a function of counters [B, 3] int64: seed, sample number and step."""

    def counters(self, step: int) -> Tensor:
        """The counters of a step, for `fastscore_kernels.solver_step`."""
        ...


class Noise(Protocol):
    """``noise(step, shape, draw) -> N(0, 1) of shape``; `fastscore.noise.NoiseSource` is one."""

    def __call__(self, step: int, shape: Sequence[int], draw: int = 0) -> Tensor:
        """Noise of ``shape`` [B, ...]."""
        ...


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
        self.label, self.gamma = check_guidance(guidance, x, precision.denoiser)
        self.interval = guidance.interval
        self.denoise, self.noise, self.callback, self.precision = (
            denoise,
            noise,
            callback,
            precision,
        )
        self.shape = x.shape
        self.x = x.to(precision.state)
        self.nfe = 0

    def guided(self, sigma: float) -> bool:
        """Whether the denoiser gets labels at this level."""
        low, high = self.interval
        return self.label is not None and low < sigma <= high

    def evaluate(self, x: Tensor, sigma: float) -> Tensor:
        """Denoised x0 [B, ...] in the state's dtype; counts one evaluation."""
        x0 = self.denoise(x.to(self.precision.denoiser), *self._conditions(x, sigma))
        self._check_answer(x0, self.precision.denoiser)
        self.nfe += 1
        return x0.to(self.precision.state)

    def advance(
        self, step: int, x: Tensor, old: Tensor | None, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate at level ``step`` and update: x' = keep x + pull x0 + pull_old old + kick z.

        ``weights`` are (keep, pull, pull_old, kick) of `fastscore.plans.Step`; returns x' and x0.
        In fp32 the update, its noise and the last sum of a denoiser that has `parts` are one
        operation; products and sums are rounded one by one either way, so the bits are the same.
        """
        sigma, (keep, pull, pull_old, kick) = self.sigmas[step], weights
        if not self._fusible(x, kick):
            x0 = self.evaluate(x, sigma)
            following = (x * keep).add_(x0 * pull)
            if pull_old and old is not None:
                following.add_(old * pull_old)
            if kick:
                following.add_(self.eps(step) * kick)
            return following, x0
        scalars = torch.tensor([weights], dtype=torch.float32, device=x.device)
        update: dict[str, Any] = {"old": old if pull_old else None}
        if kick:
            assert isinstance(self.noise, CountedNoise)
            update["counters"] = self.noise.counters(INITIAL_STEP + 1 + step).to(x.device)
        if isinstance(self.denoise, PartsDenoiser):
            parts = self.denoise.parts(x, *self._conditions(x, sigma))
            self._check_answer(parts.raw, parts.raw.dtype)
            self.nfe += 1
            sums = torch.stack((parts.c_skip, parts.c_out, parts.weight), dim=1)
            update |= {"raw": parts.raw, "guidance": parts.guidance}
        else:
            sums = scalars.new_zeros(len(x), 3)
            update["denoised"] = self.evaluate(x, sigma)
        coefficients = torch.cat((sums, scalars.expand(len(x), -1)), dim=1)
        return solver_step(x, coefficients, **update)

    def _fusible(self, x: Tensor, kick: float) -> bool:
        single = self.precision.denoiser == x.dtype == torch.float32
        return single and x.is_contiguous() and (not kick or isinstance(self.noise, CountedNoise))

    def _conditions(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        level = torch.full((len(x),), sigma, dtype=self.precision.denoiser, device=x.device)
        return level, *((self.label, self.gamma) if self.guided(sigma) else (None, None))

    def _check_answer(self, answer: Tensor, kind: torch.dtype) -> None:
        if answer.shape != self.shape or answer.dtype != kind:
            raise ValueError(
                f"the denoiser returned {answer.dtype} {tuple(answer.shape)} for {kind} "
                f"{tuple(self.shape)}; it must keep shape and dtype"
            )

    def eps(self, step: int, draw: int = 0) -> Tensor:
        """Fresh noise [B, ...] of a step, in the state's dtype."""
        assert self.noise is not None
        z = self.noise(INITIAL_STEP + 1 + step, self.shape, draw)
        return z.to(device=self.x.device, dtype=self.precision.state)

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
