"""EDM preconditioning, and the two denoisers: one backbone for all, and the usual pair."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from fastscore_kernels import edm_inputs
from torch import Tensor, nn

from fastscore.classifier import Classifier
from fastscore.config import MelSpace, SigmaRange
from fastscore.layers import Conditioned
from fastscore.subnet import ScoreSubnet, TapFusion
from fastscore.taps import class_gradient, read_taps
from fastscore.trajectory import Parts
from fastscore.unet import UNet

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


class Denoiser(nn.Module):
    """What both denoisers are: preconditioning around a network, and a sum of parts.

    D(x, sigma) = c_skip x + c_out S(c_in x, c_noise, ..), and when guided
    D_gamma = D + gamma sigma^2 grad_x log p(y|x). Inputs and outputs are fp32 whatever the
    convolutions' precision (`set_precision`). A classifier is frozen; None where there is none.
    """

    # the attribute that holds the score network
    PART: str
    # what computes the networks' inputs: `fastscore_kernels.BACKENDS`
    backend: str | None = None

    def __init__(self, classifier: Classifier | None, space: MelSpace, sigma: SigmaRange) -> None:
        super().__init__()
        self.classifier = None if classifier is None else classifier.requires_grad_(False).eval()
        self.space = space
        self.sigma_range = sigma

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be asked for, in the order of the classifier's outputs."""
        return () if self.classifier is None else self.classifier.config.labels

    @property
    def shape(self) -> tuple[int, int]:
        """Mel bands and frames of a sample."""
        raise NotImplementedError

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The classifier, where there is one, and what was trained to predict the score."""
        score = {self.PART: getattr(self, self.PART)}
        return score if self.classifier is None else {"classifier": self.classifier, **score}

    def train(self, mode: bool = True) -> Self:
        """Switch the score network only: the classifier stays in evaluation mode."""
        super().train(mode)
        if self.classifier is not None:
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
            raise ValueError(
                f"{type(self).__name__}: give label and gamma together, or neither of them"
            )
        shared = self._shared() if self.backend == "triton" else None
        if shared is not None:
            given = (x, sigma, gamma, shared.embedding.freqs, self.space.sigma_data)
            patches, features, rest = edm_inputs(*given, *shared.reads, backend=self.backend)
            return Parts(*self._read(patches, features, label), *rest.unbind())
        c = scalings(sigma, self.space.sigma_data)
        scaled = c.c_in[:, None, None, None] * x
        raw, guidance = self._read(scaled, c.c_noise, label)
        # the chain rule through c_in x turns the scaled input's gradient into that of x
        weight = torch.zeros_like(sigma) if gamma is None else gamma * sigma.square() * c.c_in
        return Parts(raw, guidance, c.c_skip, c.c_out, weight)

    def _shared(self) -> Conditioned | None:
        """A network that reads what all of them read; None where they differ."""
        networks = list(self.networks.values())
        own = all(isinstance(n, Conditioned) for n in networks)
        return networks[0] if own and len({n.reads for n in networks}) == 1 else None

    def _read(
        self, scaled: Tensor, c_noise: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Raw output S, and grad log p(y|x) with respect to the scaled input where guided.

        scaled and c_noise, or patches and features of them, as networks take them.
        """
        raise NotImplementedError

    @torch.no_grad()
    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits [B, K] fp32 of the frozen classifier at x [B, 1, n_mels, frames] and sigma [B]."""
        c = scalings(sigma, self.space.sigma_data)
        return self.classifier(c.c_in[:, None, None, None] * x, c.c_noise).float()


class TapDenoiser(Denoiser):
    """ScoreSubnet over a frozen classifier's taps, guided by the same classifier on request.

    One forward pass of the classifier and its pull-backs serve score and guidance.
    """

    PART = "subnet"

    def __init__(
        self, classifier: Classifier, subnet: ScoreSubnet, space: MelSpace, sigma: SigmaRange
    ) -> None:
        super().__init__(classifier, space, sigma)
        self.subnet = subnet

    @property
    def shape(self) -> tuple[int, int]:
        """Mel bands and frames of a sample."""
        return self.classifier.config.n_mels, self.classifier.config.frames

    def _read(
        self, scaled: Tensor, c_noise: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        taps = read_taps(self.classifier, scaled, c_noise, label)
        raw = self.subnet(scaled, c_noise, taps.features, taps.gradients)
        return raw, taps.guidance


class GuidedUNet(Denoiser):
    """The baseline: a U-Net of its own predicts the score, and a classifier beside it guides.

    The usual pair of networks (Dhariwal and Nichol 2021). Without a classifier it is the U-Net
    alone, and ValueError is raised where a label is asked for.
    """

    PART = "unet"

    def __init__(
        self, unet: UNet, classifier: Classifier | None, space: MelSpace, sigma: SigmaRange
    ) -> None:
        super().__init__(classifier, space, sigma)
        self.unet = unet

    @property
    def shape(self) -> tuple[int, int]:
        """Mel bands and frames of a sample."""
        return self.unet.config.n_mels, self.unet.config.frames

    def _read(
        self, scaled: Tensor, c_noise: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        raw = self.unet(scaled, c_noise)
        if label is None:
            return raw, None
        if self.classifier is None:
            raise ValueError(
                "GuidedUNet: a label was given, but there is no classifier to guide with; build it "
                "with one, or leave label out"
            )
        return raw, class_gradient(self.classifier, scaled, c_noise, label)


def compose(
    classifier: Classifier, network: ScoreSubnet | UNet, space: MelSpace, sigma: SigmaRange
) -> Denoiser:
    """The denoiser that a score network makes with a classifier."""
    return (
        GuidedUNet(network, classifier, space, sigma)
        if isinstance(network, UNet)
        else TapDenoiser(classifier, network, space, sigma)
    )


def set_precision(denoiser: Denoiser, precision: str) -> None:
    """Convolve and attend in fp32, or in bf16, inside ``denoiser``.

    bf16 rounds the weights of convolutions and of the fusion of taps, for good, and with them what
    flows between layers. Statistics, softmax, embeddings, FiLM, affine parameters, the classifier's
    head and what the denoiser sums up stay fp32. ValueError for another precision, and for fp32
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
