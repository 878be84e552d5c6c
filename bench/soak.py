"""Thousands of consecutive requests from many threads: nothing lost, crossed, recompiled or leaked.

python bench/soak.py [--requests 10000] [--threads 8] [--steps 2] [--preset digits] [--engine MODE]

Every clip that `Pipeline.stream` delivers is compared with the same request drawn alone before: bit
for bit, or with --fast, where clips of a batch are computed together, to rounding. The requests are
drawn at random from a bounded set, so that all of them recur. Resident memory is sampled all along.
Ends with status 1 where anything is wrong.
"""

import argparse
import concurrent.futures
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from tqdm import tqdm

from fastscore import Pipeline
from fastscore.engine import MODES, Options
from fastscore.measure.provenance import ROOT, machine
from fastscore.results import Result
from fastscore.stats import process_memory
from fastscore.stream import Stream

# requests of different samplers share no batch
SAMPLERS = ("dpmpp_2m_sde", "euler_ancestral")
# of the requests, before memory is looked at: allocators and caches fill up first
WARM_UP = 0.2
SAMPLE_SECONDS = 0.5
# growth over all requests that is none: resident memory creeps while allocators spread over pages
LEAK_BYTES = {"resident": 4 * 2**20, "allocated": 2**18}
# of the standard deviation of a log-Mel: what clips drawn together may differ by from single ones
ROUNDING = 1e-2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="digits", help="name or folder (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8, help="callers (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=2, help="requests take 1 to this many (default: %(default)s)"
    )
    parser.add_argument("--distinct", type=int, default=200, help="different requests")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--max-wait", type=float, default=0.0, help="seconds")
    parser.add_argument("--queue-size", type=int, default=16)
    parser.add_argument("--engine", choices=MODES, default="eager")
    parser.add_argument("--fast", action="store_true", help="compute the clips of a batch together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--torch-threads", type=int, default=1, help="of CPU operators")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: bench/results/DEVICE/soak-ENGINE.json")
    args = parser.parse_args()
    for name in ("requests", "threads", "steps", "distinct", "max_batch", "torch_threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    return args


def make_requests(pipeline: Pipeline, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Different requests at random, without a label and without strength among them."""
    rng = random.Random(args.seed)
    return [
        {
            "label": rng.choice((None, *pipeline.labels)),
            "guidance": round(rng.uniform(0.0, 6.0), 2),
            "seed": rng.randrange(2**40),
            "first": rng.randrange(4),
            "steps": rng.randint(1, args.steps),
            "sampler": rng.choice(SAMPLERS),
        }
        for _ in range(args.distinct)
    ]


def digest(clip: Result) -> str:
    """SHA-256 of all that a clip says and is."""
    told = (clip.labels, clip.guidance, clip.seed, clip.first, clip.nfe, clip.sampler)
    found = hashlib.sha256(repr(told).encode())
    for tensor in (clip.waves, clip.mels):
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()


class Verdicts:
    """What became of every request; knows the clips that each of them is to give."""

    def __init__(self, clips: list[Result], exact: bool) -> None:
        self.digests, self.exact = [digest(clip) for clip in clips], exact
        self.mels = None if exact else [clip.mels for clip in clips]
        self.known, self.lock = set(self.digests), threading.Lock()
        self.counts: Counter[str] = Counter()
        self.largest, self.errors = 0.0, Counter[str]()

    def judge(self, index: int, clip: Result) -> None:
        """Count a clip as right, as that of another request ("crossed") or as neither."""
        found = digest(clip)
        verdict = "right" if found == self.digests[index] else "wrong"
        difference = 0.0
        if verdict == "wrong" and found in self.known:
            verdict = "crossed"
        elif verdict == "wrong" and not self.exact:
            gaps = [float((clip.mels - mels).abs().max() / mels.std()) for mels in self.mels]
            difference = gaps[index]
            if difference <= ROUNDING:
                verdict = "right"
            elif min(gaps) <= ROUNDING:
                verdict = "crossed"
        with self.lock:
            self.counts[verdict] += 1
            self.largest = max(self.largest, difference)

    def failed(self, error: Exception) -> None:
        with self.lock:
            self.counts["failed"] += 1
            self.errors[f"{type(error).__name__}: {error}"[:200]] += 1

    @property
    def done(self) -> int:
        return sum(self.counts.values())


def call(
    stream: Stream, requests: list[dict[str, Any]], verdicts: Verdicts, count: int, seed: str
) -> None:
    """One caller: ``count`` requests, each after the clip of the one before."""
    rng = random.Random(seed)
    for _ in range(count):
        index = rng.randrange(len(requests))
        try:
            clip = stream.draw(**requests[index])
        except Exception as error:
            verdicts.failed(error)
        else:
            verdicts.judge(index, clip)


def soak(
    stream: Stream, requests: list[dict[str, Any]], verdicts: Verdicts, args: argparse.Namespace
) -> list[tuple[int, int | None, int | None]]:
    """Run all callers to their end; requests done, bytes resident and allocated, every so often."""
    samples, heap = [], Heap()
    counts = [
        args.requests // args.threads + (i < args.requests % args.threads)
        for i in range(args.threads)
    ]
    with (
        concurrent.futures.ThreadPoolExecutor(args.threads) as callers,
        tqdm(
            total=args.requests,
            unit="clip",
            dynamic_ncols=True,
            miniters=1,
            mininterval=0.1 if sys.stderr.isatty() else 20.0,
        ) as bar,
    ):
        running = [
            callers.submit(call, stream, requests, verdicts, count, f"{args.seed}/{i}")
            for i, count in enumerate(counts)
        ]
        while running:
            waited = concurrent.futures.wait(running, SAMPLE_SECONDS)
            running = list(waited.not_done)
            for future in waited.done:
                future.result()
            done = verdicts.done
            samples.append((done, process_memory().rss, heap()))
            bar.update(done - bar.n)
    return samples


class Heap:
    """Bytes that are allocated, by glibc's count; None elsewhere.

    Resident memory also grows while allocators spread over more pages; only what is kept for good
    makes this grow.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        if not hasattr(self._libc, "malloc_info"):
            self._libc = None
            return
        self._libc.fdopen.restype = ctypes.c_void_p
        self._libc.fclose.argtypes = [ctypes.c_void_p]
        self._libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]

    def __call__(self) -> int | None:
        if self._libc is None:
            return None
        with tempfile.TemporaryFile() as file:
            stream = self._libc.fdopen(os.dup(file.fileno()), b"w")
            self._libc.malloc_info(0, stream)
            self._libc.fclose(stream)
            file.seek(0)
            tree = ElementTree.parse(file).getroot()
        # the last elements of the document sum up those of the arenas
        sizes = {(e.tag, e.get("type")): int(e.get("size")) for e in tree if e.get("size")}
        free = sizes["total", "fast"] + sizes["total", "rest"]
        return sizes["system", "current"] - free + sizes["total", "mmap"]


def trend(numbers: list[int], memory: list[int | None], requests: int) -> dict[str, Any]:
    """Least-squares growth of memory over ``requests`` requests, with a 95 % interval.

    ``memory`` holds bytes after so many ``numbers`` of requests. Neighbouring samples are alike, so
    that n of them count as n (1 - r) / (1 + r), r being the correlation of neighbouring residuals.
    """
    both = zip(numbers, memory, strict=True)
    late = np.array([s for s in both if s[0] >= WARM_UP * requests and s[1]], dtype=float)
    if len(late) < 10:
        return {"samples": len(late), "bytes": None, "interval": None}
    x, y = late.T
    x = x - x.mean()
    slope = float(x @ (y - y.mean()) / (x @ x))
    residuals = y - y.mean() - slope * x
    power = float(residuals @ residuals)
    r = max(0.0, float(residuals[1:] @ residuals[:-1]) / power) if power else 0.0
    count = max(3.0, len(x) * (1 - r) / (1 + r))
    error = math.sqrt(power / len(x) * count / (count - 2) / (x @ x / len(x)) / count)
    # Student's t with few degrees of freedom, within 1 % from 5 on
    t = 1.96 + 2.4 / (count - 2) + 3.3 / (count - 2) ** 2
    return {
        "samples": len(late),
        "independent": count,
        "bytes": slope * requests,
        "interval": [(slope - t * error) * requests, (slope + t * error) * requests],
        "first": int(y[0]),
        "last": int(y[-1]),
    }


def faults(verdicts: Verdicts, report: dict[str, Any], requests: int) -> list[str]:
    """Sentences on everything that is not as it must be."""
    found = []
    for name in ("lost", "crossed", "wrong", "failed"):
        if report["verdicts"][name]:
            found.append(f"{report['verdicts'][name]} of {requests} requests {name}")
    for name in ("recompilations", "recorded"):
        if report["engine"]["during"][name]:
            found.append(f"{name} during the run: {report['engine']['during'][name]}")
    for name in ("resident", "allocated"):
        interval = report["memory"][name]["interval"]
        if interval is not None and interval[0] > LEAK_BYTES[name]:
            found.append(f"{name} memory grew by at least {interval[0] / 2**20:.2f} MiB")
    return found + [f"{n} x {text}" for text, n in verdicts.errors.most_common(5)]


def run(pipeline: Pipeline, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Draw everything alone, then all of it again and again through a stream; the report."""
    # as it is now: the project may be another by the end
    here, requests = machine(pipeline.device), make_requests(pipeline, args)
    sizes = range(1, args.max_batch + 1) if args.fast else (1,)
    warm = [pipeline.warmup(tuple(sizes), steps=steps) for steps in range(1, args.steps + 1)]
    alone = [
        pipeline.sample(r["label"], **{k: v for k, v in r.items() if k != "label"}, batch_size=1)
        for r in tqdm(requests, desc="alone", disable=not sys.stderr.isatty())
    ]
    verdicts = Verdicts(alone, exact=not args.fast)
    before, start = pipeline.stats(), time.perf_counter()
    limits = {name: getattr(args, name) for name in ("max_batch", "max_wait", "queue_size")}
    with pipeline.stream(**limits) as stream:
        samples = soak(stream, requests, verdicts, args)
        seconds, stats = time.perf_counter() - start, stream.stats()
    after = pipeline.stats()
    counts = ("batches", "clips", "evaluations", "recorded", "replays", "recompilations")
    found = {name: verdicts.counts[name] for name in ("right", "crossed", "wrong", "failed")}
    numbers, resident, allocated = zip(*samples, strict=True)
    every = max(1, len(samples) // 200)
    report = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "verdicts": {
            **found,
            "lost": args.requests - sum(found.values()),
            "compared": "to rounding" if args.fast else "bit for bit",
            "distinct_clips": len(verdicts.known),
            "largest_difference": verdicts.largest,
        },
        "seconds": seconds,
        "requests_per_second": args.requests / seconds,
        "stream": stats.to_dict(),
        "engine": {
            "during": {name: after[name] - before[name] for name in counts},
            "after": after,
            "warm_up": warm,
        },
        "memory": {
            "resident": trend(numbers, resident, args.requests),
            "allocated": trend(numbers, allocated, args.requests),
            "samples": samples[::every],
            "process": dataclasses.asdict(process_memory(pipeline.device)),
        },
        "pipeline": pipeline.describe(),
        "machine": here,
        "load_after": os.getloadavg(),
    }
    print(stats)
    return report, faults(verdicts, report, args.requests)


def main() -> int:
    args = parse()
    torch.set_num_threads(args.torch_threads)
    pipeline = Pipeline.from_pretrained(
        args.preset,
        device=args.device,
        engine=Options(mode=args.engine, deterministic=not args.fast),
    )
    report, wrong = run(pipeline, args)
    kind = args.engine + ("-fast" if args.fast else "")
    out = args.out or ROOT / "bench" / "results" / pipeline.device.type / f"soak-{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report | {"faults": wrong}, indent=1) + "\n")
    for name in ("resident", "allocated"):
        growth = report["memory"][name]
        if growth["interval"]:
            total, low, high = (v / 2**20 for v in (growth["bytes"], *growth["interval"]))
            print(f"{name}: {total:+.3f} MiB [{low:+.3f}, {high:+.3f}] over the run")
    print(f"verdicts: {report['verdicts']}")
    print(f"engine: {report['engine']['during']}")
    print(f"{report['seconds']:.0f} s, {report['requests_per_second']:.1f} requests/s -> {out}")
    for sentence in wrong:
        print(f"WRONG: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
