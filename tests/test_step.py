"""The guided step as one function: equal to autograd, eager and compiled, and compiled once."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from small_models import CLASSIFIER, SPACE, SUBNET, inputs, randomise, small_denoiser
from test_denoiser import by_hand
from torch import Tensor

from fastscore.classifier import Classifier
from fastscore.config import SigmaRange
from fastscore.denoiser import TapDenoiser
from fastscore.layers import set_backend
from fastscore.packed import obstacle, pack
from fastscore.subnet import ScoreSubnet

COMPILER = next(filter(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++")), None)


def questions(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, sigma, label (-1 included) and gamma (0 included), drawn anew for every seed."""
    rng = torch.Generator().manual_seed(seed)
    x, _ = inputs(batch, seed)
    sigma = torch.exp(torch.empty(batch).uniform_(-4.6, 3.7, generator=rng))
    label = torch.randint(-1, 4, (batch,), generator=rng)
    gamma = torch.rand(batch, generator=rng) * 10 * (torch.rand(batch, generator=rng) > 0.2)
    return x * (1 + sigma[:, None, None, None]), sigma, label, gamma


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest, for each sample."""
    error = (actual - expected).abs().flatten(1).amax(dim=1)
    assert (error <= 1e-5 * expected.abs().flatten(1).amax(dim=1)).all()


@pytest.mark.parametrize("form", ["reference", "native", "packed"])
def test_equals_autograd_for_random_labels_strengths_and_noise_levels(form):
    denoiser = small_denoiser().requires_grad_(False)
    set_backend(denoiser, "reference" if form == "reference" else None)
    if form == "packed":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this build of PyTorch has no oneDNN")
        pack(denoiser)
    for seed, batch in enumerate((1, 4, 2, 5, 3, 8)):
        args = questions(batch, seed)
        assert_close(denoiser(*args), by_hand(*args))
        assert_close(denoiser(*args[:2]), by_hand(*args[:2]))


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler; none is here")
def test_compiles_to_one_graph_that_serves_every_label_strength_and_noise_level():
    """packed as well: prepared weights are not for a compiler, which must not see them."""
    # two scales of one block: a compiler takes its time for each
    classifier = replace(CLASSIFIER, channels=(8, 16), blocks=(1, 1))
    subnet = replace(SUBNET, channels=(8, 16), blocks=(1, 1), attention=(False, True))
    denoiser = TapDenoiser(
        randomise(Classifier(classifier)),
        randomise(ScoreSubnet(subnet, classifier), seed=2),
        SPACE,
        SigmaRange(),
    )
    denoiser.eval().requires_grad_(False)
    if not obstacle(denoiser):
        pack(denoiser)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(denoiser, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            args = questions(3, seed)
            with torch.no_grad():
                actual = compiled(*args)
            assert_close(actual, by_hand(*args, denoiser=denoiser))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
