"""Label to waveform: ``Pipeline.sample`` of the shipped preset, vocoder included.

pytest bench/bench_end_to_end.py --benchmark-only [--device cuda] [--benchmark-json FILE]
"""

import pytest

from fastscore.measure.workloads import grouped

GROUPS = grouped("end-to-end")


@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_end_to_end(measure, group):
    """The preset at one batch and number of evaluations, on every backend, mode and precision."""
    measure(group)
