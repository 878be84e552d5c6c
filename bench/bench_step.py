"""One denoiser evaluation, the unit every sampler repeats: fastscore and classifier + U-Net.

pytest bench/bench_step.py --benchmark-only [--device cuda] [--threads N] [--benchmark-json FILE]
"""

import pytest

from fastscore.measure import subjects
from fastscore.measure.workloads import Step, grouped, suite


@pytest.mark.parametrize("group", grouped("step").values(), ids=list(grouped("step")))
def test_step(measure, group):
    """A model and its baselines at one size, on every backend, mode and precision."""
    measure(group)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize(("model", "batch"), [("digits", 1), ("digits", 8), ("paper", 1)])
def test_kernels(compare, device, kernel, model, batch, guided):
    """The same step on the reference, op by op in PyTorch ("eager"), and on the compiled kernels.

    digits: the shipped weights. fp32 sums are taken in another order through some thirty layers, so
    the answers differ by at most 1e-4 of the largest.
    """
    steps = {"eager": Step(batch, "reference", model, guided=guided)}
    steps[kernel] = Step(batch, kernel, model, guided=guided)
    assert {step.name for step in steps.values()} <= {w.name for w in suite("step")}
    runs = {name: subjects.build(step, device).run for name, step in steps.items()}
    # a sampler repeats one model: its weights stay in cache, as they do here within a round
    compare(f"step {steps[kernel].problem}", runs, subjects.STEP, None, 0.2, cold=False)
