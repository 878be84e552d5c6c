"""How all contestants sound at 8, 12, 25 and 50 evaluations, guided and not; a row at a time.

    python bench/headline_quality.py --data digits-human digits-synth [--only scoresubnet] \
        [--n 500] [--seed 0] [--nfe 8 12 25 50] [--out bench/results/headline/quality.jsonl]

Every row is drawn with the sampler, levels, strength and noise of the shipped preset: one setting
for all contestants, chosen on ScoreSubnet; --guidance draws with another strength. Sample i of a
row has label i mod 10 and the same noise in all rows. Rows that the file holds already for the
same weights are not drawn again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import CONTESTANTS, trained_preset
from tqdm import tqdm

from fastscore.audio import fit_length
from fastscore.data import load_waves
from fastscore.files import write_bytes
from fastscore.measure.provenance import commit, versions
from fastscore.metrics.measure import Heard, add_dnsmos, listen, measure, split_recordings
from fastscore.metrics.recogniser import load_recogniser
from fastscore.pipeline import Pipeline

NFES = (8, 12, 25, 50)
BATCH = 50
OUT = Path(__file__).resolve().parent / "results" / "headline" / "quality.jsonl"


class Judge:
    """The recogniser and the held-out recordings that rows are set against."""

    def __init__(
        self, pipeline: Pipeline, roots: Sequence[Path], n: int, cache: Path | None
    ) -> None:
        self.recogniser = load_recogniser()
        with warnings.catch_warnings():
            # speakers that are in two splits do not matter to a reference
            warnings.simplefilter("ignore")
            data = load_waves(
                roots, "test", pipeline.labels, pipeline.mel_config, cache_dir=cache, progress=False
            )
        shown, held = split_recordings(data.label_ids, n, 0)
        labels = np.asarray(data.label_ids)
        self.shown, self.reference = (
            self.listen(
                torch.stack([fit_length(data.wave(int(i)), pipeline.samples) for i in part]),
                labels[part],
            )
            for part in (shown, held)
        )

    def listen(self, waves: torch.Tensor, meant: np.ndarray) -> Heard:
        return listen(self.recogniser, waves.float(), meant)

    def row(self, heard: Heard, guided: bool, dnsmos: int, seed: int) -> dict[str, Any]:
        row = measure("", "", heard, self.shown, self.reference, seed, bootstrap=200)
        if dnsmos:
            add_dnsmos(row, heard, dnsmos, lambda done: None)
        rate = row.recognised if guided else row.confident
        return {
            "n": row.n,
            # guided: heard as meant; unguided: some digit heard with confidence
            "right": [rate.successes / rate.n, rate.low, rate.high],
            "frechet": [row.distance.value, row.distance.low, row.distance.high],
            "dnsmos": row.dnsmos,
            "spread": row.spread,
            "labels": row.label_counts,
        }


def draw(
    pipeline: Pipeline, guided: bool, nfe: int, n: int, seed: int, guidance: float | None
) -> tuple[torch.Tensor, np.ndarray]:
    """n clips [n, samples] and what was meant [n], -1 where nothing."""
    waves, k = [], len(pipeline.labels)
    meant = np.array([i % k if guided else -1 for i in range(n)])
    for start in tqdm(range(0, n, BATCH), unit="batch", leave=False, mininterval=10):
        part = meant[start : start + BATCH]
        labels = [pipeline.labels[i] if i >= 0 else None for i in part]
        drawn = pipeline.sample(labels, nfe=nfe, seed=seed, first=start, guidance=guidance)
        if drawn.nfe != nfe:
            raise ValueError(f"{nfe} evaluations were asked for and {drawn.nfe} taken")
        waves.append(drawn.waves.float().cpu())
    return torch.cat(waves), meant


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, none where it does not exist; ValueError for a line that is not one."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key(row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is not a row; remove that line") from None
        rows.append(row)
    return rows


def key(row: dict[str, Any]) -> tuple:
    """What a row is of: two rows of one key would be equal."""
    return (
        *(row["contestant"], row["guided"], row["nfe"], row["seed"], row["n"]),
        *(row["weights"], row["dnsmos_clips"], row.get("guidance")),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="ROOT")
    parser.add_argument("--only", choices=CONTESTANTS, nargs="+", default=CONTESTANTS)
    parser.add_argument("--nfe", type=int, nargs="+", default=NFES)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="GAMMA",
        help="strength, and guided rows only (default: the preset's, and both kinds)",
    )
    parser.add_argument("--dnsmos-clips", type=int, default=100, metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    return parser.parse_args()


def wanted(args: argparse.Namespace, name: str, weights: str) -> list[dict[str, Any]]:
    """What is to be drawn of one contestant."""
    kinds = (True, False) if args.guidance is None else (True,)
    return [
        {
            "contestant": name,
            "guided": guided,
            "nfe": nfe,
            "seed": args.seed,
            "n": args.n,
            "weights": weights,
            "dnsmos_clips": args.dnsmos_clips,
            "guidance": args.guidance,
        }
        for guided in kinds
        for nfe in args.nfe
    ]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = read(args.out)
    judge = None
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            preset = trained_preset(name, Path(folder) / name)
            pipeline = Pipeline.from_pretrained(preset, batch_size=BATCH)
            about = pipeline.describe()
            judge = judge or Judge(pipeline, args.data, args.n, args.cache_dir)
            for row in wanted(args, name, about["hashes"][pipeline.denoiser.PART]):
                if key(row) in {key(r) for r in rows}:
                    continue
                start = time.perf_counter()
                drawn = draw(pipeline, row["guided"], row["nfe"], args.n, args.seed, args.guidance)
                row |= judge.row(judge.listen(*drawn), row["guided"], args.dnsmos_clips, args.seed)
                row |= {"defaults": about["defaults"], "commit": commit(), "versions": versions()}
                rows.append(row)
                write_bytes(args.out, "".join(json.dumps(r) + "\n" for r in rows).encode())
                tqdm.write(summary(row) + f"  {time.perf_counter() - start:.0f} s")


def summary(row: dict[str, Any]) -> str:
    right, low, high = row["right"]
    return (
        f"{row['contestant']:22} {'guided' if row['guided'] else 'unguided':9} {row['nfe']:3}  "
        f"right {100 * right:.1f} % [{100 * low:.1f}, {100 * high:.1f}]  "
        "Frechet {:.2f} [{:.2f}, {:.2f}]".format(*row["frechet"])
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"headline_quality: {error}")
