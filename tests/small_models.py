"""Small networks with no weight left at its zero start, for tests of what they compute."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastscore.classifier import Classifier
from fastscore.config import ClassifierConfig, MelSpace, SigmaRange, SubnetConfig
from fastscore.denoiser import TapDenoiser
from fastscore.subnet import ScoreSubnet

LABELS = ("yes", "no", "up", "down")
CLASSIFIER = ClassifierConfig(
    labels=LABELS,
    n_mels=16,
    frames=24,
    channels=(8, 16, 24),
    blocks=(1, 1, 1),
    groups=4,
    emb_dim=16,
)
SUBNET = SubnetConfig(
    channels=(8, 16, 16),
    blocks=(1, 1, 1),
    attention=(False, False, True),
    heads=2,
    groups=4,
    emb_dim=16,
)
SPACE = MelSpace(frames=24, mean=-4.0, std=2.0, sigma_data=0.7)


def randomise(module: nn.Module, seed: int = 1) -> nn.Module:
    """Draw every parameter anew: residual branches, FiLM and outputs start at zero otherwise."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.ndim >= 2:
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.2 * noise + float(name.endswith("weight")))
    return module


def small_classifier(config: ClassifierConfig = CLASSIFIER) -> Classifier:
    return randomise(Classifier(config)).eval()


def small_subnet(config: SubnetConfig = SUBNET) -> ScoreSubnet:
    return randomise(ScoreSubnet(config, CLASSIFIER), seed=2).eval()


def small_denoiser(config: SubnetConfig = SUBNET) -> TapDenoiser:
    return TapDenoiser(small_classifier(), small_subnet(config), SPACE, SigmaRange()).eval()


def inputs(batch: int, seed: int = 3, frames: int = 24) -> tuple[Tensor, Tensor]:
    """x [batch, 1, 16, frames] and sigma [batch] from 0.1 to 10."""
    rng = torch.Generator().manual_seed(seed)
    sigma = torch.from_numpy(np.geomspace(0.1, 10.0, batch)).float()
    x0 = 0.7 * torch.randn(batch, 1, 16, frames, generator=rng)
    return x0 + sigma[:, None, None, None] * torch.randn(x0.shape, generator=rng), sigma


def keep_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what computes in fp32 keep float64 tensors, so that float64 can serve as the yardstick.

    Statistics are taken in fp32 by casts to it; these casts are all that stands between the code
    under test and float64.
    """
    narrow = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda t: t if t.dtype == torch.float64 else narrow(t))
