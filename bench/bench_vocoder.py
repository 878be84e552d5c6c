"""Waves of log-Mels: the shipped vocoder, and HiFi-GAN's largest generator.

pytest bench/bench_vocoder.py --benchmark-only [--device cuda] [--threads N] [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.workloads import grouped

GROUPS = grouped("vocoder")


@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_vocoder(measure, group):
    """A vocoder at one batch, eager and as a CUDA graph."""
    measure(group)
