"""Metrics of a training: a CSV table, TensorBoard events, and a progress bar."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

from fastscore.files import write_bytes


class Means:
    """Running means of named values since the last report; non-finite values are left out."""

    def __init__(self, state: dict[str, list[float]] | None = None) -> None:
        self.state = {name: list(pair) for name, pair in (state or {}).items()}

    def add(self, values: dict[str, float]) -> None:
        """Count one value a name."""
        for name, value in values.items():
            total = self.state.setdefault(name, [0.0, 0.0])
            if math.isfinite(value):
                total[0] += value
                total[1] += 1

    def take(self) -> dict[str, float]:
        """Means so far (NaN where nothing finite came), and start over."""
        means = {k: total / n if n else math.nan for k, (total, n) in self.state.items()}
        self.state = {}
        return means


class MetricsTable:
    """metrics.csv: one row a reported step; columns in order of first appearance, blank if absent.

    Rows after ``step`` are dropped on opening, so that the table of a resumed training equals that
    of an uninterrupted one.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._columns = ["step"]
        self._rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self._rows = [
                    r for r in csv.DictReader(file) if _is_step(r) and int(r["step"]) <= step
                ]
        for row in self._rows:
            self._columns += [k for k, v in row.items() if v and k not in self._columns]
        self._rewrite()

    def append(self, step: int, values: dict[str, float]) -> None:
        """Add the row of one step; a new column rewrites the table."""
        row = {"step": str(step)} | {name: repr(float(value)) for name, value in values.items()}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        # columns that only dropped rows had are absent from the header but still in the kept rows
        writer.writerows({k: r.get(k, "") for k in self._columns} for r in self._rows)
        write_bytes(self.path, text.getvalue().encode())


class Events:
    """TensorBoard event files; on resume, events after ``step`` are purged from view."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "training needs TensorBoard: pip install 'fastscore[train]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Add one scalar a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write buffered events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Write buffered events and close the file."""
        self._writer.close()


class Progress:
    """Progress bar: remaining time, losses, steps and samples a second."""

    def __init__(self, name: str, step: int, steps: int, samples: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._samples, self._first, self._start = samples, step, time.perf_counter()
        self._bar = tqdm(
            initial=step,
            total=steps,
            desc=name,
            unit="it",
            disable=not enabled,
            dynamic_ncols=True,
            # a log file gets a line twice a minute
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    def update(self, values: dict[str, float]) -> None:
        """Count one step and show its losses."""
        if self._bar.disable:
            return
        losses = {k.removesuffix("/loss"): v for k, v in values.items() if k.endswith("/loss")}
        shown = {name: f"{value:.4g}" for name, value in losses.items()}
        taken = self._bar.n + 1 - self._first
        rate = taken * self._samples / (time.perf_counter() - self._start)
        self._bar.set_postfix(shown | {"samples/s": f"{rate:.3g}"}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _is_step(row: dict[str, Any]) -> bool:
    # a row cut short by a crash has no usable step, or lacks its last cells
    return (row.get("step") or "").isdigit() and None not in row.values() and None not in row
