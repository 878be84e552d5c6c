"""Evaluation of a pipeline on its own samples, beside recordings and their copy-synthesis."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..audio import LogMel, fit_length
from ..checkpoint import weights_hash
from ..config import MelConfig
from ..data import WaveSet, load_waves
from . import dnsmos as dnsmos_module
from . import page, provenance
from .asr import WhisperDigits
from .frechet import halves_distance
from .measure import (
    Heard,
    add_dnsmos,
    add_second_opinion,
    even_choice,
    listen,
    measure,
    split_recordings,
)
from .rates import wilson
from .recogniser import CONFIDENT, Recogniser, load_recogniser
from .report import COPY, GUIDED, RECORDINGS, TRAINING, UNGUIDED, Report, Row, make_folder

EXAMPLES = 6


class Drawn(Protocol):
    """What a pipeline returns: waves [B, samples] and log-Mels [B, n_mels, frames], fp32."""

    waves: Tensor
    mels: Tensor
    sample_rate: int
    nfe: int


class Speaker(Protocol):
    """What is evaluated; ``None`` for guidance or nfe means the pipeline's own default."""

    labels: tuple[str, ...]
    mel_config: MelConfig
    frames: int
    guidance: float

    def sample(
        self,
        labels: Sequence[str | None],
        *,
        guidance: float | None,
        nfe: int | None,
        seed: int,
        first: int,
    ) -> Drawn:
        """One clip a label, in order; unguided where the label is None.

        Clip i depends on ``seed`` and its number ``first`` + i only.
        """
        ...

    def vocode(self, mels: Tensor) -> Tensor:
        """Log-Mels [B, n_mels, frames], natural logarithm -> waves [B, samples]."""
        ...

    def guide_labels(self, mels: Tensor) -> Tensor:
        """Label index that the guiding classifier gives log-Mels [B, n_mels, frames], int64 [B]."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready provenance: device, sampler, hashes of the weights."""
        ...


@dataclass(frozen=True)
class Settings:
    """How an evaluation is run; ``nfes`` None is the pipeline's default number of evaluations.

    ``dnsmos_clips`` and ``asr_clips`` of each ceiling and each row drawn with the defaults: 0
    leaves that judge out; ``asr`` names its model (``fastscore.metrics.asr``). ``training_row``
    adds recordings of the training split; ``bootstrap`` rounds stand behind a distance's interval.
    """

    n: int = 500
    nfes: tuple[int | None, ...] = (12, 25, None)
    gamma: float | None = None
    seed: int = 0
    batch_size: int = 50
    dnsmos_clips: int = 100
    asr: str | None = None
    asr_clips: int = 200
    bootstrap: int = 200
    training_row: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "batch_size", "bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate: {name} {getattr(self, name)} must be at least 1")
        for name in ("dnsmos_clips", "asr_clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluate: {name} {getattr(self, name)} must not be negative")
        if None not in self.nfes:
            object.__setattr__(self, "nfes", (*self.nfes, None))
        for nfe in self.nfes:
            if nfe is not None and nfe < 1:
                raise ValueError(f"evaluate: {nfe} evaluations; need at least 1")
        if self.gamma is not None and not (np.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"evaluate: gamma {self.gamma} must be finite and not negative")
        if self.seed < 0:
            raise ValueError(f"evaluate: seed {self.seed} must not be negative")


def evaluate(
    pipeline: Speaker,
    data_roots: Sequence[str | Path],
    settings: Settings | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    recogniser: Recogniser | None = None,
) -> Report:
    """Draw guided and unguided samples, judge them beside held-out recordings, write the report.

    Recordings are the test splits of ``data_roots``, fitted to the length the pipeline draws. With
    ``out``, report.json, report.md and report.html are written there at the end. Raises ValueError
    for settings or data that do not fit and, before anything is drawn, ImportError when a judge
    that was asked for is not installed.
    """
    settings = settings or Settings()
    job = _Evaluation(pipeline, settings, recogniser or load_recogniser())
    if settings.n < 2 * len(pipeline.labels):
        raise ValueError(
            f"evaluate: n {settings.n} gives fewer than two samples a label; use "
            f"{2 * len(pipeline.labels)} or more"
        )
    if out is not None:
        page.check_installed()
        make_folder(Path(out))
    report = job.run(data_roots, cache_dir)
    if out is not None:
        report.save(out)
    return report


class _Evaluation:
    """One evaluation: the judges, the bar, and the rows so far."""

    def __init__(self, pipeline: Speaker, settings: Settings, recogniser: Recogniser) -> None:
        self.pipeline, self.settings, self.recogniser = pipeline, settings, recogniser
        judged = recogniser.config.labels
        missing = [label for label in pipeline.labels if label not in judged]
        if missing:
            raise ValueError(
                f"evaluate: the recogniser does not know the label {missing[0]!r}; it knows "
                f"{', '.join(judged)}"
            )
        rate = pipeline.mel_config.sample_rate
        if rate != recogniser.config.sample_rate:
            raise ValueError(
                f"evaluate: the pipeline draws {rate} Hz, the recogniser hears "
                f"{recogniser.config.sample_rate} Hz"
            )
        self.ids = {label: judged.index(label) for label in pipeline.labels}
        self.asr = WhisperDigits(judged, settings.asr) if settings.asr else None
        if settings.dnsmos_clips:
            dnsmos_module.check_installed()
        self.rows: list[Row] = []
        # the slow judges hear the ceilings and what the defaults draw
        self.rated = (RECORDINGS, COPY, f"{GUIDED}, default", f"{UNGUIDED}, default")

    def run(self, roots: Sequence[str | Path], cache_dir: str | Path | None) -> Report:
        from tqdm.auto import tqdm

        start = time.perf_counter()
        data = self._load(roots, "test", cache_dir)
        trained = self._load(roots, "train", cache_dir) if self.settings.training_row else None
        shown, held = split_recordings(data.label_ids, self.settings.n, self.settings.seed)
        with tqdm(
            total=self._work(len(shown), len(held)),
            unit="clip",
            disable=not self.settings.progress,
            smoothing=0.05,
            # a log file gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        ) as self.bar:
            self.reference = self._listen("reference", *self._clips(data, held))
            self.recordings = self._listen(RECORDINGS, *self._clips(data, shown))
            self._row(RECORDINGS, RECORDINGS, self.recordings)
            if trained is not None:
                self._training(trained, len(shown))
            self._copies()
            pictures = [self._guided(nfe) for nfe in self.settings.nfes][
                self.settings.nfes.index(None)
            ]
            self._unguided()
        both = [h.judgement.embeddings for h in (self.recordings, self.reference)]
        meant = np.concatenate([self.recordings.meant, self.reference.meant])
        halves = halves_distance(
            np.concatenate(both), meant, len(shown), self.settings.seed, rounds=20
        )
        notes = self._notes(data, len(shown), halves.n)
        record = self._record(data, roots, time.perf_counter() - start)
        labels = self.recogniser.config.labels
        return Report(labels, self.rows, halves, record, notes, self._grid(pictures))

    def _load(
        self, roots: Sequence[str | Path], split: str, cache_dir: str | Path | None
    ) -> WaveSet:
        with warnings.catch_warnings():
            # the notes of the report say which speakers are in more than one split
            warnings.simplefilter("ignore")
            return load_waves(
                roots,
                split,
                tuple(self.pipeline.labels),
                self.pipeline.mel_config,
                cache_dir=cache_dir,
                progress=self.settings.progress,
            )

    def _work(self, shown: int, held: int) -> int:
        s = self.settings
        sampled = (len(s.nfes) + 1) * s.n
        sizes = [shown, shown, s.n, s.n]
        rated = sum(min(s.dnsmos_clips, k) for k in sizes)
        heard = sum(min(s.asr_clips, k) for k in sizes) if self.asr else 0
        # recordings are judged, copies vocoded and judged, samples drawn and judged
        training = shown if s.training_row else 0
        return held + shown + training + 2 * shown + 2 * sampled + rated + heard

    def _clips(self, data: WaveSet, index: np.ndarray) -> tuple[Tensor, np.ndarray]:
        samples = self.pipeline.frames * self.pipeline.mel_config.hop_length
        waves = torch.stack([fit_length(data.wave(int(i)), samples) for i in index])
        return waves, self._meant([data.labels[data.label_ids[i]] for i in index])

    def _meant(self, labels: Sequence[str | None]) -> np.ndarray:
        return np.array([-1 if k is None else self.ids[k] for k in labels], dtype=np.int64)

    def _listen(self, what: str, waves: Tensor, meant: np.ndarray) -> Heard:
        self.bar.set_description(f"judging {what}")
        heard = listen(self.recogniser, waves.float().cpu(), meant)
        self.bar.update(len(waves))
        return heard

    def _row(self, name: str, kind: str, heard: Heard) -> Row:
        s = self.settings
        row = measure(name, kind, heard, self.recordings, self.reference, s.seed, s.bootstrap)
        if name in self.rated and s.dnsmos_clips:
            self.bar.set_description(f"DNSMOS of {name}")
            add_dnsmos(row, heard, s.dnsmos_clips, self.bar.update)
        if name in self.rated and self.asr is not None and s.asr_clips:
            self.bar.set_description(f"second opinion on {name}")
            add_second_opinion(row, heard, self.asr, s.asr_clips, self.bar.update)
        self.rows.append(row)
        return row

    def _training(self, data: WaveSet, n: int) -> None:
        """Recordings that pipeline and recogniser learnt from: what perfect imitation scores."""
        index = even_choice(data.label_ids, n, np.random.default_rng(self.settings.seed))
        heard = self._listen(TRAINING, *self._clips(data, index))
        self._row(TRAINING, TRAINING, heard)

    def _copies(self) -> None:
        """Recordings through log-Mel and vocoder."""
        self.bar.set_description("vocoding recordings")
        transform = LogMel(self.pipeline.mel_config)
        parts = []
        for wave in self.recordings.waves.split(self.settings.batch_size):
            with torch.no_grad():
                parts.append(self.pipeline.vocode(transform(wave)).float().cpu())
            self.bar.update(len(wave))
        heard = self._listen(COPY, torch.cat(parts), self.recordings.meant)
        self._row(COPY, COPY, heard)

    def _guided(self, nfe: int | None) -> tuple[Tensor, np.ndarray]:
        """One guided row; returns its log-Mels and labels."""
        s = self.settings
        labels = [self.pipeline.labels[i % len(self.pipeline.labels)] for i in range(s.n)]
        name = f"{GUIDED}, {'default' if nfe is None else nfe}"
        row, mels, meant = self._draw(name, GUIDED, labels, nfe)
        row.gamma = self.pipeline.guidance if s.gamma is None else s.gamma
        guide = torch.cat([self.pipeline.guide_labels(m).cpu() for m in mels.split(s.batch_size)])
        own = self._meant([self.pipeline.labels[int(k)] for k in guide])
        row.agreement = wilson(int((own == meant).sum()), len(meant))
        return mels, meant

    def _unguided(self) -> None:
        self._draw(f"{UNGUIDED}, default", UNGUIDED, [None] * self.settings.n, None)

    def _draw(
        self, name: str, kind: str, labels: Sequence[str | None], nfe: int | None
    ) -> tuple[Row, Tensor, np.ndarray]:
        s, waves, mels, used, seconds = self.settings, [], [], set(), 0.0
        self.bar.set_description(f"drawing {name}")
        for start in range(0, s.n, s.batch_size):
            part = labels[start : start + s.batch_size]
            begun = time.perf_counter()
            # the rows share seed and numbers, so they differ in nothing else
            drawn = self.pipeline.sample(part, guidance=s.gamma, nfe=nfe, seed=s.seed, first=start)
            seconds += time.perf_counter() - begun
            waves.append(drawn.waves.float().cpu())
            mels.append(drawn.mels.float().cpu())
            used.add(int(drawn.nfe))
            self.bar.update(len(part))
        if len(used) != 1:
            raise ValueError(f"evaluate: batches of one row took {sorted(used)} evaluations")
        meant = self._meant(labels)
        row = self._row(name, kind, self._listen(name, torch.cat(waves), meant))
        row.nfe, row.seconds_per_clip = used.pop(), seconds / s.n
        return row, torch.cat(mels), meant

    def _grid(self, drawn: tuple[Tensor, np.ndarray]) -> np.ndarray | None:
        """Log-Mels [labels, examples, n_mels, frames]; None unless every label was drawn."""
        mels, meant = drawn
        groups = [np.flatnonzero(meant == k) for k in range(len(self.recogniser.config.labels))]
        count = min(EXAMPLES, *(len(g) for g in groups))
        return np.stack([mels[g[:count]].numpy() for g in groups]) if count else None

    def _notes(self, data: WaveSet, shown: int, n: int) -> list[str]:
        dimension = self.recogniser.config.embedding
        notes = [
            "Recognised: the recogniser's first label is the label meant; sure: and its calibrated "
            f"probability is at least {CONFIDENT:g}. Rates carry 95 % Wilson intervals.",
            f"Held-out recordings: {len(data)} clips; {shown} are shown as ceiling and vocoded, as "
            "many others are the reference of the distances.",
            f"Frechet distance in {dimension} dimensions at {n} clips a side, no shrinkage: biased "
            "upwards as n falls, so compare only at equal n, and with the two halves. Brackets: "
            "95 % bootstrap; for the halves the range of 95 % of 20 splits.",
            "Spread: trace of the within-label covariance over that of the shown recordings, clips "
            "heard as meant only; in the recogniser's embedding, and in timbre, pitch, intonation "
            "and length (acoustic), which no network computed.",
            "Training recordings: what imitating the training data perfectly would score; the "
            "recogniser, too, was trained on them, so it is surer of them than of new ones.",
            "IS, mIS and AM depend on this recogniser and compare within this table only.",
            "The guiding classifier's agreement with its own samples is no evidence.",
        ]
        if n < 2 * dimension:
            notes.append(
                f"{n} clips a side are few for {dimension} dimensions: distances are rough."
            )
        if self.settings.n < 10 * len(self.pipeline.labels):
            notes.append(f"{self.settings.n} samples a row are few: spread and scores are rough.")
        known = set(data.speakers)
        notes.append(f"{len(known)} speakers in the held-out recordings.")
        return notes

    def _record(self, data: WaveSet, roots: Sequence[str | Path], seconds: float) -> dict[str, Any]:
        s = self.settings
        return {
            **provenance.software(),
            "settings": {
                "n": s.n,
                "nfes": list(s.nfes),
                "gamma": s.gamma,
                "seed": s.seed,
                "batch_size": s.batch_size,
                "dnsmos_clips": s.dnsmos_clips,
                "asr": self.asr and self.asr.name,
                "asr_clips": s.asr_clips if self.asr else 0,
                "bootstrap": s.bootstrap,
            },
            "data": {"roots": [Path(r).name for r in roots], "held_out_clips": len(data)},
            "recogniser": {
                "sha256": weights_hash(self.recogniser),
                "confident_at": CONFIDENT,
            },
            "pipeline": self.pipeline.describe(),
            "seconds": round(seconds, 1),
        }
