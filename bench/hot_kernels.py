"""The guided step of `paper` as one graph, taken apart: nodes, kernels, gaps, way to its bound.

    python bench/hot_kernels.py --out FILE [--ncu]

A row a batch: nodes of the graph seen and predicted, time by kernel over many replays, idle gaps
within a replay, and a line-by-line account of what the step takes beyond its roofline
(bench/kernel_account.py). With --ncu the hottest three of our own kernels go through Nsight Compute
as well, a row each; one that ncu refuses says why. On a CPU operators stand in for kernels, and no
kernel is ours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eager_steps
import kernel_account
import nsight
import torch
from stage import Stage, parser
from torch.profiler import ProfilerActivity, profile, record_function

from fastscore.denoiser import set_precision
from fastscore.measure import nodes, roofline, work
from fastscore.measure.models import MODELS, imagined, prepared
from fastscore.measure.subjects import build, step_arguments
from fastscore.measure.timing import Stopwatch
from fastscore.measure.workloads import EAGER, GRAPHS
from fastscore.profiler import events

CPU = torch.device("cpu")
# replays that are traced, and rounds that are timed without the profiler
CALLS, ROUNDS = {1: 50, 64: 20}, 30
HOTTEST, LAUNCHES, NCU_LIMIT = 3, 60, 300.0


def hot(model: str, batch: int, device: torch.device, dry: bool) -> dict[str, Any]:
    """Row of one batch."""
    on_gpu = device.type == "cuda"
    described = eager_steps.step(model, batch, device, GRAPHS if on_gpu else EAGER)
    run = build(described, device).run
    run()
    watch = Stopwatch(device)
    plain = statistics.median(watch(run) for _ in range(3 if dry else ROUNDS))
    counted = {"predicted": predicted(model, batch, device)}
    counted["seen"] = told(nodes.seen(run, device)) if on_gpu else {"none": "there is no GPU"}
    raw = traced(run, device, 3 if dry else CALLS.get(batch, 20))
    found = kernel_account.replays(raw)
    # without the copies into a program's buffers and out of them, which stand in ``seen``
    counted["replayed"] = len(found[0])
    rows, gaps = kernel_account.kernels(found), kernel_account.idle(found)
    peaks = roofline.peaks(device, 0.01 if dry else 0.2)
    net = prepared(model, CPU, "reference", described.precision, packed=False)
    done = work.step(net, batch, True)
    return {
        "workload": described.name,
        "step_us": 1e6 * plain,
        "nodes": counted,
        "kernels": rows[: kernel_account.KERNELS],
        "kernel_names": len(rows),
        "gaps": gaps,
        "account": kernel_account.account(rows, gaps, done, peaks),
        "peaks": peaks.describe(),
    }


def predicted(model: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Nodes of the step by itself, counted without running it."""
    net = MODELS[model]().eval()
    set_precision(net, "bf16")
    arguments = step_arguments(batch, True, CPU, net.shape)
    arch = "sm_90"
    if device.type == "cuda":
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    with nodes.imagined():
        imagined(net)
        given = [torch.empty(t.shape, dtype=t.dtype, device=nodes.DEVICE) for t in arguments]
        found = nodes.predicted(lambda: net(*given), arch)
        return told(found) | {"chained": found.chained}


def told(launches: nodes.Launches) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "total": launches.total,
        "transfers": launches.transfers,
        "kernels": dict(launches.kernels.most_common()),
    }


def traced(run: Callable[[], Any], device: torch.device, calls: int) -> dict[str, Any]:
    """Kineto's trace of some calls."""
    # on a machine without a GPU Kineto would complain on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            with record_function(kernel_account.CALL):
                run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return events.read(path)


def our_kernels() -> set[str]:
    """Names of all Triton kernels of the package."""
    from fastscore_kernels.gpu import norm_act, solver_step, tap_path  # noqa: F401
    from triton.runtime.jit import KernelInterface

    modules = [m for name, m in sys.modules.items() if name.startswith("fastscore_kernels.gpu")]
    functions = [v for module in modules for v in vars(module).values()]
    names = (f.fn.__name__ for f in functions if isinstance(f, KernelInterface))
    return {name for name in names if name.endswith("_kernel")}


def hottest(rows: dict[str, Any], ours: set[str]) -> dict[str, int]:
    """Our kernels that take most of the steps they run in, each with that step's batch."""
    shares: dict[str, tuple[float, int]] = {}
    for name, row in rows.items():
        if not name.startswith("b"):
            continue
        for kernel in row["kernels"]:
            if kernel["name"] in ours:
                found = kernel["share"], int(name[1:])
                shares[kernel["name"]] = max(shares.get(kernel["name"], (0.0, 0)), found)
    first = sorted(shares, key=shares.__getitem__, reverse=True)[:HOTTEST]
    return {name: shares[name][1] for name in first}


def through_ncu(kernel: str, model: str, batch: int) -> dict[str, Any]:
    """Row of one kernel's launches in one eager step; ``refused`` where there are no figures."""
    row: dict[str, Any] = {"kernel": kernel, "batch": batch}
    if shutil.which(nsight.TOOL) is None:
        return row | {
            "refused": f"{nsight.TOOL} is not on the PATH; it comes with the CUDA toolkit"
        }
    child = [sys.executable, eager_steps.__file__, "--model", model, "--batch", str(batch)]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            nsight.command([kernel], LAUNCHES, child),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NCU_LIMIT,
            check=False,
        )
        found = nsight.figures(done.stdout + done.stderr, done.returncode)
    except subprocess.TimeoutExpired:
        return row | {"refused": f"ncu did not end within {NCU_LIMIT:g} s"}
    except ValueError as error:
        return row | {"refused": str(error)}
    return row | {"seconds": time.perf_counter() - start, "launches": found.get(kernel, [])}


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--ncu", action="store_true", help="Nsight Compute on the hottest kernels")
    found.add_argument("--model", choices=tuple(MODELS), help="(paper; with --dry, digits)")
    return found.parse_args()


@torch.no_grad()
def main() -> None:
    args = arguments()
    model = args.model or ("digits" if args.dry else "paper")
    batches = (1,) if args.dry else tuple(CALLS)
    with Stage.open("hot-kernels", args) as stage:
        for batch in batches:
            if stage.wants(f"b{batch}", 30.0):
                stage.add(f"b{batch}", hot(model, batch, stage.device, args.dry))
                print(summary(stage.rows[f"b{batch}"]), flush=True)
        chosen = hottest(stage.rows, our_kernels()) if args.ncu else {}
        for kernel, batch in chosen.items():
            if stage.wants(f"ncu/{kernel}", 30.0):
                stage.add(f"ncu/{kernel}", through_ncu(kernel, model, batch))
                row = stage.rows[f"ncu/{kernel}"]
                print(kernel, row.get("refused") or f"{len(row['launches'])} launches", flush=True)
        stage.finish(len(batches) + len(chosen))
    if stage.values["status"] != "ok":
        sys.exit(1)


def summary(row: dict[str, Any]) -> str:
    """The account of a row as a table."""
    found, seen = row["account"], row["nodes"]["seen"]
    text = [
        f"{row['workload']}: {row['step_us']:.0f} us, {found['span_us']:.0f} us in a replay, "
        f"{100 * found['share']:.0f}% {found['bound_name']}; nodes {seen.get('total', '-')} seen, "
        f"{row['nodes']['replayed']} in a replay, {row['nodes']['predicted']['total']} predicted"
    ]
    for line in found["lines"]:
        columns = (line.get(key) for key in ("took_us", "must_us", "over_us"))
        numbers = (" " * 13 if us is None else f"{us:13.1f}" for us in columns)
        text.append(f"  {line['line']:32}{''.join(numbers)}")
    return "\n".join(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"hot_kernels: {error}")
