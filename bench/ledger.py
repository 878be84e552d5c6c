"""A ledger of bits: SHA-256 of waveforms, however a clip is drawn.

    python bench/ledger.py --out bench/results/ledger.json     # write this machine's column
    python bench/ledger.py --check bench/results/ledger.json   # draw again and compare

A column is what one kind of processor with one version of PyTorch and one number of threads
computes: elsewhere its libraries choose other kernels. Within a column a clip must have one hash,
over batches of 1, 3, 8 and 64, every slot, eager and replayed programs, and two processes. How far
apart batches are without the deterministic mode is measured beside it.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

from fastscore import Pipeline
from fastscore.engine import Clips, Engine, Model, Options, Rerun
from fastscore.files import write_bytes
from fastscore.measure.provenance import commit, processor, versions
from fastscore.request import make_request

BATCHES = (1, 3, 8, 64)
# label, strength, seed and number of the clips in the ledger
CLIPS = (
    ("seven", 5.0, 0, 0),
    ("zero", 3.0, 1, 0),
    (None, 0.0, 2, 0),
    ("two", 1.5, 2**63 - 1, 0),
    ("nine", 8.0, 0, 1),
    ("seven", 5.0, 0, 2**32 - 1),
    ("four", 0.5, 12345, 7),
    (None, 0.0, 0, 3),
)
SAMPLERS = ("dpmpp_2m_sde", "heun_churn")
NFE = 3


def column(pipeline: Pipeline) -> str:
    """What the bits of this process depend on besides the request."""
    return (
        f"{processor()['model']}, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{versions()['torch']}, {torch.get_num_threads()} threads, {pipeline.device}, "
        f"{pipeline.backend}, {pipeline.precision}"
    )


def chosen(indices: list[int], pipeline: Pipeline) -> Clips:
    """Clips of the ledger as the engine takes them."""
    rows = [CLIPS[i] for i in indices]
    return Clips(
        labels=[-1 if row[0] is None else pipeline.labels.index(row[0]) for row in rows],
        gammas=[row[1] for row in rows],
        seeds=[row[2] for row in rows],
        numbers=[row[3] for row in rows],
    )


def sha(wave: torch.Tensor) -> str:
    """SHA-256 of a waveform's bytes."""
    return hashlib.sha256(wave.contiguous().numpy().tobytes()).hexdigest()


def hashes(preset: str, backend: str | None, batches: tuple[int, ...]) -> dict[str, Any]:
    """Hash of every clip by sampler; RuntimeError names the first way of drawing that differs."""
    pipeline = Pipeline.from_pretrained(preset, backend=backend)
    shape = (1, pipeline.mel_config.n_mels, pipeline.frames)
    model = Model(pipeline.denoiser, pipeline.finish, shape, pipeline.device, pipeline.backend)
    found: dict[str, list[str]] = {}
    apart: dict[str, float] = {}
    for sampler in SAMPLERS:
        task = make_request(
            pipeline.defaults,
            pipeline.denoiser.sigma_range,
            pipeline.labels,
            labels=None,
            sampler=sampler,
            nfe=NFE,
            batch_size=1,
        ).task
        for way, recorder in (("eager", None), ("replayed", Rerun())):
            engine = Engine(model, Options(deterministic=True), recorder=recorder)
            for size in batches:
                # every clip comes to every slot: the batch is turned round by one each time
                for turn in range(len(CLIPS)):
                    order = [(slot + turn) % len(CLIPS) for slot in range(size)]
                    waves = engine.draw(task, chosen(order, pipeline), max_batch=size).outputs[2]
                    kept = found.setdefault(sampler, [""] * len(CLIPS))
                    for slot, i in enumerate(order):
                        kept[i] = kept[i] or sha(waves[slot])
                        if kept[i] != sha(waves[slot]):
                            raise RuntimeError(
                                f"clip {i} of {sampler} has other bits {way}, at batch {size} in "
                                f"slot {slot}"
                            )
                    if size > len(CLIPS):
                        break  # each clip stands in eight slots already
        plain = Engine(model, Options())
        every = chosen(list(range(len(CLIPS))), pipeline)
        one = plain.draw(task, every, max_batch=1).outputs
        many = plain.draw(task, every, max_batch=len(CLIPS)).outputs
        apart[sampler] = float(((many[1] - one[1]).abs().max() / one[1].std()).item())
    return {"column": column(pipeline), "clips": found, "fast_mode_apart": apart}


def _in_process(
    queue: Any, preset: str, backend: str | None, batches: tuple[int, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        queue.put(hashes(preset, backend, batches))
    except RuntimeError as error:
        queue.put(str(error))


def two_processes(
    preset: str, backend: str | None, batches: tuple[int, ...] = BATCHES
) -> dict[str, Any]:
    """`hashes` of two new processes, which must agree; RuntimeError where they do not."""
    context = multiprocessing.get_context("spawn")
    results = []
    for _ in range(2):
        queue = context.Queue()
        arguments = (queue, preset, backend, batches, torch.get_num_threads())
        process = context.Process(target=_in_process, args=arguments)
        process.start()
        results.append(queue.get(timeout=1800))
        process.join()
        if isinstance(results[-1], str):
            raise RuntimeError(results[-1])
    if results[0]["clips"] != results[1]["clips"]:
        raise RuntimeError("two processes drew other bits")
    return results[0]


def main() -> int:
    """Write or check a ledger; 1 where bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--backend")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        found = two_processes(args.preset, args.backend, tuple(args.batches))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(found["column"])
    for sampler, apart in found["fast_mode_apart"].items():
        print(
            f"{sampler}: one hash a clip; batches of 8 without it differ by {apart:.1e} of the "
            "Mels' deviation at most"
        )
    name = args.preset
    if args.check is not None:
        kept = json.loads(args.check.read_text())["columns"].get(found["column"], {}).get(name)
        if kept is None:
            print(f"{args.check} has no column for this machine")
            return 0
        if kept["clips"] != found["clips"]:
            print(f"{args.check} holds other bits for this machine", file=sys.stderr)
            return 1
        print(f"the same bits as in {args.check}")
    if args.out is not None:
        ledger = json.loads(args.out.read_text()) if args.out.exists() else {"columns": {}}
        entry = {"commit": commit(), **{k: v for k, v in found.items() if k != "column"}}
        ledger["columns"].setdefault(found["column"], {})[name] = entry
        write_bytes(args.out, json.dumps(ledger, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
