"""Inpainting: sampling what is missing of a Mel whose other part is given.

The sampler is left as it is; the denoiser's answer is replaced. Every sampler moves x along its
answers x0, so where x0 is the known value x follows known + sigma eps by itself, with as much noise
as the sampler keeps elsewhere: the imputation of Song et al. 2021 (appendix I.2), for every solver.

That alone is not the conditional distribution: the rest listens to a noisy copy of what is known,
and the copy does not answer. Resampling (RePaint, Lugmayr et al. 2022) lets both settle, for many
times the evaluations. Answering known + strength (known - D) in the known part, the guided score of
LanPaint (Zheng et al. 2025), costs none: it drives the copy to where the denoiser itself says
known, and for Gaussian data a copy at which it does makes the answer for the rest the exact
conditional mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastscore.solver import Callback, Sample
from fastscore.trajectory import Denoiser


class Inpainting:
    """What is known of normalised Mels, and where: values [B or 1, ...] and a mask, True = known.

    The mask is bool and broadcasts with the values; both may hold one sample for a whole batch.
    Outside the mask values do not matter, NaN included. ``strength`` from 0 (imputation alone) to 1
    says how firmly the known part draws the rest to it; above, few steps diverge. ValueError for
    values or a mask of other kinds, for values that are not finite where known, for a mask that
    knows nothing, and for one that leaves nothing of a sample to draw.
    """

    def __init__(self, known: Tensor, mask: Tensor, strength: float = 0.5) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"inpainting strength {strength} must lie from 0 to 1; 0.5 is usual")
        if known.ndim < 2 or not known.is_floating_point():
            raise ValueError(
                f"the known values are {known.dtype} of shape {tuple(known.shape)}; pass floats "
                "[batch, ...]"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"the inpainting mask is {mask.dtype}; pass torch.bool, True = known")
        shape = _common_shape(known, mask)
        self.strength: float | Tensor = float(strength)
        self.mask = mask.to(known.device).expand(shape)
        kept = self.mask.flatten(1)
        if not kept.any():
            raise ValueError("the inpainting mask keeps nothing; sample without inpainting")
        for i in kept.all(dim=1).nonzero()[:1].flatten().tolist():
            raise ValueError(f"the inpainting mask leaves nothing to draw of sample {i}")
        self.known = torch.where(self.mask, known, 0.0)
        bad = (~self.known.isfinite()).sum().item()
        if bad:
            raise ValueError(
                f"{bad} of {int(self.mask.sum())} known values are not finite; mask them out"
            )

    @classmethod
    def over(cls, known: Tensor, mask: Tensor, strength: float | Tensor) -> Inpainting:
        """Of values, a mask and a strength that change in place, as buffers do, and are not looked
        at: that would wait for the device. Values must be finite outside the mask too."""
        other = object.__new__(cls)
        other.known, other.mask, other.strength = known, mask, strength
        return other

    def to(self, device: torch.device | str) -> Inpainting:
        """The same on another device."""
        return self._with(self.known.to(device), self.mask.to(device))

    def rows(self, rows: Sequence[int]) -> Inpainting:
        """What is known of the samples ``rows`` of a batch, in that order."""
        if len(self.known) == 1:
            return self
        return self._with(self.known[list(rows)], self.mask[list(rows)])

    def start(self, x: Tensor) -> Tensor:
        """A sampler's start [B, ...] from its noise x: known + noise where known."""
        self._check(x)
        return x + self.known.to(x)

    def around(self, denoise: Denoiser) -> Denoiser:
        """``denoise`` answered for where the values are known, of the same trained range."""
        return _Around(denoise, self)

    def finish(self, x: Tensor) -> Tensor:
        """A result or preview [B, ...] with the known values where they belong, to the bit."""
        self._check(x)
        return torch.where(self.mask, self.known.to(x), x)

    def sample(
        self,
        run: Callable[..., Sample],
        denoise: Denoiser,
        x: Tensor,
        sigmas: Sequence[float],
        *,
        callback: Callback | None = None,
        **common: Any,
    ) -> Sample:
        """Run a sampler of `fastscore.samplers` from the noise x around what is known.

        The callback's x0 has the known values in place. ValueError as the sampler raises it, and
        for an x of another shape.
        """

        def shown(step: int, sigma: float, x: Tensor, x0: Tensor) -> Any:
            assert callback is not None
            return callback(step, sigma, x, self.finish(x0))

        drawn = run(
            self.around(denoise), self.start(x), sigmas, callback=callback and shown, **common
        )
        return replace(drawn, x=self.finish(drawn.x))

    def _with(self, known: Tensor, mask: Tensor) -> Inpainting:
        return Inpainting.over(known, mask, self.strength)

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.known.shape[1:] or len(self.known) not in (1, len(x)):
            raise ValueError(
                f"the known values have shape {tuple(self.known.shape)} and the samples "
                f"{tuple(x.shape)}; pass known values of one sample or of each, of their size"
            )


class _Around:
    """A denoiser that answers for what is known."""

    def __init__(self, denoise: Denoiser, inpainting: Inpainting) -> None:
        self.denoise = denoise
        self.inpainting = inpainting
        # None where the denoiser has none
        self.sigma_range = getattr(denoise, "sigma_range", None)

    def __call__(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None
    ) -> Tensor:
        x0 = self.denoise(x, sigma, label, gamma)
        known = self.inpainting.known.to(x0)
        answer = known + (known - x0) * self.inpainting.strength
        return torch.where(self.inpainting.mask, answer, x0)


def prefix_mask(frames: int, shape: Sequence[int]) -> Tensor:
    """Mask bool [1, 1, n_mels, total] of the first ``frames`` of Mels of ``shape`` (n_mels, total).

    ValueError unless 1 <= frames < total.
    """
    bands, total = shape
    if not 1 <= frames < total:
        raise ValueError(
            f"a prefix of {frames} frames leaves nothing to keep or to draw; choose 1 to "
            f"{total - 1}"
        )
    return region_mask((0, bands), (0, frames), shape)


def region_mask(bands: tuple[int, int], frames: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Mask bool [1, 1, n_mels, total] of a region of Mels of ``shape`` (n_mels, total).

    ``bands`` and ``frames`` are (first, one past the last). Its complement ``~mask`` keeps
    everything else, to draw the region anew. ValueError for an empty region or one outside.
    """
    mask = torch.zeros(1, 1, *shape, dtype=torch.bool)
    for name, (first, last), size in zip(("bands", "frames"), (bands, frames), shape, strict=True):
        if not 0 <= first < last <= size:
            raise ValueError(f"{name} {first} .. {last} are empty or outside the {size} {name}")
    mask[..., bands[0] : bands[1], frames[0] : frames[1]] = True
    return mask


def _common_shape(known: Tensor, mask: Tensor) -> torch.Size:
    try:
        shape = torch.broadcast_shapes(known.shape, mask.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape[1:] != known.shape[1:] or mask.ndim != known.ndim:
        raise ValueError(
            f"the inpainting mask has shape {tuple(mask.shape)}, which does not fit the known "
            f"values' {tuple(known.shape)}"
        )
    return shape
