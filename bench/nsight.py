"""Nsight Compute on chosen kernels: the command, and its CSV as figures.

Counters are often not given to a user, or to a container: then there are no figures, and a sentence
that says why.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

TOOL = "ncu"
# columns that are kept, by what they are called here; another version may lack some
WANTED = {
    "time": "gpu__time_duration.sum",
    "memory_bytes": "dram__bytes.sum.per_second",
    "memory_share": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_share": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "sm_share": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "occupancy_limit": "sm__maximum_warps_per_active_cycle_pct",
    "registers": "launch__registers_per_thread",
    "grid": "launch__grid_size",
    "block": "launch__block_size",
    "shared": "launch__shared_mem_per_block_dynamic",
}
_TENSOR = re.compile(r"pipe_tensor.*\.pct_of_peak_sustained_active$")
_ERROR = re.compile(r"^==ERROR== (.*)$", re.MULTILINE)


def command(kernels: Sequence[str], launches: int, child: Sequence[str]) -> list[str]:
    """ncu over ``child``, which says where profiling begins; at most ``launches`` are profiled.

    Clocks stay as they are: figures taken beside these had none fixed.
    """
    names = "|".join(re.escape(name) for name in kernels)
    return [
        *(TOOL, "--clock-control", "none", "--profile-from-start", "off"),
        *("--target-processes", "application-only", "--kernel-name", f"regex:^({names})$"),
        *("--launch-count", str(launches), "--set", "basic"),
        *("--section", "MemoryWorkloadAnalysis", "--section", "ComputeWorkloadAnalysis"),
        *("--csv", "--page", "raw", "--print-units", "base", *child),
    ]


def figures(text: str, code: int) -> dict[str, list[dict[str, Any]]]:
    """Launches by kernel, each figure by its name with ``value`` and ``unit``.

    ValueError, with what ncu says, where it profiled nothing.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        said = _ERROR.search(text) or re.search(r"^==WARNING== (.*)$", text, re.MULTILINE)
        raise ValueError(f"ncu profiled nothing: {said[1] if said else f'it ended with {code}'}")
    table = "\n".join(line for line in lines[first:] if line.startswith('"'))
    units, *rows = csv.DictReader(io.StringIO(table))
    if not rows:
        raise ValueError(f"ncu profiled nothing: its table is empty, and it ended with {code}")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["Kernel Name"], []).append(_launch(row, units))
    return found


def _launch(row: Mapping[str, str], units: Mapping[str, str]) -> dict[str, Any]:
    columns = {name: column for name, column in WANTED.items() if column in row}
    # one column a kind of tensor instruction: the busiest is the kernel's
    tensor = [c for c in row if _TENSOR.search(c) and _number(row[c]) is not None]
    if tensor:
        columns["tensor_share"] = max(tensor, key=lambda c: _number(row[c]) or 0.0)
    return {
        name: {"value": _number(row[column]), "unit": units.get(column, "")}
        for name, column in columns.items()
    }


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
