"""The solver's fused step: a denoiser in parts and counted noise change no bit."""

import pytest
import torch

from fastscore.config import SigmaRange
from fastscore.noise import NoiseSource
from fastscore.samplers import SAMPLERS, Guidance, initial_state, schedule_for
from fastscore.trajectory import Parts

RANGE = SigmaRange(0.01, 40.0)


class InParts:
    """A denoiser that leaves its last sum to the solver."""

    def __call__(self, x, sigma, label, gamma):
        raw, guidance, c_skip, c_out, weight = self.parts(x, sigma, label, gamma)
        c_skip, c_out, weight = (c[:, None, None, None] for c in (c_skip, c_out, weight))
        x0 = c_skip * x + c_out * raw
        return x0 if guidance is None else x0 + weight * guidance

    def parts(self, x, sigma, label, gamma):
        guidance = None if label is None else 0.3 - 0.1 * x
        weight = torch.zeros_like(sigma) if label is None else gamma * 0.2
        total = sigma * sigma + 0.4
        return Parts(0.7 * x + 0.1, guidance, 0.4 / total, 0.3 * sigma / total, weight)


@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if s.nfe(6) == 6])
@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_step_has_the_bits_of_the_plain_one(name, guided):
    """A denoiser in parts, one without, and noise without counters: the same numbers."""
    sigmas = schedule_for(name, 5, RANGE)
    guidance = Guidance(torch.tensor([1, 0]), 2.0) if guided else Guidance()
    whole, source = InParts(), NoiseSource([3, 2**40])
    x = initial_state(source, (2, 1, 4, 5), sigmas[0])
    runs = [
        SAMPLERS[name].run(denoise, x, sigmas, noise=noise, guidance=guidance).x
        for denoise, noise in (
            (whole, source),
            (whole.__call__, source),
            (whole.__call__, lambda step, shape, draw=0: source(step, shape, draw)),
        )
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
