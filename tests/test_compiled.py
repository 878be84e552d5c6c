"""The compiled mode: once a batch size, guided and not, and never for another number."""

import shutil

import pytest
import torch

from fastscore.config import SigmaRange
from fastscore.engine import Clips, Engine, Model, Options, Task
from fastscore.samplers import SAMPLERS, schedule_for
from fastscore.trajectory import Parts

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
SHAPE = (1, 4, 8)
CPU = torch.device("cpu")


class Little:
    """A denoiser small enough to be compiled in seconds."""

    sigma_range = SigmaRange(0.01, 40.0)

    def parts(self, x, sigma, label, gamma):
        wave = torch.sin(3 * x) + x.mean(dim=(2, 3), keepdim=True)
        total = sigma * sigma + 0.5
        guidance = None
        if label is not None:
            column = label[:, None, None, None]
            guidance = (column >= 0).float() * torch.tanh(x + column)
        weight = torch.zeros_like(sigma) if gamma is None else gamma * 0.1
        return Parts(wave, guidance, 0.5 / total, sigma / total, weight)

    def __call__(self, x, sigma, label, gamma):
        return self.parts(x, sigma, label, gamma).total(x)


def engine_of(mode):
    model = Model(Little(), lambda x0: (x0,), SHAPE, CPU)
    return Engine(model, Options(mode=mode, buckets=(1, 2)))


def clips(labels, gamma, seed):
    n = len(labels)
    return Clips(labels, [gamma] * n, list(range(seed, seed + n)), [0] * n)


def test_numbers_compile_nothing_anew():
    eager, compiled = engine_of("eager"), engine_of("compile")
    levels = Little.sigma_range
    calls = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, nfe, top in (("dpmpp_2m_sde", 5, 40.0), ("euler", 3, 10.0), ("heun", 5, 40.0)):
            sigmas = schedule_for(name, nfe, levels, sigma_max=top)
            task = Task(SAMPLERS[name], sigmas, {}, (0.1, 8.0))
            for labels, gamma, seed in (([1], 2.0, 3), ([3], 0.5, 4), ([0, -1], 1.0, 5)):
                batch = clips(labels, gamma, seed)
                one, two = (e.draw(task, batch).outputs[0] for e in (eager, compiled))
                torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
                calls += 1
    stats = compiled.stats()
    # batches of 1 and of 2, guided and not
    assert (stats.compilations, stats.recompilations) == (4, 0)
    assert stats.compile_seconds > 0
    assert stats.clips == calls // 3 * 4


def test_another_engine_compiles_for_itself():
    """Caches of the compiler are bounded: every shape of every engine has one of its own."""
    for _ in range(2):
        engine = engine_of("compile")
        task = Task(SAMPLERS["euler"], (2.0, 1.0, 0.0))
        engine.draw(task, clips([-1], 0.0, 0))
        assert (engine.stats().compilations, engine.stats().recompilations) == (1, 0)


def test_no_compiler_is_said_at_once():
    from torch._inductor import config

    missing = {"cpp.cxx": (None, "no-such-compiler")}
    message = r'needs a C\+\+ compiler .* or use mode "eager"'
    with config.patch(missing), pytest.raises(ValueError, match=message):
        engine_of("compile")
