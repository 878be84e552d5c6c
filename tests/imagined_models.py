"""Models, training steps and programs on a GPU that is not there, for `imagined`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_models import CLASSIFIER, LABELS, SPACE, SUBNET, small_classifier, small_denoiser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastscore.config import MelConfig, SigmaRange, UNetConfig
from fastscore.data import MelSet
from fastscore.denoiser import Denoiser, GuidedUNet, set_precision
from fastscore.engine import Rerun
from fastscore.engine.programs import Program
from fastscore.layers import set_backend
from fastscore.measure import nodes
from fastscore.train.score import ScoreTask
from fastscore.train.unet import UNetTask
from fastscore.unet import UNet
from fastscore.vocoder import PRESETS, HifiGanGenerator, render

CLIPS = 2
UNET = UNetConfig(n_mels=16, frames=24, channels=(8, 16, 16), blocks=(1, 1, 1), groups=4, heads=2)


def figures(launches: nodes.Launches) -> dict:
    return {"total": launches.total, "transfers": launches.transfers}


def everything() -> dict[str, dict]:
    """Launches and transfers by what is computed."""
    found = {}
    for backend, precision in (("reference", "fp32"), ("triton", "bf16")):
        pair = GuidedUNet(UNet(UNET), small_classifier(), SPACE, SigmaRange())
        for name, model in (("pair", pair), ("taps", small_denoiser())):
            set_precision(model, precision)
            calls = denoising(model.eval(), backend)
            found |= {f"{name}/{backend}/{what}": launches for what, launches in calls.items()}
    found["hifigan"] = vocoding()
    for backend in ("reference", "triton"):
        for task in tasks():
            found[f"train {task.name}/{backend}"] = training(task, backend)
    return {name: figures(launches) for name, launches in found.items()} | {"program": program()}


def denoising(model: Denoiser, backend: str) -> dict[str, nodes.Launches]:
    """A step, guided and not, and the classifier's logits."""
    with nodes.imagined():
        nodes.move(model)
        set_backend(model, backend)
        x, sigma, gamma = on_device(CLIPS, 1, *model.shape), *(on_device(CLIPS) for _ in "sg")
        label = on_device(CLIPS, dtype=torch.int64)
        return {
            "unguided": nodes.predicted(lambda: model(x, sigma)),
            "guided": nodes.predicted(lambda: model(x, sigma, label, gamma)),
            "logits": nodes.predicted(lambda: model.class_logits(x, sigma)),
        }


def vocoding() -> nodes.Launches:
    """Waves by HiFi-GAN, in two chunks."""
    vocoder = HifiGanGenerator(PRESETS["v3"]).eval()
    with nodes.imagined():
        nodes.move(vocoder)
        mels = on_device(CLIPS, vocoder.mel_config.n_mels, 300)
        return nodes.predicted(lambda: render(vocoder, mels))


def tasks() -> tuple[ScoreTask, UNetTask]:
    """Both trainings of score networks, on Mels of nothing."""
    mel = MelConfig(n_mels=16)
    mels = np.zeros((8, 16, 24), np.float32)
    files = [Path("a.wav")] * len(mels)
    data = MelSet(mels, np.zeros(len(mels), np.int64), ["a"] * len(mels), files, LABELS, mel)
    sets = (data, data, SPACE, SigmaRange(), CLIPS)
    return ScoreTask(SUBNET, small_classifier(CLASSIFIER), *sets), UNetTask(UNET, *sets)


def training(task: ScoreTask | UNetTask, backend: str) -> nodes.Launches:
    """Loss of one batch that lies on the device, ready for its gradients.

    Those take threads of the device, which PyTorch starts on a real one only.
    """
    batch = task.batch(0, torch.Generator().manual_seed(0), 0, 1)
    networks: list[nn.Module] = [task.trained[task.part]]
    networks += [task.frozen] if isinstance(task, ScoreTask) else []
    with FakeTensorMode():
        for network in networks:
            nodes.move(network)
            set_backend(network, backend)
        for p in networks[0].parameters():
            p.requires_grad_()
        moved = {name: on_device(*t.shape, dtype=t.dtype) for name, t in batch.items()}
        losses = []
        found = nodes.predicted(lambda: losses.append(task.loss(task.part, task.trained, moved)[0]))
        assert losses[0].device == nodes.DEVICE
        assert losses[0].requires_grad
    return found


class Event:
    """An event on a device that is not there: nothing is waited for."""

    def record(self) -> None:
        """Nothing is under way."""

    synchronize = record


def program() -> list[list[str]]:
    """Transfers of a program's calls: inputs from the host, then inputs from the device."""
    torch.cuda.Event = Event
    with nodes.imagined():
        here = {"x": torch.empty(2, 1, 4, 4), "known": torch.empty(1, 4).expand(2, 4)}
        there = {name: on_device(*t.shape) for name, t in here.items()}

        def function(b: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (b["x"] + b["known"][:, None, None],)

        made = Program(function, here, Rerun(), nodes.DEVICE)
        return [nodes.predicted(lambda inputs=i: made(inputs)).transfers for i in (here, there)]


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=nodes.DEVICE)
