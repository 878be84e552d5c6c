"""How all contestants sound at 8, 12, 25 and 50 evaluations, guided and not; a row at a time.

    python bench/headline_quality.py --data digits-human digits-synth [--only scoresubnet] \
        [--n 500] [--seed 0] [--nfe 8 12 25 50] [--out bench/results/headline/quality.jsonl]
    python bench/headline_quality.py --size paper --device cuda --precision bf16 --minutes 9 \
        --data .. --dnsmos-clips 40 --keep-waves WAVES
    python bench/headline_quality.py --size paper --add-dnsmos WAVES

Every row is drawn with the sampler, levels, strength and noise of the shipped preset: one setting
for all contestants, chosen on ScoreSubnet; --guidance draws with another strength. Sample i of a
row has label i mod 10 and the same noise in all rows. Rows that the file holds already for the
same weights, device and precision are not drawn again, and none is begun that --minutes would cut.

Where speechmos is missing a row says so; --keep-waves keeps the clips that it would have rated, in
float16, and --add-dnsmos rates them where it is there. --dry draws few clips: does it run?
"""

from __future__ import annotations

import argparse
import hashlib
import io
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
from contestants import CONTESTANTS, SIZES, trained_preset
from tqdm import tqdm

from artifacts import VOCODERS
from fastscore.audio import fit_length
from fastscore.data import load_waves
from fastscore.files import write_bytes
from fastscore.measure.provenance import commit, versions
from fastscore.metrics.dnsmos import check_installed
from fastscore.metrics.measure import (
    Heard,
    clips_for_dnsmos,
    listen,
    mean_dnsmos,
    measure,
    split_recordings,
)
from fastscore.metrics.recogniser import load_recogniser
from fastscore.pipeline import Pipeline

NFES = (8, 12, 25, 50)
BATCH = 50
HEADLINE = Path(__file__).resolve().parent / "results" / "headline"
# of rows that were written before there was a choice
FIRST = {"size": "tiny", "vocoder": "digits", "device": "cpu", "precision": "fp32"}


def out_file(size: str) -> Path:
    """Where the rows of a size lie."""
    return HEADLINE / ("quality.jsonl" if size == "tiny" else f"quality-{size}.jsonl")


class Judge:
    """The recogniser and the held-out recordings that rows are set against."""

    def __init__(
        self, pipeline: Pipeline, roots: Sequence[Path], n: int, cache: Path | None
    ) -> None:
        self.recogniser = load_recogniser().to(pipeline.device)
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

    def row(self, heard: Heard, guided: bool, seed: int) -> dict[str, Any]:
        row = measure("", "", heard, self.shown, self.reference, seed, bootstrap=200)
        rate = row.recognised if guided else row.confident
        return {
            "n": row.n,
            # guided: heard as meant; unguided: some digit heard with confidence
            "right": [rate.successes / rate.n, rate.low, rate.high],
            "frechet": [row.distance.value, row.distance.low, row.distance.high],
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
        *(row.get(name, first) for name, first in FIRST.items()),
    )


def alike(rows: Sequence[dict[str, Any]], **setup: str) -> list[dict[str, Any]]:
    """Rows of one size, vocoder, device and precision; what is not named is that of `FIRST`."""
    wanted = FIRST | setup
    return [r for r in rows if all(r.get(k, FIRST[k]) == v for k, v in wanted.items())]


def rate(heard: Heard, count: int, keep: Path | None, name: str) -> dict[str, Any]:
    """DNSMOS of a row, or why there is none, and where its clips are kept."""
    if not count:
        return {"dnsmos": None}
    clips = clips_for_dnsmos(heard, count)
    try:
        check_installed()
    except ImportError as error:
        found: dict[str, Any] = {"dnsmos": None, "dnsmos_missing": str(error)}
    else:
        return {"dnsmos": mean_dnsmos(clips, lambda done: None)}
    if keep is not None and clips:
        keep.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, torch.stack(clips).to(torch.float16).numpy())
        write_bytes(keep / name, buffer.getvalue())
        found["waves"] = name
    return found


def waves_name(row: dict[str, Any]) -> str:
    """File of a row's kept clips [clips, samples] fp16."""
    return hashlib.sha256(json.dumps(key(row)).encode()).hexdigest()[:16] + ".npy"


def add_dnsmos(rows: list[dict[str, Any]], folder: Path) -> int:
    """Rate the kept clips of rows without DNSMOS, in place; how many rows that were.

    ValueError for a file that is missing or is not what was kept; ImportError without speechmos.
    """
    check_installed()
    waiting = [row for row in rows if row.get("waves") and row["dnsmos"] is None]
    for row in waiting:
        path = folder / Path(row["waves"]).name
        try:
            waves = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; fetch it again") from None
        if waves.dtype != np.float16 or waves.ndim != 2:
            raise ValueError(f"{path} holds {waves.dtype} {waves.shape}, no clips; fetch it again")
        row["dnsmos"] = mean_dnsmos(list(torch.from_numpy(waves).float()), lambda done: None)
        del row["dnsmos_missing"]
    return len(waiting)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", metavar="ROOT")
    parser.add_argument("--only", choices=CONTESTANTS, nargs="+", default=CONTESTANTS)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--vocoder", choices=VOCODERS, default="digits", help="of size paper")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
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
    parser.add_argument("--keep-waves", type=Path, metavar="FOLDER", help="where speechmos is not")
    parser.add_argument("--add-dnsmos", type=Path, metavar="FOLDER", help="rate kept clips")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="to end by")
    parser.add_argument("--dry", action="store_true", help="20 clips of 2 evaluations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: that of the size)")
    args = parser.parse_args()
    if args.data is None and args.add_dnsmos is None:
        parser.error("name the recordings to judge against: --data ROOT ..")
    if args.dry:
        if args.out is None:
            parser.error("--dry needs --out FILE: its rows are no results")
        args.nfe, args.n, args.dnsmos_clips = (2,), 20, 10
    args.out = args.out or out_file(args.size)
    return args


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
            **{what: getattr(args, what) for what in FIRST},
        }
        for guided in kinds
        for nfe in args.nfe
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, atomically."""
    write_bytes(path, "".join(json.dumps(r) + "\n" for r in rows).encode())


class Drawing:
    """Rows that are drawn while there is time, each on the disk before the next."""

    def __init__(self, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
        self.args, self.rows = args, rows
        self.left = 0
        self._until = time.monotonic() + 60 * args.minutes
        self._longest = 0.0
        self._judge: Judge | None = None

    def contestant(self, name: str, preset: Path | str) -> None:
        """Draw the rows of one contestant that are missing."""
        args = self.args
        pipeline = Pipeline.from_pretrained(
            preset, batch_size=BATCH, device=args.device, precision=args.precision
        )
        about = pipeline.describe()
        known = {key(r) for r in self.rows}
        for row in wanted(args, name, about["hashes"][pipeline.denoiser.PART]):
            if key(row) in known:
                continue
            if time.monotonic() + self._longest > self._until:
                self.left += 1
                continue
            start = time.monotonic()
            self._judge = self._judge or Judge(pipeline, args.data, args.n, args.cache_dir)
            self._draw(pipeline, self._judge, row, about["defaults"])
            self._longest = max(self._longest, time.monotonic() - start)

    def _draw(self, pipeline: Pipeline, judge: Judge, row: dict[str, Any], defaults: Any) -> None:
        args, start = self.args, time.perf_counter()
        drawn = draw(pipeline, row["guided"], row["nfe"], args.n, args.seed, args.guidance)
        heard = judge.listen(*drawn)
        row |= judge.row(heard, row["guided"], args.seed)
        row |= rate(heard, args.dnsmos_clips, args.keep_waves, waves_name(row))
        row |= {"defaults": defaults, "commit": commit(), "versions": versions()}
        self.rows.append(row)
        write(args.out, self.rows)
        tqdm.write(summary(row) + f"  {time.perf_counter() - start:.0f} s")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = read(args.out)
    if args.add_dnsmos is not None:
        print(f"DNSMOS added to {add_dnsmos(rows, args.add_dnsmos)} rows of {args.out}")
        write(args.out, rows)
        return
    drawing = Drawing(args, rows)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            place = Path(folder) / name
            drawing.contestant(name, trained_preset(name, place, args.size, args.vocoder))
    if drawing.left:
        print(f"{drawing.left} rows are left for want of time; the same command goes on")


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
    except (ValueError, ImportError) as error:
        sys.exit(f"headline_quality: {error}")
