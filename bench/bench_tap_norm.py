"""tap_norm against the same in eager PyTorch and torch.compile, at every tap of the presets.

pytest bench/bench_tap_norm.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest
import torch
from compare import compiled
from fastscore_kernels import reference, tap_norm, traffic
from problems import activation, classifier_planes


def eager(feature, gradient, groups, *parameters):
    return reference.tap_norm(feature, gradient, groups, *parameters, 1e-5)


@pytest.mark.parametrize("plane", classifier_planes(), ids=str)
def test_tap_norm(compare, device, kernel, with_compile, plane):
    feature, gradient = activation(plane, device), 1e-6 * activation(plane, device)
    rest = [torch.randn(plane.channels, device=device) for _ in range(4)]
    runs = {"eager": lambda: eager(feature, gradient, plane.groups, *rest)}
    for name, run in compiled(eager, with_compile).items():
        runs[name] = lambda run=run: run(feature, gradient, plane.groups, *rest)
    runs[kernel] = lambda: tap_norm(feature, gradient, plane.groups, *rest, backend=kernel)
    moved = traffic.tap_norm(plane.batch, plane.channels, plane.positions, feature.element_size())
    compare(f"tap_norm {plane}", runs, 2e-5, moved)
