"""What a service is asked for: one clip soon, and many clips, label to waveform.

    python bench/serving.py --out FILE [--preset FOLDER ..] [--requests 1000] [--clips 2048]

Rows `latency/MODEL/MODE/PRECISION` are single requests one after the other, vocoder included, by
the wall clock, with what was allocated, recorded and compiled meanwhile; rows `clips/..` are
seconds for many guided clips at once, waveforms on the host. MODEL is the shipped preset, `paper`
or a pair of its size (random weights cost what trained ones cost) with the shipped vocoder or with
another after a plus sign, or a preset's folder.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from latency import measure
from stage import Stage, parser

from fastscore import Pipeline
from fastscore.engine import MODES, Options
from fastscore.measure import energy
from fastscore.measure.models import MODELS, VOCODERS
from fastscore.presets import load_parts

NFE = 8
# models of the published size; weights that no preset holds are random
RANDOM = tuple(name for name in MODELS if name != "digits")
DEFAULT = ("digits", "paper", "unet-paper-equal-total", "paper+hifigan-v1")
# sizes of batches that many clips are drawn in
BATCHES = (64, 256)
ENERGY_SECONDS = 20.0
# backend, mode, precision: plain PyTorch, and the engine's ways
WAYS = {
    "cuda": [("reference", "eager", "fp32")]
    + [("triton", mode, "bf16") for mode in MODES if mode not in ("eager", "compile")],
    # the best that is here
    "cpu": [("auto", "eager", "fp32")],
}


def pipeline(name: str, device: torch.device, way: tuple[str, str, str], size: int) -> Pipeline:
    """A pipeline of a model for batches of ``size``, with the shipped preset's way of drawing."""
    backend, mode, precision = way
    setup = {
        "device": device,
        "backend": backend,
        "precision": precision,
        "batch_size": size,
        "engine": Options(mode=mode, buckets=(size,)),
    }
    model, _, vocoder = name.partition("+")
    if model not in RANDOM:
        return Pipeline.from_pretrained(name, **setup)
    parts = MODELS[model](), VOCODERS[vocoder or "digits"]()
    return Pipeline(*parts, defaults=load_parts("digits").defaults, name=name, **setup)


def latency(pipe: Pipeline, requests: int) -> dict[str, Any]:
    """Quantiles of single requests, and what must not have happened between them."""
    warm = pipe.warmup()
    before = pipe.stats()
    found = measure(pipe, NFE, requests)
    after = pipe.stats()
    counts = ("replays", "recorded", "recompilations", "splits")
    return found | {"warmup": warm, "counts": {c: after[c] - before[c] for c in counts}}


def many(pipe: Pipeline, clips: int, seconds: float | None) -> dict[str, Any]:
    """Seconds for ``clips`` guided clips, waveforms on the host, three times; joules if asked."""
    labels = list(itertools.islice(itertools.cycle(pipe.labels), clips))

    def draw() -> None:
        pipe.sample(labels, nfe=NFE)

    pipe.sample(labels[: pipe.batch_size], nfe=NFE)
    took = [_seconds(draw, pipe.device) for _ in range(3)]
    row: dict[str, Any] = {"clips": clips, "batch": pipe.batch_size, "seconds": took}
    row["best"], row["clips_per_second"] = min(took), clips / min(took)
    if pipe.device.type == "cuda":
        row["peak_reserved"] = torch.cuda.max_memory_reserved(pipe.device)
    if seconds is not None:
        figure = energy.energy(draw, pipe.device, seconds)
        row["energy"] = figure if "none" in figure else figure | {"clips": clips}
    return row


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def work(args: argparse.Namespace, stage: Stage) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows in order of importance, each with what measures it."""
    ways = WAYS[stage.device.type]
    joules = ENERGY_SECONDS if args.energy else None

    def row(name: str, way: tuple[str, str, str], size: int, kind: str) -> dict[str, Any]:
        pipe = pipeline(name, stage.device, way, size)
        try:
            if kind == "latency":
                return latency(pipe, args.requests)
            return many(pipe, args.clips, joules)
        finally:
            pipe.close()

    for way, name in itertools.product(reversed(ways), args.preset):
        label = "/".join((name, *way))
        yield f"latency/{label}", lambda n=name, w=way: row(n, w, 1, "latency")
        for size in args.batches:
            key = f"clips/{label}/b{size}"
            yield key, lambda n=name, w=way, s=size: row(n, w, s, "clips")


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--preset", nargs="+", metavar="MODEL")
    found.add_argument("--requests", type=int)
    found.add_argument("--clips", type=int)
    found.add_argument("--batches", type=int, nargs="+")
    found.add_argument("--energy", action="store_true", help="joules of many clips, 20 s a row")
    found.add_argument("--threads", type=int)
    args = found.parse_args()
    usual: dict[str, Any] = {
        "preset": ["digits"] if args.dry else list(DEFAULT),
        "requests": 3 if args.dry else 1000,
        "clips": 3 if args.dry else 2048,
        "batches": [2] if args.dry else list(BATCHES),
    }
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    with Stage.open("serving", args) as stage:
        rows = list(work(args, stage))
        for name, run in rows:
            row = stage.measure(name, run, 0.0 if args.dry else 20.0)
            if row is not None:
                print(name, summary(row), flush=True)
        stage.finish(len(rows))


def summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"FAILED {row['failed']}"
    if "latency" in row:
        seconds = row["latency"]
        return f"p50 {1e3 * seconds['p50']:.2f} ms, p99 {1e3 * seconds['p99']:.2f} ms"
    return f"{row['best']:.2f} s for {row['clips']} clips, {row['clips_per_second']:.0f} a second"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"serving: {error}")
