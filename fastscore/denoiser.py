"""EDM preconditioning, and the denoiser that composes a frozen classifier with ScoreSubnet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastscore.classifier import Classifier
from fastscore.config import MelSpace, SigmaRange
from fastscore.subnet import ScoreSubnet, TapFusion
from fastscore.taps import read_taps
from fastscore.trajectory import Parts

PRECISIONS = ("fp32", "bf16")


class Scalings(NamedTuple):
    """EDM coefficients at given noise levels, each [B] (Karras et al. 2022, Table 1)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def scalings(sigma: Tensor, sigma_data: float) -> Scalings:
    """EDM coefficients for sigma [B] fp32 and the data's standard deviation."""
    total = sigma.square() + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data * total.rsqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def score_from_denoised(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """Score grad_x log p(x; sigma) = (D - x) / sigma^2 of x, D [B, 1, H, W] and sigma [B]."""
    return (denoised - x) / sigma.square()[:, None, None, None]


class TapDenoiser(nn.Module):
    """Denoiser over a frozen classifier's taps, classifier-guided on request.

    D(x, sigma) = c_skip x + c_out S(c_in x, c_noise, taps), and when guided
    D_gamma = D + gamma sigma^2 grad_x log p(y|x). Inputs and outputs are fp32 whatever the
    convolutions' precision (`set_precision`).
    """

    def __init__(
        self, classifier: Classifier, subnet: ScoreSubnet, space: MelSpace, sigma: SigmaRange
    ) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.subnet = subnet
        self.space = space
        self.sigma_range = sigma

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be asked for, in the order of the classifier's outputs."""
        return self.classifier.config.labels

    def train(self, mode: bool = True) -> TapDenoiser:
        """Switch ScoreSubnet only: the classifier is frozen and stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        gamma: Tensor | None = None,
    ) -> Tensor:
        """Clean estimate x0 of x [B, 1, n_mels, frames] fp32 at sigma [B] fp32.

        label [B] int64 (-1: this sample is unguided) and gamma [B] fp32 switch guidance on; both or
        neither are given.
        """
        return self.parts(x, sigma, label, gamma).total(x)

    def parts(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        gamma: Tensor | None = None,
    ) -> Parts:
        """What ``forward`` sums up, for a solver that takes the sum into its own step."""
        if (label is None) != (gamma is None):
            raise ValueError("TapDenoiser: give label and gamma together, or neither of them")
        c = scalings(sigma, self.space.sigma_data)
        scaled = c.c_in[:, None, None, None] * x
        taps = read_taps(self.classifier, scaled, c.c_noise, label)
        raw = self.subnet(scaled, c.c_noise, taps.features, taps.gradients)
        # the chain rule through c_in x turns the scaled input's gradient into that of x
        weight = torch.zeros_like(sigma) if gamma is None else gamma * sigma.square() * c.c_in
        return Parts(raw, taps.guidance, c.c_skip, c.c_out, weight)

    @torch.no_grad()
    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits [B, K] fp32 of the frozen classifier at x [B, 1, n_mels, frames] and sigma [B]."""
        c = scalings(sigma, self.space.sigma_data)
        return self.classifier(c.c_in[:, None, None, None] * x, c.c_noise).float()


def set_precision(denoiser: TapDenoiser, precision: str) -> None:
    """Convolve and attend in fp32, or in bf16, inside ``denoiser``.

    bf16 rounds the weights of convolutions and of the fusion of taps, for good, and with them what
    flows between layers. Statistics, softmax, embeddings, FiLM, affine parameters, the classifier's
    head and what `TapDenoiser` sums up stay fp32. ValueError for another precision, and for fp32
    where the weights have been rounded already.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose {' or '.join(PRECISIONS)}")
    narrowed = [m for m in denoiser.modules() if isinstance(m, nn.Conv2d | TapFusion)]
    if precision == "bf16":
        for module in narrowed:
            module.to(torch.bfloat16)
    elif any(p.dtype == torch.bfloat16 for m in narrowed for p in m.parameters()):
        raise ValueError("precision fp32: the weights were rounded to bf16; load the model again")
