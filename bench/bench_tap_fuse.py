"""tap_fuse and the whole tap path against eager PyTorch and torch.compile, at every scale.

pytest bench/bench_tap_fuse.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest
import torch
from compare import compiled
from fastscore_kernels import Norms, Projections, reference, tap_fuse, tap_path, traffic
from problems import activation, fusions

CASES = pytest.mark.parametrize("fusion", fusions(), ids=str)


@CASES
def test_tap_fuse(compare, device, kernel, with_compile, fusion):
    plane, width = fusion.plane, fusion.width
    q, first, second = (activation(plane, device, c) for c in (width, 2 * width, 2 * width))
    rest = fusion.heads, fusion.spatial
    runs = {"eager": lambda: reference.tap_fuse(q, first, second, *rest)}
    for name, run in compiled(reference.tap_fuse, with_compile).items():
        runs[name] = lambda run=run: run(q, first, second, *rest)
    runs[kernel] = lambda: tap_fuse(q, first, second, *rest, backend=kernel)
    moved = traffic.tap_fuse(
        plane.batch, width, plane.positions, q.element_size(), spatial=fusion.spatial
    )
    compare(f"tap_fuse {fusion}", runs, 2e-5, moved)


@CASES
def test_tap_path(compare, device, kernel, with_compile, fusion):
    """Norms, 1 x 1 convolutions, attention and residual of a scale: matrix products included."""
    plane, w, c = fusion.plane, fusion.width, fusion.plane.channels
    feature, gradient = activation(plane, device), 1e-6 * activation(plane, device)
    norms = Norms(*(torch.randn(c, device=device) for _ in range(4)))
    weights = []
    for rows, columns in ((w, c), (2 * w, c), (2 * w, c), (w, 2 * c), (w, w)):
        weights.append(torch.randn(rows, columns, 1, 1, device=device) / columns**0.5)
        weights.append(torch.randn(rows, device=device))
    rest = norms, Projections(*weights), plane.groups, fusion.heads, fusion.spatial

    def eager(feature, gradient):
        return tap_path(feature, gradient, *rest, backend="reference")

    runs = {"eager": lambda: eager(feature, gradient)}
    for name, run in compiled(eager, with_compile).items():
        runs[name] = lambda run=run: run(feature, gradient)
    runs[kernel] = lambda: tap_path(feature, gradient, *rest, backend=kernel)
    compare(f"tap_path {fusion}", runs, 1e-4, None)
