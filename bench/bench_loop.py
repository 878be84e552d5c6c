"""A whole trajectory of 8 and 12 evaluations by the engine, without vocoder.

pytest bench/bench_loop.py --benchmark-only [--device cuda] [--threads N] [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.workloads import grouped

GROUPS = grouped("loop")


@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_loop(measure, group):
    """A model and its baselines along the same levels, on every backend, mode and precision."""
    measure(group)
