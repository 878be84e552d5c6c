"""One denoiser evaluation, unguided and guided side by side: the unit every sampler repeats.

pytest bench/bench_step.py --benchmark-only [--device cuda] [--threads N] [--benchmark-json FILE]
"""

import copy
import functools

import pytest
import torch

from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, SUBNETS, MelSpace, SigmaRange
from fastscore.cost import parameters, step_macs
from fastscore.denoiser import TapDenoiser
from fastscore.layers import set_backend
from fastscore.pipeline import Pipeline
from fastscore.subnet import ScoreSubnet

# preset, batch, rounds: what a CPU can repeat in some seconds
WORKLOADS = [("tiny", 1, 30), ("tiny", 8, 5), ("paper", 1, 5)]


def denoiser(preset: str, device: torch.device) -> TapDenoiser:
    """Random weights, none of them at the zero it starts from: they cost what trained ones cost."""
    torch.manual_seed(0)
    classifier = CLASSIFIERS[preset]
    net = TapDenoiser(
        Classifier(classifier), ScoreSubnet(SUBNETS[preset], classifier), MelSpace(), SigmaRange()
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    net = net.eval().requires_grad_(False)
    return net.to(device, memory_format=torch.channels_last)


def arguments(batch: int, guided: bool, device: torch.device) -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, 1, 80, 64, device=device)
    sigma = (
        torch.logspace(-1, 1, batch, device=device) if batch > 1 else torch.ones(1, device=device)
    )
    if not guided:
        return x, sigma
    label = torch.arange(batch, device=device) % 10
    return x, sigma, label, torch.full((batch,), 3.0, device=device)


def check(net: TapDenoiser, args: tuple[torch.Tensor, ...]) -> None:
    """No row for a step that is wrong: finite, and guided by exactly what gamma asks for."""
    out = net(*args)
    assert out.shape == args[0].shape
    assert out.isfinite().all()
    if len(args) == 4:
        x, sigma, label, gamma = args
        plain = net(x, sigma)
        torch.testing.assert_close(net(x, sigma, label, 0 * gamma), plain)
        torch.testing.assert_close(
            net(x, sigma, label, 2 * gamma) - plain, 2 * (out - plain), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize(("preset", "batch", "rounds"), WORKLOADS, ids=lambda v: str(v))
@torch.no_grad()
def test_step(benchmark, device, preset, batch, rounds, guided):
    net, args = denoiser(preset, device), arguments(batch, guided, device)
    check(net, args)
    macs = step_macs(net)["guided" if guided else "unguided"]

    def step() -> torch.Tensor:
        out = net(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return out

    benchmark.group = f"step: {preset}, batch {batch}"
    benchmark.extra_info.update(
        preset=preset,
        batch=batch,
        guided=guided,
        dtype="float32",
        gmacs_per_clip=macs / 1e9,
        parameters=parameters(net),
    )
    # the first evaluations choose algorithms and fill caches
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=3, iterations=1)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize(("preset", "batch"), [("digits", 1), ("digits", 8), ("paper", 1)])
def test_kernels_end_to_end(compare, device, kernel, preset, batch, guided):
    """The same step on the reference, op by op in PyTorch ("eager"), and on the compiled kernels.

    digits: the shipped weights. fp32 sums are taken in another order through some thirty layers, so
    the answers differ by at most 1e-4 of the largest.
    """
    net = (
        Pipeline.from_pretrained(preset).denoiser
        if preset == "digits"
        else denoiser(preset, device)
    )
    net = net.to(device)
    args, runs = arguments(batch, guided, device), {}
    for name, backend in (("eager", "reference"), (kernel, kernel)):
        copied = copy.deepcopy(net)
        set_backend(copied, backend)
        check(copied, args)
        runs[name] = functools.partial(copied, *args)
    problem = f"step {preset} {batch} {'guided' if guided else 'unguided'}"
    # a sampler repeats one model: its weights stay in cache, as they do here within a round
    compare(problem, runs, 1e-4, None, round_seconds=0.2)


def test_sampling_end_to_end(compare, device, kernel):
    """A guided digit in 10 evaluations, noise and vocoder included, on both backends.

    The answers compared are log-Mels: a sampler feeds every difference back into the next step.
    """
    runs = {}
    for name, backend in (("eager", "reference"), (kernel, kernel)):
        pipeline = Pipeline.from_pretrained("digits", device=device, backend=backend)
        runs[name] = functools.partial(draw, pipeline)
    compare("sampling digits 1, 10 guided evaluations", runs, 1e-3, None, round_seconds=0.5)


def draw(pipeline: Pipeline) -> torch.Tensor:
    return pipeline.sample("seven", steps=10).mels
