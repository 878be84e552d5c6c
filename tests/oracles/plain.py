"""A denoiser that needs no model and no tolerance."""

import torch

from fastscore.config import SigmaRange


class Plain:
    """A denoiser of additions and products alone, element by element: its bits know no batch."""

    sigma_range = SigmaRange(0.01, 40.0)

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, label, gamma):
        self.calls.append((sigma, label, gamma))
        assert not torch.is_grad_enabled()
        noise = (sigma * sigma).view(-1, *[1] * (x.ndim - 1))
        x0 = (x * 0.4 + noise * 0.3) / (noise + 0.4)
        if label is not None:
            shift = torch.where(label < 0, 0.0, gamma * (label + 1) * 0.1)
            x0 = x0 + shift.view(noise.shape) / (noise + 1)
        return x0
