"""Quality of a preset against denoiser evaluations: one row a (setting, seed), kept as it ends.

python bench/quality.py --out bench/results/quality --data digits-human digits-synth \
    --samplers all --nfes 4 8 12 16 30 --n 200 --seeds 0
python bench/quality.py --out bench/results/quality --data ... --seeds 100 101 \
    --probe "sampler=dpmpp_2m_sde nfe=8 sigma_max=10 temperature=0.8" --note search
python bench/quality.py --out bench/results/quality --plot

Rows that OUT/rows.jsonl already holds are not drawn again, so a run that was cut off goes on where
it ended. Sample i of a seed has label i mod 10 and the same noise in every row: rows of one seed
are paired. The Frechet distance depends on n, which is why one file holds rows of one n only.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_settings import Setting, draw

from fastscore.audio import fit_length
from fastscore.data import load_waves
from fastscore.files import write_bytes
from fastscore.measure import provenance
from fastscore.metrics.frechet import frechet
from fastscore.metrics.measure import Heard, listen, split_recordings
from fastscore.metrics.rates import wilson
from fastscore.metrics.recogniser import load_recogniser
from fastscore.metrics.spread import acoustic_spread_ratios, shared_labels, spread_ratio
from fastscore.pipeline import Pipeline
from fastscore.samplers import SAMPLERS, sampler_named

ROWS = "rows.jsonl"
# clips of the held-out recordings on the other side of every distance, and as many as ceiling
REFERENCE = 500


class Judge:
    """The recogniser, the reference of the distances and the recordings shown as ceiling."""

    def __init__(
        self, pipeline: Pipeline, roots: Sequence[Path], n: int, cache: Path | None
    ) -> None:
        self.recogniser, self.n = load_recogniser(), n
        if self.recogniser.config.labels != pipeline.labels:
            raise ValueError(
                f"the recogniser knows {self.recogniser.config.labels}, the preset draws "
                f"{pipeline.labels}; rows need the same labels in the same order"
            )
        with warnings.catch_warnings():
            # speakers that are in two splits do not matter to a reference
            warnings.simplefilter("ignore")
            data = load_waves(
                roots, "test", pipeline.labels, pipeline.mel_config, cache_dir=cache, progress=False
            )
        samples = pipeline.frames * pipeline.mel_config.hop_length
        shown, held = split_recordings(data.label_ids, REFERENCE, 0)
        self.shown, self.reference = (
            listen(
                self.recogniser,
                torch.stack([fit_length(data.wave(int(i)), samples) for i in part]),
                np.asarray(data.label_ids)[part],
            )
            for part in (shown, held)
        )

    def figures(self, heard: Heard) -> dict[str, Any]:
        """What a row says of clips: shares, distance to the reference, spread within a label."""
        right, n = heard.right, len(heard.meant)
        rate = wilson(int(right.sum()), n)
        meant = heard.judgement.probabilities[np.arange(n), heard.meant]
        ours, theirs = heard.labels[right], self.shown.labels[self.shown.right]
        spread: dict[str, float] = {}
        if len(shared_labels(ours, theirs)):
            spread["embedding"] = spread_ratio(
                heard.judgement.embeddings[right],
                ours,
                self.shown.judgement.embeddings[self.shown.right],
                theirs,
            )
            spread |= acoustic_spread_ratios(
                heard.statistics[right], ours, self.shown.statistics[self.shown.right], theirs
            )
        return {
            "right": rate.successes,
            "low": round(rate.low, 4),
            "high": round(rate.high, 4),
            "confident": int(heard.judgement.confident.sum()),
            # mean -log p of the label meant: less noisy than a count of errors
            "nll": round(float(-np.log(np.maximum(meant, 1e-12)).mean()), 4),
            "frechet": round(
                frechet(heard.judgement.embeddings, self.reference.judgement.embeddings), 3
            ),
            "spread": {k: round(spread[k], 3) for k in ("embedding", "acoustic") if k in spread},
        }


Job = tuple[Setting, int, int]


def key_of(setting: str, seed: int, first: int) -> str:
    """Name of a row: setting, seed and the number of its first sample."""
    return f"{setting} seed={seed}" + (f" first={first}" if first else "")


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Rows so far; ValueError for a line that is not one."""
    path, rows = out / ROWS, []
    if not path.is_file():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(row | {"key": key_of(row["setting"], row["seed"], row.get("first", 0))})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is not a row; remove that line") from None
    return rows


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows, one JSON line each, in place of the file at once."""
    lines = [json.dumps({k: v for k, v in row.items() if k != "key"}) + "\n" for row in rows]
    write_bytes(out / ROWS, "".join(lines).encode())


def grid(samplers: Sequence[str], nfes: Sequence[int]) -> list[Setting]:
    """Every sampler at every number of evaluations that it can spend, as ``generic`` sets it.

    A sampler of two evaluations a step gets the row of the number it really takes.
    """
    found: dict[Setting, None] = {}
    for name in samplers:
        for nfe in nfes:
            spec = sampler_named(name)
            steps = (nfe - 1) // spec.evaluations + 1
            if steps > 1:
                found[generic(name, spec.nfe(steps))] = None
    return list(found)


def generic(name: str, nfe: int) -> Setting:
    """The setting that a sampler is shown with in the plot: one schedule and one guidance for all.

    They are what the search found to serve every sampler; a sampler that adds no noise of its own
    has only its start to cool. In bf16, which changes no figure that these rows can tell apart.
    """
    cooled = sampler_named(name).stochastic
    return Setting(
        sampler=name,
        nfe=nfe,
        gamma=4.0,
        high=10.0,
        schedule="exponential",
        sigma_min=0.08,
        sigma_max=40.0,
        temperature=0.7 if cooled else 1.0,
        start=1.0 if cooled else 0.7,
        precision="bf16",
    )


def run(
    out: Path,
    jobs: Sequence[Job],
    load: Callable[[str], Pipeline],
    judge: Judge,
    batch: int,
    note: str,
    keep: Path | None,
    say: Callable[[str], None],
) -> None:
    """Draw and judge the jobs (setting, seed, first sample) that have no row yet, one at a time."""
    rows = read_rows(out)
    have = {row["key"] for row in rows}
    if rows and {row["n"] for row in rows} != {judge.n}:
        raise ValueError(
            f"{out / ROWS} holds rows of n {rows[0]['n']}, not {judge.n}: their distances do not "
            "compare; use the same n or another folder"
        )
    keys = {job: key_of(job[0].words(), *job[1:]) for job in jobs}
    missing = [job for job in keys if keys[job] not in have]
    total, done, begun = sum(job[0].nfe for job in missing), 0, time.perf_counter()
    for setting, seed, first in missing:
        start = time.perf_counter()
        waves, labels, nfe = draw(load(setting.precision), setting, judge.n, seed, first, batch)
        seconds = time.perf_counter() - start
        if not waves.isfinite().all():
            # what cannot be heard has no figures; the other settings still have
            say(f"overflowed, no row | {keys[setting, seed, first]}")
            total -= setting.nfe
            continue
        heard = listen(judge.recogniser, waves, labels)
        row = {
            "setting": setting.words(),
            "seed": seed,
            "first": first,
            "n": judge.n,
            "nfe": nfe,
            **judge.figures(heard),
            "seconds": round(seconds, 1),
            "note": note,
            "commit": (provenance.commit()["id"] or "unknown")[:12],
            "key": keys[setting, seed, first],
        }
        # another run may have added rows of its own meanwhile
        rows = [r for r in read_rows(out) if r["key"] != row["key"]] + [row]
        write_rows(out, rows)
        if keep is not None:
            name = hashlib.sha256(row["key"].encode()).hexdigest()[:16]
            keep.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(
                keep / f"{name}.npz",
                key=row["key"],
                embeddings=heard.judgement.embeddings.astype(np.float32),
                probabilities=heard.judgement.probabilities.astype(np.float32),
                meant=heard.meant,
            )
        done += setting.nfe
        left = (time.perf_counter() - begun) / done * (total - done) / 60
        say(f"{summary(row)}, {left:.1f} min left | {row['key']}")


def summary(row: dict[str, Any]) -> str:
    """A row's figures in a line."""
    right, sure = (100 * row[name] / row["n"] for name in ("right", "confident"))
    return (
        f"{right:5.1f} % right, {sure:5.1f} % confident, nll {row['nll']:.3f}, FD "
        f"{row['frechet']:6.2f}, spread {row['spread'].get('embedding', math.nan):.2f}, "
        f"{row['seconds']:.0f} s"
    )


def describe(out: Path, pipeline: Pipeline, judge: Judge, roots: Sequence[Path]) -> None:
    """Write provenance.json: machine, weights, data, and the ceilings of the recordings."""
    ceiling = judge.figures(judge.shown)
    n = len(judge.shown.meant)
    record = {
        "machine": provenance.machine(pipeline.device),
        "pipeline": pipeline.describe(),
        "data": [root.name for root in roots],
        "recordings": {"n": n, **ceiling},
        "defaults_of_a_setting": asdict(Setting()),
    }
    write_bytes(out / "provenance.json", (json.dumps(record, indent=1) + "\n").encode())


def main() -> None:
    """Draw what is asked for and missing, or write the plot and the page."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.plot:
        import quality_page

        quality_page.write(args.out, read_rows(args.out))
        return
    torch.set_num_threads(args.threads)
    names = list(SAMPLERS) if args.samplers == ["all"] else args.samplers
    settings = [Setting.parse(text) for text in args.probe] + grid(names, args.nfes)
    if args.probes is not None:
        lines = args.probes.read_text(encoding="utf-8").splitlines()
        settings += [Setting.parse(x) for x in lines if x.strip() and not x.startswith("#")]
    jobs = [(s, seed, first) for seed in args.seeds for first in args.firsts for s in settings]

    @functools.cache
    def load(precision: str) -> Pipeline:
        return Pipeline.from_pretrained(args.preset, batch_size=args.batch, precision=precision)

    pipeline = load("fp32")
    judge = Judge(pipeline, args.data, args.n, args.cache)
    describe(args.out, pipeline, judge, args.data)
    run(
        args.out,
        jobs,
        load,
        judge,
        args.batch,
        args.note,
        args.keep,
        lambda text: print(text, file=sys.stderr, flush=True),
    )


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of rows, plot and page")
    parser.add_argument("--plot", action="store_true", help="write quality.png and quality.md only")
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders of recordings")
    parser.add_argument("--cache", type=Path, help="cache of decoded recordings")
    parser.add_argument("--samplers", nargs="+", default=[], help="names, or all")
    parser.add_argument("--nfes", type=int, nargs="+", default=[4, 8, 12, 16, 30])
    parser.add_argument("--probe", action="append", default=[], help="a setting: 'key=value ...'")
    parser.add_argument("--probes", type=Path, help="file with a setting a line")
    parser.add_argument("--n", type=int, default=200, help="clips a row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--firsts", type=int, nargs="+", default=[0], help="first sample numbers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="kept in the rows: what they are for")
    parser.add_argument("--keep", type=Path, help="folder for what the recogniser heard, a row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
