"""Recorded power traces and their integral.

A trace is what this prints, time stamps and watts of one GPU:

    nvidia-smi --query-gpu=timestamp,power.draw --format=csv -lms 20 > trace.csv

    python -m fastscore.measure.traces trace.csv    # its joules, seconds and watts
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path


def integrate(
    times: Sequence[float],
    watts: Sequence[float],
    start: float | None = None,
    stop: float | None = None,
) -> float:
    """Joules by the trapezoid rule over time stamps in seconds that rise, or stand.

    ``start`` and ``stop`` cut the trace between samples, watts interpolated there. ValueError for
    fewer than two samples, stamps that fall, and a cut outside of the trace.
    """
    if len(times) != len(watts) or len(times) < 2:
        raise ValueError(
            f"a trace has {len(times)} time stamps and {len(watts)} powers; two or more of each "
            "are needed"
        )
    start, stop = times[0] if start is None else start, times[-1] if stop is None else stop
    if not times[0] <= start <= stop <= times[-1]:
        raise ValueError(
            f"the trace lasts from {times[0]:g} to {times[-1]:g} s and was asked for {start:g} to "
            f"{stop:g}"
        )
    joules = 0.0
    for i in range(len(times) - 1):
        t0, t1 = times[i], times[i + 1]
        if t1 < t0:
            raise ValueError(f"time stamps fall from {t0:g} to {t1:g} s; they must rise")
        left, right = max(t0, start), min(t1, stop)
        if left < right:
            slope = (watts[i + 1] - watts[i]) / (t1 - t0)
            middle = watts[i] + slope * ((left + right) / 2 - t0)
            joules += (right - left) * middle
    return joules


def read_trace(path: str | os.PathLike[str]) -> tuple[list[float], list[float]]:
    """Seconds since the first sample, and watts, of a file that nvidia-smi wrote.

    ValueError names the line that is not a time stamp and a power.
    """
    times, watts = [], []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(csv.reader(lines), 1):
        if number == 1 and row and row[0].strip() == "timestamp":
            continue
        try:
            stamp, power = (cell.strip() for cell in row)
            moment = datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f")
            value = float(power.removesuffix(" W"))
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is not a time stamp and a power as nvidia-smi writes "
                f'them: "{lines[number - 1][:60]}"'
            ) from None
        times.append(moment)
        watts.append(value)
    return [(t - times[0]).total_seconds() for t in times], watts


def main(arguments: Sequence[str]) -> str:
    """Joules, seconds and mean watts of the trace named in ``arguments``, as a sentence."""
    (path,) = arguments
    times, watts = read_trace(path)
    joules = integrate(times, watts)
    return f"{joules:.3f} J in {times[-1]:.3f} s, {joules / times[-1]:.3f} W, {len(times)} samples"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
