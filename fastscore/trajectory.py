"""A sampling trajectory as a function of tensors alone, so that it can be captured and replayed.

What shapes the computation (how many steps, which are guided, look back or draw noise) is known
before it starts: a `Kind` a step. What only changes its numbers (levels, weights, labels,
strengths, seeds) lives in tensors on the device. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from fastscore_kernels import solver_step
from torch import Tensor

from fastscore.noise import INITIAL_STEP
from fastscore.plans import Plan


class Denoiser(Protocol):
    """``denoise(x [B, ...], sigma [B], label [B] int64 or None, gamma [B] or None) -> x0`` like x.

    It must not write later into what it returned: multistep solvers look back at its answers. An
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

    def total(self, x: Tensor) -> Tensor:
        """x0 [B, ...] fp32 of x [B, ...]."""
        shape = (-1, *[1] * (x.ndim - 1))
        denoised = self.c_skip.view(shape) * x + self.c_out.view(shape) * self.raw.float()
        if self.guidance is not None:
            denoised = denoised + self.weight.view(shape) * self.guidance.float()
        return denoised


@runtime_checkable
class PartsDenoiser(Protocol):
    """A denoiser that can leave its last sum to the solver, whose step then is one operation."""

    def parts(self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None) -> Parts:
        """What the answer at (x, sigma) is made of."""
        ...


class Noise(Protocol):
    """``noise(step, shape, draw) -> N(0, 1) of shape``; `fastscore.noise.NoiseSource` is one."""

    def __call__(self, step: int, shape: Sequence[int], draw: int = 0) -> Tensor:
        """Noise of ``shape`` [B, ...]."""
        ...


@runtime_checkable
class CountedNoise(Protocol):
    """Noise that is a function of counters [B, 3] int64: seed, sample number and step."""

    def counters(self, step: int | Tensor) -> Tensor:
        """The counters of a step, for `fastscore_kernels.solver_step`."""
        ...


class Kind(NamedTuple):
    """What one step computes, whatever its numbers: the shape of a graph."""

    guided: bool = False
    old: bool = False
    older: bool = False
    kick: bool = False


@dataclass(frozen=True)
class Course:
    """A plan along its levels: ``kinds`` shape the computation, ``rows`` are its numbers.

    A row a step: sigma, keep, pull, pull_old, pull_older, kick. The last step only denoises.
    """

    kinds: tuple[Kind, ...]
    rows: tuple[tuple[float, ...], ...]

    def table(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as a tensor [steps, 6] on the CPU."""
        return torch.tensor(self.rows, dtype=dtype)


def course(plan: Plan, sigmas: Sequence[float], guided: Callable[[float], bool]) -> Course:
    """Course of ``plan`` along ``sigmas`` (a 0 last); ``guided(sigma)`` says where labels count."""
    rows = [
        (sigma, step.keep, step.pull, step.pull_old, step.pull_older, step.kick)
        for sigma, step in zip(sigmas[:-1], plan, strict=True)
    ]
    kinds = [
        Kind(guided(sigma), pull_old != 0, pull_older != 0, kick != 0)
        for sigma, _, _, pull_old, pull_older, kick in rows
    ]
    return Course(tuple(kinds), tuple(rows))


@dataclass(frozen=True)
class Setting:
    """What all steps of a trajectory share; label and gamma [B] are None when nothing is guided.

    ``dtype`` is what the denoiser gets and gives; ``backend`` implements the solver's update.
    """

    denoise: Denoiser
    label: Tensor | None = None
    gamma: Tensor | None = None
    noise: Noise | None = None
    dtype: torch.dtype = torch.float32
    backend: str | None = None

    def evaluate(self, x: Tensor, sigma: Tensor, guided: bool) -> Tensor:
        """Denoised x0 [B, ...] in x's dtype at sigma [1]; ValueError for an answer unlike x."""
        asked = x.to(self.dtype)
        x0 = self.denoise(asked, *self._conditions(x, sigma, guided))
        self._check(x0, asked)
        return x0.to(x.dtype)

    def advance(
        self,
        step: int | Tensor,
        x: Tensor,
        row: Tensor,
        kind: Kind,
        old: Tensor | None = None,
        older: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x' = keep x + pull x0 + pull_old old + kick z + pull_older older, and x0.

        row [6] as in `Course`; old and older are the answers one and two steps before; ``step``
        numbers the noise. In fp32 the update, its noise and the last sum of a denoiser that has
        `parts` are one operation; products and sums are rounded one by one either way, so the bits
        are the same.
        """
        if self._fusible(x, kind):
            following, x0 = self._fused(step, x, row, kind, old)
        else:
            _, keep, pull, pull_old, _, kick = row
            x0 = self.evaluate(x, row[:1], kind.guided)
            following = (x * keep).add_(x0 * pull)
            if kind.old:
                following.add_(old * pull_old)
            if kind.kick:
                following.add_(self.eps(step, x) * kick)
        if kind.older:
            following.add_(older * row[4])
        return following, x0

    def eps(self, step: int | Tensor, x: Tensor, draw: int = 0) -> Tensor:
        """Fresh noise of a step, shaped and placed as x."""
        assert self.noise is not None
        assert isinstance(step, int)
        z = self.noise(INITIAL_STEP + 1 + step, x.shape, draw)
        return z.to(device=x.device, dtype=x.dtype)

    def _fused(
        self, step: int | Tensor, x: Tensor, row: Tensor, kind: Kind, old: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        update: dict[str, Any] = {"old": old if kind.old else None}
        if kind.kick:
            assert isinstance(self.noise, CountedNoise)
            update["counters"] = self.noise.counters(INITIAL_STEP + 1 + step).to(x.device)
        if isinstance(self.denoise, PartsDenoiser):
            parts = self.denoise.parts(x, *self._conditions(x, row[:1], kind.guided))
            self._check(parts.raw, x, parts.raw.dtype)
            sums = torch.stack((parts.c_skip, parts.c_out, parts.weight), dim=1)
            update |= {"raw": parts.raw, "guidance": parts.guidance}
        else:
            sums = row.new_zeros(len(x), 3)
            update["denoised"] = self.evaluate(x, row[:1], kind.guided)
        weights = torch.cat((row[1:4], row[5:])).expand(len(x), -1)
        coefficients = torch.cat((sums, weights), dim=1)
        return solver_step(x, coefficients, backend=self.backend, **update)

    def _fusible(self, x: Tensor, kind: Kind) -> bool:
        single = self.dtype == x.dtype == torch.float32
        counted = not kind.kick or isinstance(self.noise, CountedNoise)
        return single and x.is_contiguous() and counted

    def _conditions(
        self, x: Tensor, sigma: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        level = sigma.to(self.dtype).repeat(len(x))
        return level, *((self.label, self.gamma) if guided else (None, None))

    def _check(self, answer: Tensor, asked: Tensor, dtype: torch.dtype | None = None) -> None:
        dtype = asked.dtype if dtype is None else dtype
        if answer.shape != asked.shape or answer.dtype != dtype:
            raise ValueError(
                f"the denoiser returned {answer.dtype} {tuple(answer.shape)} for {dtype} "
                f"{tuple(asked.shape)}; it must keep shape and dtype"
            )


# called with (step, x, x0) after each step
Watcher = Callable[[int, Tensor, Tensor], Any]
# one step of a trajectory: (step, x, old, older) -> (x', x0), and for the last step x -> x0
Advance = Callable[[int, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def follow(
    x: Tensor,
    steps: int,
    advance: Advance,
    finish: Callable[[Tensor], Tensor],
    watch: Watcher | None = None,
) -> Tensor:
    """Take ``steps`` steps from x, of which the last only denoises; returns x0 [B, ...]."""
    old = older = None
    for i in range(steps - 1):
        following, x0 = advance(i, x, old, older)
        if watch is not None:
            watch(i, x, x0)
        x, old, older = following, x0, old
    x0 = finish(x)
    if watch is not None:
        watch(steps - 1, x, x0)
    return x0


def trajectory(
    setting: Setting,
    kinds: Sequence[Kind],
    table: Tensor,
    x: Tensor,
    watch: Watcher | None = None,
) -> Tensor:
    """x0 [B, ...] at the end of the course of ``kinds`` and ``table`` [steps, 6] from x [B, ...].

    The table is of the state's dtype or wider, on x's device.
    """

    def advance(
        i: int, x: Tensor, old: Tensor | None, older: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return setting.advance(i, x, table[i], kinds[i], old, older)

    def finish(x: Tensor) -> Tensor:
        return setting.evaluate(x, table[-1, :1], kinds[-1].guided)

    return follow(x, len(kinds), advance, finish, watch)
