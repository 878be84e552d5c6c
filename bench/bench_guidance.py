"""What guidance costs: a step without it, with it, and as autograd does it, side by side.

pytest bench/bench_guidance.py [--threads N] [--rounds N] [--benchmark-json FILE]

"autograd" is the implementation that one writes first, as guided-diffusion has it (Dhariwal and
Nichol 2021): the classifier runs once for its taps, which autograd differentiates by logsumexp, and
once more for the gradient of the label's log-probability at the input. It is timed on PyTorch's own
operators and on ours, so that the ratio is not owed to the operators. "unguided" and "guided" are
the model's own step; "packed" are the same two with prepared weights, and "bf16" with narrow
convolutions besides.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastscore.cost import step_macs
from fastscore.denoiser import TapDenoiser, scalings, set_precision
from fastscore.layers import set_backend
from fastscore.measure.models import MODELS
from fastscore.measure.subjects import step_arguments
from fastscore.measure.timing import check_equal, interleaved, ratios
from fastscore.packed import obstacle, pack

# preset, batch: what a CPU can repeat in some seconds
WORKLOADS = [("paper", 1), ("digits", 1), ("digits", 8), ("paper", 8)]


def model(preset: str) -> TapDenoiser:
    """The shipped weights of ``digits``; random ones elsewhere."""
    return MODELS[preset]().eval().requires_grad_(False).to(memory_format=torch.channels_last)


def by_autograd(net: TapDenoiser, x: Tensor, sigma: Tensor, label: Tensor, gamma: Tensor) -> Tensor:
    """The guided step with the classifier called and differentiated twice."""
    c = scalings(sigma, net.space.sigma_data)
    c_skip, c_out, c_in = (v[:, None, None, None] for v in (c.c_skip, c.c_out, c.c_in))
    classifier = net.classifier
    with torch.enable_grad():
        emb = classifier.embed(c.c_noise)
        # the taps are the leaves: as in the step itself, nothing below the shallowest is asked for
        h = classifier.lower(c_in * x, emb).detach().requires_grad_()
        logits, taps = classifier.upper(h, emb)
        gradients = torch.autograd.grad(logits.logsumexp(dim=1).sum(), taps)
        leaf = x.detach().requires_grad_()
        log_p = classifier(c_in * leaf, c.c_noise).log_softmax(dim=1)
        chosen = log_p.gather(1, label[:, None]).sum()
        (slope,) = torch.autograd.grad(chosen, leaf)
    with torch.no_grad():
        features = tuple(t.detach() for t in taps)
        raw = net.subnet(c_in * x, c.c_noise, features, gradients)
    strength = (gamma * sigma.square())[:, None, None, None]
    return c_skip * x + c_out * raw + strength * slope


def implementations(net: TapDenoiser, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Guided steps that must agree, by name, and two unguided ones."""
    x, sigma, label, gamma = step_arguments(batch, True, torch.device("cpu"))
    plain = copy.deepcopy(net)
    set_backend(plain, "reference")
    runs = {
        "autograd, reference": functools.partial(by_autograd, plain, x, sigma, label, gamma),
        "autograd, native": functools.partial(by_autograd, net, x, sigma, label, gamma),
        "guided": functools.partial(net, x, sigma, label, gamma),
        "unguided": functools.partial(net, x, sigma),
    }
    if not obstacle(net):
        packed = copy.deepcopy(net)
        pack(packed)
        runs["guided, packed"] = functools.partial(packed, x, sigma, label, gamma)
        runs["unguided, packed"] = functools.partial(packed, x, sigma)
        narrow = copy.deepcopy(net)
        set_precision(narrow, "bf16")
        if not obstacle(narrow):
            pack(narrow)
            runs["guided, packed, bf16"] = functools.partial(narrow, x, sigma, label, gamma)
    return runs


@pytest.mark.parametrize(("preset", "batch"), WORKLOADS)
@torch.no_grad()
def test_guidance(benchmark, request, device, preset, batch):
    if device.type != "cpu":
        pytest.skip("the baseline here is PyTorch's on a CPU")
    net = model(preset)
    runs = implementations(net, batch)
    # no figure for a wrong answer
    answers = {name: run() for name, run in runs.items()}
    guided, unguided = answers["autograd, reference"], answers["unguided"]
    for name, answer in answers.items():
        expected = unguided if name.startswith("unguided") else guided
        check_equal({"": expected, name: answer}, 0.05 if "bf16" in name else 1e-5)
    timings = interleaved(runs, request.config.getoption("--rounds"), round_seconds=0.0)
    form = ", packed" if "guided, packed" in runs else ""
    macs = step_macs(net)
    row = {
        "preset": preset,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "ms": {name: 1e3 * t.median for name, t in timings.items()},
        # each with its 20th and 80th percentile over rounds
        "guided / unguided": ratios(timings, "guided" + form, "unguided" + form),
        "guided / unguided, by multiply-accumulates": macs["guided"] / macs["unguided"],
        "autograd, native / guided": ratios(timings, "autograd, native", "guided" + form),
        "autograd, reference / guided": ratios(timings, "autograd, reference", "guided" + form),
        "guided / unguided, not packed": ratios(timings, "guided", "unguided"),
        "autograd, native / guided, not packed": ratios(timings, "autograd, native", "guided"),
    }
    if "guided, packed, bf16" in runs:
        row["fp32 / bf16, guided, packed"] = ratios(
            timings, "guided, packed", "guided, packed, bf16"
        )
    benchmark.extra_info.update(row, seconds={k: t.seconds for k, t in timings.items()})
    print("\n" + "\n".join(f"{k}: {_shown(v)}" for k, v in row.items()))
    benchmark.pedantic(runs["guided" + form], rounds=5, warmup_rounds=1)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.2f}" for k, v in value.items())
    if isinstance(value, tuple):
        return "{:.2f} [{:.2f}, {:.2f}]".format(*value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
