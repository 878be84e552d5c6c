"""Exported models beside the networks they were made from: equality, and time in the same minute.

    fastscore export digits --out digits.pt2
    fastscore export digits --onnx digits-onnx
    python bench/exported.py --model digits.pt2 --model digits-onnx [--threads 2] [--batch 1]

Differences are of the largest value, ratios of times in the same round, with their 20th and 80th
percentile. JSON with provenance by --out.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore import Pipeline
from fastscore.export import load_exported
from fastscore.files import write_bytes
from fastscore.measure.provenance import machine
from fastscore.measure.timing import interleaved, ratios

PIECES = ("guided", "unguided", "vocoder")
Pieces = dict[str, Callable[[], Tensor]]


@torch.no_grad()
def measure(preset: str, models: list[Path], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each piece and runtime, the networks themselves first."""
    pipeline = Pipeline.from_pretrained(preset)
    rng = torch.Generator().manual_seed(0)
    shape = (batch, 1, pipeline.mel_config.n_mels, pipeline.frames)
    sigma = torch.exp(torch.empty(batch).uniform_(-3.0, 3.0, generator=rng))
    x = torch.randn(shape, generator=rng) * (1 + sigma[:, None, None, None])
    label = torch.randint(-1, len(pipeline.labels), (batch,), generator=rng)
    gamma = 5 * torch.rand(batch, generator=rng)
    mels = pipeline.sample(pipeline.labels[0], n=batch).mels

    def pieces(denoise: Any, vocode: Any) -> Pieces:
        return {
            "guided": lambda: denoise(x, sigma, label, gamma),
            "unguided": lambda: denoise(x, sigma),
            "vocoder": lambda: vocode(mels),
        }

    runtimes = {f"eager ({pipeline.backend})": pieces(pipeline.denoiser, pipeline.vocoder)}
    for path in models:
        model = load_exported(path, preset=preset)
        runtimes[model.manifest.runtime] = pieces(model.denoise, model.vocode)
    return [row for piece in PIECES for row in _compare(piece, runtimes, rounds)]


def _compare(piece: str, runtimes: dict[str, Pieces], rounds: int) -> list[dict[str, Any]]:
    runs = {name: pieces[piece] for name, pieces in runtimes.items()}
    first, *_ = runs
    expected = runs[first]()
    timings = interleaved(runs, rounds)
    rows = []
    for name, run in runs.items():
        median, low, high = ratios(timings, name, first)
        rows.append(
            {
                "piece": piece,
                "runtime": name,
                "milliseconds": 1e3 * timings[name].median,
                "ratio": {"median": median, "p20": low, "p80": high},
                "difference": float((run() - expected).abs().max() / expected.abs().max()),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.preset, args.model, args.batch, args.rounds)
    print(f"{'':10}{'runtime':18}{'ms':>8}{'ratio':>8}{'p20 to p80':>16}{'difference':>12}")
    for row in rows:
        median, low, high = row["ratio"].values()
        print(
            f"{row['piece']:10}{row['runtime']:18}{row['milliseconds']:8.2f}{median:8.2f}"
            f"{low:8.2f} .. {high:4.2f}{row['difference']:12.1e}"
        )
    if args.out is not None:
        found = {"batch": args.batch, "rounds": args.rounds, "rows": rows}
        found["machine"] = machine(torch.device("cpu"))
        write_bytes(args.out, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
