"""Presets of small networks with random weights, written as training writes them."""

import json
from pathlib import Path

import torch
from small_models import LABELS, randomise
from torch import Tensor

from fastscore.checkpoint import save_checkpoint
from fastscore.classifier import Classifier
from fastscore.config import (
    ClassifierConfig,
    MelConfig,
    MelSpace,
    SigmaRange,
    SpectralVocoderConfig,
    SubnetConfig,
)
from fastscore.subnet import ScoreSubnet
from fastscore.train import classifier as classifier_training
from fastscore.train import score as score_training
from fastscore.vocoder import SpectralGenerator, save_vocoder

MEL = MelConfig(n_mels=16)
SPACE = MelSpace(frames=24, mean=-4.0, std=2.0, sigma_data=0.7)
SIGMA = SigmaRange(min=0.02, max=20.0)
CLASSIFIER = ClassifierConfig(
    labels=LABELS, n_mels=16, frames=24, channels=(8, 16), blocks=(1, 1), groups=4, emb_dim=16
)
SUBNET = SubnetConfig(
    channels=(8, 16), blocks=(1, 1), attention=(False, True), heads=2, groups=4, emb_dim=16
)
VOCODER = SpectralVocoderConfig(
    mel=MEL,
    dim=16,
    hidden=32,
    blocks=1,
    fine_dim=16,
    fine_hidden=32,
    fine_blocks=1,
    pitch_dim=8,
    pitch_bins=12,
)
DEFAULTS = {"sampler": "euler_ancestral", "nfe": 6, "guidance": 2.0, "guidance_interval": [0.1, 9]}


def write_preset(
    folder: Path,
    mel: MelConfig = MEL,
    space: MelSpace = SPACE,
    sigma: SigmaRange = SIGMA,
    vocoder: SpectralVocoderConfig = VOCODER,
    defaults: dict | None = None,
    seed: int = 1,
) -> Path:
    """A preset whose parts fit together unless arguments say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    classifier = randomise(Classifier(CLASSIFIER), seed)
    save_checkpoint(
        folder / "classifier.safetensors",
        "classifier",
        classifier_training.checkpoint_config(CLASSIFIER, MEL, SPACE, SIGMA),
        classifier.state_dict(),
    )
    write_score(folder / "score.safetensors", classifier, mel, space, sigma)
    save_vocoder(folder / "vocoder.safetensors", SpectralGenerator(vocoder))
    (folder / "preset.json").write_text(json.dumps(DEFAULTS if defaults is None else defaults))
    return folder


def write_score(
    path: Path,
    classifier: Classifier,
    mel: MelConfig = MEL,
    space: MelSpace = SPACE,
    sigma: SigmaRange = SIGMA,
    digest: str | None = "",
) -> None:
    """A ScoreSubnet of that classifier; ``digest`` replaces its hash, None omits it."""
    config = score_training.checkpoint_config(SUBNET, classifier, mel, space, sigma)
    if digest != "":
        config["classifier_hash"] = digest
    if digest is None:
        del config["classifier_hash"]
    subnet = randomise(ScoreSubnet(SUBNET, classifier.config), 2)
    save_checkpoint(path, "score", config, subnet.state_dict())


def speech_like(samples: int = 16000, rate: int = 16000) -> Tensor:
    """A gliding tone in noise, [samples]."""
    t = torch.arange(samples) / rate
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(4))
    return 0.3 * torch.sin(2 * torch.pi * (200 + 150 * t) * t) + 0.01 * noise
