"""Label to waveform, one request after the other: real-time factor and quantiles of latency.

    python bench/latency.py --nfe 8 [--requests 100] [--preset digits] [--device cuda --mode graphs]

Requests differ in label and seed. A second of computing a second of speech is a real-time factor
of 1. On a GPU, blocks of memory asked for after the warm-up are counted. JSON with provenance by
--out.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastscore import Pipeline
from fastscore.engine import MODES, Options
from fastscore.files import write_bytes
from fastscore.measure.provenance import machine
from fastscore.stats import Latencies


def measure(pipeline: Pipeline, nfe: int | None, requests: int) -> dict[str, Any]:
    """Latency of single guided clips, vocoder included, after warm-up."""
    chance = random.Random(0)
    for label in pipeline.labels[:3]:
        pipeline.sample(label, nfe=nfe)
    latencies, seconds, parts = Latencies(), 0.0, {"sampling": 0.0, "vocoder": 0.0}
    before = _allocations(pipeline.device)
    for seed in tqdm(range(requests), unit="clip", leave=False):
        start = time.perf_counter()
        result = pipeline.sample(chance.choice(pipeline.labels), nfe=nfe, seed=seed)
        latencies.add(time.perf_counter() - start)
        seconds += result.audio_seconds
        for name, value in result.seconds.items():
            parts[name] += value
    found = latencies.summary()
    length = seconds / requests
    return {
        "requests": requests,
        "evaluations": result.nfe,
        "sampler": result.sampler,
        "clip_seconds": length,
        "latency": {name: getattr(found, name) for name in ("mean", "p50", "p90", "p99", "max")},
        "rtf": {name: getattr(found, name) / length for name in ("mean", "p50", "p90", "p99")},
        "share": {name: value / sum(parts.values()) for name, value in parts.items()},
        "allocations": _allocations(pipeline.device) - before,
    }


def _allocations(device: torch.device) -> int:
    """Blocks of memory that PyTorch has asked a GPU for so far."""
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_stats(device).get("num_device_alloc", 0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--nfe", type=int, help="evaluations (default: the preset's)")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--backend")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = Pipeline.from_pretrained(
        args.preset,
        device=args.device,
        backend=args.backend,
        precision=args.precision,
        batch_size=1,
        engine=Options(mode=args.mode),
    )
    warm = pipeline.warmup()
    found = measure(pipeline, args.nfe, args.requests)
    setup = {
        name: pipeline.describe()[name]
        for name in ("preset", "device", "backend", "precision", "packed", "engine")
    }
    print(
        f"{found['evaluations']} evaluations ({found['sampler']}), guided, vocoder included, "
        f"{found['requests']} requests, {torch.get_num_threads()} threads, {setup['backend']}, "
        f"{setup['precision']}, {args.mode}"
    )
    for name, unit in (("rtf", ""), ("latency", " s")):
        values = ", ".join(f"{key} {value:.3f}{unit}" for key, value in found[name].items())
        print(f"{name}: {values}")
    print(", ".join(f"{name} {share:.0%}" for name, share in found["share"].items()))
    if args.out is not None:
        report = {"machine": machine(pipeline.device), "setup": setup, "warmup": warm, **found}
        write_bytes(args.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
