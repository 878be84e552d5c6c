"""Log-Mels and waves of spoken-word datasets, computed once and mapped from a cache."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastscore.audio import LogMel, fit_length, load_audio
from fastscore.cache import Item, default_cache_dir, open_or_build
from fastscore.config import DIGITS, MelConfig, to_dict
from fastscore.folders import (
    Clip,
    SpeechFolder,
    check_labels,
    some,
    speech_commands,
    which_split,
)

__all__ = [
    "Clip",
    "MelSet",
    "SpeechFolder",
    "WaveSet",
    "load_mels",
    "load_waves",
    "speech_commands",
    "which_split",
]

Roots = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class MelSet:
    """Cached log-Mels of one split.

    ``mels`` fp32 [N, n_mels, frames], natural log, not normalised, mapped from the cache;
    ``label_ids`` int64 [N] counting in ``labels``; ``speakers`` and ``paths``, N of each.
    """

    mels: np.ndarray
    label_ids: np.ndarray
    speakers: list[str]
    paths: list[Path]
    labels: tuple[str, ...]
    mel: MelConfig

    def __len__(self) -> int:
        return len(self.label_ids)


@dataclass(frozen=True)
class WaveSet:
    """Cached full-length waves of one split.

    ``samples`` int16 [total], full scale 32768, mapped from the cache; clip i is
    ``samples[offsets[i] : offsets[i + 1]]``; ``offsets`` int64 [N + 1]; ``label_ids`` int64 [N]
    counting in ``labels``; ``speakers`` and ``paths``, N of each.
    """

    samples: np.ndarray
    offsets: np.ndarray
    label_ids: np.ndarray
    speakers: list[str]
    paths: list[Path]
    labels: tuple[str, ...]
    sample_rate: int

    def __len__(self) -> int:
        return len(self.label_ids)

    def wave(self, index: int) -> Tensor:
        """Clip ``index`` as fp32 [samples], full scale 1; IndexError beyond the last clip."""
        index = range(len(self))[index]
        start, stop = self.offsets[index], self.offsets[index + 1]
        return torch.from_numpy(self.samples[start:stop].astype(np.float32) / 32768)


def load_mels(
    roots: Roots,
    split: str,
    labels: Sequence[str] = DIGITS,
    mel: MelConfig | None = None,
    frames: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> MelSet:
    """Log-Mels of one split of one or several folders (``SpeechFolder``), computed once and mapped.

    Each clip is fitted to frames * hop_length samples (``fit_length``) before the transform. The
    cache lies in ``cache_dir``, else $FASTSCORE_CACHE, else ~/.cache/fastscore.

    Raises ValueError as ``SpeechFolder`` does, and for clips that are unreadable, longer than a
    minute or silent, unless ``skip_broken`` leaves these out with a warning that names them.
    """
    mel = mel or MelConfig()
    if frames <= 0:
        raise ValueError(f"load_mels: frames {frames} must be positive")
    transform = LogMel(mel)
    samples = frames * mel.hop_length
    with torch.no_grad():
        transform(torch.zeros(samples))  # too few for this configuration: said once, not a clip

    def compute(path: Path) -> np.ndarray:
        wave = load_audio(path, mel.sample_rate, refuse_silence=True)
        with torch.no_grad():
            return transform(fit_length(wave, samples)).numpy()

    settings = {"kind": "mels", "mel": to_dict(mel), "frames": frames}
    source = _Source.gather(roots, split, labels)
    values, _, kept = source.cached(settings, "float32", compute, cache_dir, skip_broken, progress)
    mels = values.reshape(len(kept), mel.n_mels, frames)
    return MelSet(mels, *_columns(kept), source.labels, mel)


def load_waves(
    roots: Roots,
    split: str,
    labels: Sequence[str] = DIGITS,
    mel: MelConfig | None = None,
    frames: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> WaveSet:
    """Full-length 16-bit waves at ``mel.sample_rate`` of one split, gathered once and mapped.

    The arguments are those of ``load_mels``; ``frames`` has no effect, as clips keep their length.

    Raises ValueError as ``load_mels`` does.
    """
    rate = (mel or MelConfig()).sample_rate

    def compute(path: Path) -> np.ndarray:
        wave = load_audio(path, rate, refuse_silence=True)
        return (wave * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()

    settings = {"kind": "waves", "sample_rate": rate}
    source = _Source.gather(roots, split, labels)
    values, offsets, kept = source.cached(
        settings, "int16", compute, cache_dir, skip_broken, progress
    )
    return WaveSet(values, offsets, *_columns(kept), source.labels, rate)


@dataclass(frozen=True)
class _Source:
    """Clips of one split, and the same as the cache keys them."""

    clips: list[Clip]
    items: list[Item]
    labels: tuple[str, ...]

    @classmethod
    def gather(cls, roots: Roots, split: str, labels: Sequence[str]) -> _Source:
        several = [roots] if isinstance(roots, str | os.PathLike) else list(roots)
        if not several or len({Path(root).resolve() for root in several}) != len(several):
            raise ValueError(f"roots {several} must name one or more different folders")
        source = cls([], [], check_labels(labels))
        for number, root in enumerate(several):
            for clip in SpeechFolder(root, split, labels).clips:
                # the root by number, not by path: a dataset that moves keeps its cache
                name = f"{number}/{clip.path.relative_to(root).as_posix()}"
                source.clips.append(clip)
                source.items.append(Item.of(name, clip.path, clip.label_index))
        return source

    def cached(
        self,
        settings: dict,
        dtype: str,
        compute: Callable[[Path], np.ndarray],
        cache_dir: str | os.PathLike[str] | None,
        skip_broken: bool,
        progress: bool,
    ) -> tuple[np.ndarray, np.ndarray, list[Clip]]:
        """Flat values, offsets, and the clips they belong to: all but the broken ones."""
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        entry = open_or_build(folder, settings, self.items, dtype, compute, skip_broken, progress)
        if entry.broken:
            names = [str(self.clips[i].path) for i in sorted(entry.broken)]
            warnings.warn(
                f"{len(names)} of {len(self.clips)} clips are broken and left out: {some(names)}",
                stacklevel=3,
            )
        kept = [clip for i, clip in enumerate(self.clips) if i not in entry.broken]
        return entry.values, entry.offsets, kept


def _columns(clips: list[Clip]) -> tuple[np.ndarray, list[str], list[Path]]:
    label_ids = np.array([clip.label_index for clip in clips], dtype=np.int64)
    return label_ids, [clip.speaker for clip in clips], [clip.path for clip in clips]
