"""What ScoreSubnet and the usual pair cost, side by side: the left half of the headline table.

    python bench/headline.py --size tiny --threads 2 [--part static memory time energy] [--out FILE]

Parts: "static" (parameters, multiply-accumulates, weights), "memory" (peaks of sampling at batch 1
and 64 and of a training step, each in a fresh process), "time" (step latency and clips a second,
eager and by the engine, all contestants in turn), "energy" (joules a clip, where the machine can
tell). A part that the file holds already is measured again only if it is named. Weights are random:
costs do not depend on them. "eager" is PyTorch's own operations, one after the other; "engine" has
fused kernels and prepared weights, for every contestant alike (on a GPU: CUDA graphs).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import BASELINES, CONTESTANTS, SIZES, untrained
from headline_training import training_memory
from torch import Tensor
from tqdm import tqdm

from fastscore.cost import PUBLISHED
from fastscore.denoiser import Denoiser
from fastscore.engine import Clips, Engine, Model, Options, Task
from fastscore.files import write_bytes
from fastscore.layers import set_backend
from fastscore.measure import energy, macs, memory
from fastscore.measure.provenance import Watch
from fastscore.measure.timing import (
    Stopwatch,
    Timing,
    check_equal,
    interleaved,
    reference_work,
)
from fastscore.packed import pack
from fastscore.presets import load_parts
from fastscore.samplers import sampler_named, schedule_for
from fastscore.stacked import stack

FORMAT, VERSION = "fastscore-headline", 1
PARTS = ("static", "memory", "time", "energy")
MEMORY_BATCHES = (1, 64)
# batch of a step's latency, and of the clips a second
STEP_BATCHES = {"tiny": (1, 8), "paper": (1, 8)}
CLIP_BATCH = 8
OUT = Path(__file__).resolve().parent / "results" / "headline"
MODES = ("eager", "engine")
SLOW_ROUNDS = 5


def prepared(contestant: str, size: str, guided: bool, mode: str, device: torch.device) -> Denoiser:
    """A contestant ready to run, as people would have it without and with fastscore's speed."""
    net = untrained(contestant, size, guided).to(device)
    native = "triton" if device.type == "cuda" else "native"
    set_backend(net, native if mode == "engine" else "reference")
    if mode == "engine" and device.type == "cpu":
        pack(net)
    if mode == "engine" and device.type == "cuda":
        stack(net)
    return net


def step(
    contestant: str, size: str, guided: bool, mode: str, batch: int, device: str = "cpu"
) -> Callable[[], Tensor]:
    """One evaluation of ``batch`` samples."""
    place = torch.device(device)
    net = prepared(contestant, size, guided, mode, place)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, *net.shape, generator=rng).to(place)
    sigma = torch.full((batch,), 2.0, device=place)
    label = (torch.arange(batch) % 10).to(place)
    rest = (label, torch.full((batch,), 3.0, device=place)) if guided else ()

    def run() -> Tensor:
        with torch.no_grad():
            return net(x, sigma, *rest)

    return run


def sampling(
    contestant: str, size: str, guided: bool, mode: str, batch: int, nfe: int, device: str = "cpu"
) -> Callable[[], Tensor]:
    """``batch`` log-Mels drawn as the shipped preset draws them, through the engine; no vocoder."""
    place = torch.device(device)
    net = prepared(contestant, size, guided, mode, place)
    defaults = load_parts("digits").defaults
    sigmas = schedule_for(
        defaults.sampler,
        nfe,
        net.sigma_range,
        schedule=defaults.schedule,
        sigma_min=defaults.sigma_min,
        sigma_max=defaults.sigma_max,
        options=defaults.schedule_options,
    )
    # guided at every evaluation: the dearer case, and the same for every number of them
    task = Task(sampler_named(defaults.sampler), sigmas, defaults.sampler_options)
    graphs = mode == "engine" and place.type == "cuda"
    model = Model(net, lambda x0: (x0,), (1, *net.shape), place)
    engine = Engine(model, Options(mode="graphs" if graphs else "eager"))
    ids = range(batch)
    labels = [i % 10 if guided else -1 for i in ids]
    clips = Clips(labels, [3.0] * batch, [0] * batch, list(ids))
    return lambda: engine.draw(task, clips).outputs[0]


def static(size: str) -> dict[str, Any]:
    """Parameters, multiply-accumulates by part, and bytes of weights of every row."""
    found = {}
    for contestant in CONTESTANTS:
        for guided in (False, True):
            net = untrained(contestant, size, guided, device="meta")
            counted = macs.step(net)["guided" if guided else "unguided"]
            trained = getattr(net, net.PART)
            found[row_name(contestant, guided)] = {
                "parameters": sum(p.numel() for p in net.parameters()),
                "trainable": sum(p.numel() for p in trained.parameters()),
                "macs": counted.total,
                "macs_by_part": counted.parts(),
            }
    return found


def full_resolution(size: str) -> dict[str, int]:
    """Multiply-accumulates of a step of the baselines on single bins, not 2 x 2 patches."""
    found = {}
    for contestant in BASELINES:
        for guided in (False, True):
            net = untrained(contestant, size, guided, patch=1, device="meta")
            counted = macs.step(net)["guided" if guided else "unguided"]
            found[row_name(contestant, guided)] = counted.total
    return found


def row_name(contestant: str, guided: bool) -> str:
    return f"{contestant}/{'guided' if guided else 'unguided'}"


def sampled_memory(
    contestant: str, size: str, guided: bool, batch: int, device: str
) -> dict[str, Any]:
    """Weights, and the peak above them of drawing ``batch`` log-Mels by the engine."""
    # two evaluations: later ones need no more than these
    args = (contestant, size, guided, "engine", batch, 2, device)
    found = memory.in_child(sampling, *args, device=device, warm=0, threads=1)
    net = prepared(contestant, size, guided, "engine", torch.device(device))
    return {**found, "weights": memory.weights(net)}


def memories(size: str, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    jobs = [(c, g) for c in CONTESTANTS for g in (False, True)]
    for contestant, guided in tqdm(jobs, desc=f"memory {size}", unit="row"):
        row = found[row_name(contestant, guided)] = {}
        for batch in MEMORY_BATCHES:
            row[str(batch)] = sampled_memory(contestant, size, guided, batch, device)
        if not guided:
            # a training knows no guidance
            row["training"] = training_memory(contestant, size, device)
    return found


def times(
    size: str, device: str, rounds: int | None, keep: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Step latency and clips a second of all rows, eager and by the engine, in turn."""
    found: dict[str, Any] = {}
    jobs = [(f"step/b{b}", functools.partial(step, batch=b)) for b in STEP_BATCHES[size]]
    if size == "tiny" or device != "cpu":
        # minutes a round at the other size on a CPU
        draw = functools.partial(sampling, batch=CLIP_BATCH, nfe=12)
        jobs.append((f"draw/b{CLIP_BATCH}", draw))
    place = torch.device(device)
    for name, make in jobs:
        runs = {
            f"{row_name(c, g)}/{mode}": make(c, size, g, mode, device=device)
            for c in CONTESTANTS
            for g in (False, True)
            for mode in MODES
        }
        checks = {}
        for c in CONTESTANTS:
            for g in (False, True):
                pair = {m: runs[f"{row_name(c, g)}/{m}"]() for m in MODES}
                # a trajectory carries rounding on; a step does not
                tolerance = 1e-4 if name.startswith("step") else 1e-2
                checks[row_name(c, g)] = check_equal(pair, tolerance).error
        print(f"{size} {name}: answers agree; timing {len(runs)} in turn", file=sys.stderr)
        timings = interleaved(
            runs,
            # whole trajectories take seconds on a CPU
            rounds or (SLOW_ROUNDS if name.startswith("draw") and device == "cpu" else None),
            round_seconds=0.0,
            watch=Stopwatch(place, wall=name.startswith("draw")),
            reference=reference_work(place),
            budget=2.5,
        )
        found[name] = {"errors": checks, "rows": {k: timed(t) for k, t in timings.items()}}
        # what is finished stays, whatever becomes of the rest
        keep(found)
    return found


def timed(timing: Timing) -> dict[str, Any]:
    return {
        "median": timing.median,
        **{f"p{q}": timing.quantile(q / 100) for q in (20, 80, 99)},
        "seconds": timing.seconds,
        "reference": timing.reference,
    }


def energies(size: str, device: str) -> dict[str, Any]:
    """Joules a clip of 12 evaluations at batch 8, by the engine."""
    found = {}
    for contestant in CONTESTANTS:
        for guided in (False, True):
            call = sampling(contestant, size, guided, "engine", CLIP_BATCH, 12, device)
            figure = energy.energy(call, device)
            if "none" not in figure:
                figure["clips"] = CLIP_BATCH
            found[row_name(contestant, guided)] = figure
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of a comparison (default: by time)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; leave it at cpu")
    torch.set_num_threads(args.threads)
    out = args.out or OUT / f"costs-{args.size}-{args.device}.json"
    values = read(out, args.size, args.device)
    for part in args.part:
        watch = Watch(torch.device(args.device))

        def keep(found: dict[str, Any], part: str = part, watch: Watch = watch) -> None:
            values[part] = {
                "command": f"python bench/headline.py --size {args.size} --part {part} "
                f"--device {args.device} --threads {args.threads}"
                + (f" --rounds {args.rounds}" if args.rounds else ""),
                "provenance": watch.record,
                "rows": found,
            }
            write_bytes(out, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())

        found = measured(part, args, keep)
        watch.end()
        if part == "static":
            values["full_resolution"] = full_resolution(args.size)
        keep(found)
        for warning in watch.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    print(out)


def measured(
    part: str, args: argparse.Namespace, keep: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Rows of one part; ``keep`` is given what is finished on the way."""
    if part == "time":
        return times(args.size, args.device, args.rounds, keep)
    if part == "static":
        return static(args.size)
    return {"memory": memories, "energy": energies}[part](args.size, args.device)


def read(path: Path, size: str, device: str) -> dict[str, Any]:
    """What the file holds; an empty result where there is none. ValueError where it is another."""
    fresh = {
        "format": FORMAT,
        "version": VERSION,
        "size": size,
        "device": device,
        "published": PUBLISHED,
    }
    if not path.is_file():
        return fresh
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        about = {key: values.get(key) for key in ("format", "version", "size", "device")}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is not JSON of this benchmark; remove it") from None
    if about != {key: fresh[key] for key in about}:
        raise ValueError(f"{path} holds {about}; remove it or choose another --out")
    return values


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"headline: {error}")
