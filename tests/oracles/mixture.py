"""A class-conditional Gaussian mixture with everything known in closed form, as a denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Components N(means[k], variances[k] I) of weight weights[k], each of one class; float64."""

    means: Tensor  # [K, d]
    variances: Tensor  # [K]
    weights: Tensor  # [K]
    classes: Tensor  # [K] int64

    def log_joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x, k; sigma) [B, K] for x [B, d] and sigma [B]."""
        variance = self.variances + sigma[:, None] ** 2
        distance = (x[:, None, :] - self.means).square().sum(-1)
        size = self.means.shape[1]
        return self.weights.log() - 0.5 * (
            distance / variance + size * (2 * math.pi * variance).log()
        )

    def log_class(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """log p(y | x; sigma) [B] for labels y [B]."""
        joint = self.log_joint(x, sigma)
        outside = self.classes != label[:, None]
        inside = joint.masked_fill(outside, -math.inf)
        return inside.logsumexp(1) - joint.logsumexp(1)

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x; sigma] [B, d]."""
        share = self.log_joint(x, sigma).softmax(1)
        noise = sigma[:, None, None] ** 2
        posterior = (noise * self.means + self.variances[:, None] * x[:, None, :]) / (
            self.variances[:, None] + noise
        )
        return (share[..., None] * posterior).sum(1)

    def __call__(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None
    ) -> Tensor:
        """The denoiser contract: guided where label >= 0, by autograd through log p(y | x)."""
        flat, level = x.flatten(1).double(), sigma.double()
        x0 = self.denoised(flat, level)
        if label is not None:
            with torch.enable_grad():
                leaf = flat.detach().requires_grad_()
                total = self.log_class(leaf, level, label.clamp(min=0)).sum()
                (gradient,) = torch.autograd.grad(total, leaf)
            weight = gamma.double() * level**2 * (label >= 0)
            x0 = x0 + weight[:, None] * gradient
        return x0.reshape(x.shape).to(x.dtype)

    def given(self, label: int) -> Mixture:
        """The mixture p(x | y)."""
        keep = self.classes == label
        weights = self.weights[keep]
        return Mixture(
            self.means[keep], self.variances[keep], weights / weights.sum(), self.classes[keep]
        )

    def mean(self) -> Tensor:
        """Mean [d]."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Covariance [d, d]."""
        centred = self.means - self.mean()
        between = (self.weights[:, None] * centred).T @ centred
        return between + (self.weights @ self.variances) * torch.eye(len(self.mean()))

    def draw(self, count: int, sigma: float, generator: torch.Generator) -> Tensor:
        """Exact draws [count, d] of x0 + sigma eps."""
        which = torch.multinomial(self.weights, count, True, generator=generator)
        z = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[which] + (self.variances[which, None] + sigma**2).sqrt() * z


def three_classes() -> Mixture:
    """Five overlapping components in four dimensions; class 2 has three of them."""
    return Mixture(
        means=torch.tensor(
            [
                [1.5, 0.5, 0.0, -0.5],
                [-1.5, 0.5, 1.0, 0.0],
                [0.0, -1.5, 0.5, 1.0],
                [0.5, 1.5, -1.5, 0.5],
                [-1.0, -1.0, -1.0, -1.0],
            ],
            dtype=torch.float64,
        ),
        variances=torch.tensor([0.15, 0.2, 0.1, 0.25, 0.2], dtype=torch.float64),
        weights=torch.tensor([0.3, 0.25, 0.15, 0.2, 0.1], dtype=torch.float64),
        classes=torch.tensor([0, 1, 2, 2, 2]),
    )
