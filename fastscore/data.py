"""Spoken-word datasets: folders in the layout of Google Speech Commands, and cached Mels and waves."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastscore.audio import LogMel, fit_length, load_audio
from fastscore.cache import Entry, Item, default_cache_dir, open_or_build
from fastscore.config import DIGITS, MelConfig, to_dict

SPLITS = ("train", "validation", "test", "all")
_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
_EXTENSIONS = (".wav", ".flac", ".ogg")
_NAME = re.compile(r"(?P<speaker>.+)_nohash_(?P<take>\d+)\.[A-Za-z0-9.]+")


@dataclass(frozen=True)
class Clip:
    """One recording of one word: ``label_index`` counts in the labels asked for."""

    path: Path
    label_index: int
    label: str
    speaker: str


def which_split(speaker: str, validation: float = 10.0, test: float = 10.0) -> str:
    """Split of a speaker by hash, percentages as in Speech Commands (Warden 2018, section 7.1).

    The same speaker always lands in the same split, whatever else the dataset holds.
    """
    most = 2**27 - 1
    number = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (most + 1)
    percent = number * (100.0 / most)
    if percent < validation:
        return "validation"
    return "test" if percent < validation + test else "train"


class SpeechFolder:
    """Clips of one split of a folder laid out as LABEL/SPEAKER_nohash_TAKE.EXT (wav, flac or ogg).

    ``validation_list.txt`` and ``testing_list.txt`` define the splits, as in Speech Commands; where
    both are absent, a hash of the speaker does (``which_split``), which keeps speakers disjoint.

    Attributes: ``clips`` (sorted by path), ``labels``, ``root``, ``split``, ``shared_speakers``
    (names heard in more than one split) and ``speaker_disjoint``.

    Raises ValueError for a missing folder, an unknown label or split, broken lists, or no clips.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, labels: Sequence[str] = DIGITS
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        self.root, self.split, self.labels = Path(root), split, _check_labels(labels)
        if not self.root.is_dir():
            raise ValueError(
                f"{self.root}: no such folder; expected LABEL/SPEAKER_nohash_TAKE.EXT in it"
            )
        files = _scan(self.root, self.labels)
        splits = _assign(self.root, files, self.labels)
        heard: dict[str, set[str]] = {}
        for name, where in splits.items():
            heard.setdefault(_speaker(name), set()).add(where)
        self.shared_speakers = frozenset(s for s, where in heard.items() if len(where) > 1)
        if self.shared_speakers and split != "all":
            warnings.warn(
                f"{self.root}: {len(self.shared_speakers)} of {len(heard)} speakers are heard in more "
                "than one split, so held-out figures include known voices",
                stacklevel=2,
            )
        index = {label: i for i, label in enumerate(self.labels)}
        self.clips = [
            Clip(self.root / name, index[label := name.split("/")[0]], label, _speaker(name))
            for name in sorted(splits)
            if split in ("all", splits[name])
        ]
        if not self.clips:
            raise ValueError(
                f"{self.root}: split {split!r} holds no clip of {', '.join(self.labels)}; list some in "
                "validation_list.txt and testing_list.txt or record more speakers"
            )

    @property
    def speaker_disjoint(self) -> bool:
        """Whether no speaker is heard in two splits."""
        return not self.shared_speakers

    def __len__(self) -> int:
        return len(self.clips)


def _speaker(name: str) -> str:
    return name.split("/")[1].split("_nohash_")[0]


def _check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str) or not labels or len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels!r} must be a list of one or more different names")
    return tuple(labels)


def _scan(root: Path, labels: tuple[str, ...]) -> list[str]:
    """Names LABEL/FILE, relative to root, of every clip with one of the labels."""
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._")
    unknown = [label for label in labels if label not in folders]
    if unknown:
        raise ValueError(
            f"{root}: label {unknown[0]!r} is unknown; available: {', '.join(folders) or 'none'}"
        )
    names, strange = [], []
    for label in labels:
        for entry in os.scandir(root / label):
            if entry.name.startswith(".") or not entry.name.lower().endswith(_EXTENSIONS):
                continue
            name = f"{label}/{entry.name}"
            (names if _NAME.fullmatch(entry.name) else strange).append(name)
    if strange:
        warnings.warn(
            f"{root}: {len(strange)} audio files are not named SPEAKER_nohash_TAKE.EXT and are left "
            f"out: {_some(sorted(strange))}",
            stacklevel=3,
        )
    return names


def _assign(root: Path, files: list[str], labels: tuple[str, ...]) -> dict[str, str]:
    """Split of every clip: by the two lists, or by the hash of the speaker where both are absent."""
    present = [name for name in _LISTS.values() if (root / name).is_file()]
    if not present:
        return {name: which_split(_speaker(name)) for name in files}
    if len(present) == 1:
        raise ValueError(
            f"{root}: {present[0]} is there without its counterpart; provide both "
            f"{' and '.join(_LISTS.values())}, or neither to split by a hash of the speaker"
        )
    splits = dict.fromkeys(files, "train")
    listed: dict[str, str] = {}
    for split, file in _LISTS.items():
        for line in (root / file).read_text(encoding="utf-8").splitlines():
            name = line.strip().removeprefix("./")
            if not name:
                continue
            parts = name.split("/")
            if len(parts) != 2 or not _NAME.fullmatch(parts[1]):
                raise ValueError(
                    f"{root / file}: entry {name!r} is not of the form LABEL/SPEAKER_nohash_TAKE.EXT"
                )
            if listed.setdefault(name, split) != split:
                raise ValueError(f"{root}: {name} is in both lists; remove it from one")
            # a listed file that is not there stays in: reading it names it among the broken ones
            if parts[0] in labels:
                splits[name] = split
    return splits


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


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
        """Clip ``index`` as fp32 [samples], full scale 1."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return torch.from_numpy(self.samples[start:stop].astype(np.float32) / 32768)


Roots = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


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

    Raises ValueError as ``SpeechFolder`` does, and for clips that are unreadable or silent, unless
    ``skip_broken`` leaves them out with a warning.
    """
    mel = mel or MelConfig()
    if frames <= 0:
        raise ValueError(f"load_mels: frames {frames} must be positive")
    clips, items = _gather(roots, split, labels)
    transform = LogMel(mel)

    def compute(path: Path) -> np.ndarray:
        wave = load_audio(path, mel.sample_rate, refuse_silence=True)
        with torch.no_grad():
            return transform(fit_length(wave, frames * mel.hop_length)).numpy()

    settings = {"kind": "mels", "mel": to_dict(mel), "frames": frames}
    entry, kept = _cached(
        clips, items, settings, "float32", compute, cache_dir, skip_broken, progress
    )
    shape = (len(kept), mel.n_mels, frames)
    return MelSet(entry.values.reshape(shape), *_columns(kept), _check_labels(labels), mel)


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
    clips, items = _gather(roots, split, labels)

    def compute(path: Path) -> np.ndarray:
        wave = load_audio(path, rate, refuse_silence=True)
        return (wave * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()

    settings = {"kind": "waves", "sample_rate": rate}
    entry, kept = _cached(
        clips, items, settings, "int16", compute, cache_dir, skip_broken, progress
    )
    return WaveSet(entry.values, entry.offsets, *_columns(kept), _check_labels(labels), rate)


def _gather(roots: Roots, split: str, labels: Sequence[str]) -> tuple[list[Clip], list[Item]]:
    several = [roots] if isinstance(roots, str | os.PathLike) else list(roots)
    if not several or len({Path(r).resolve() for r in several}) != len(several):
        raise ValueError(f"roots {several} must name one or more different folders")
    clips: list[Clip] = []
    items: list[Item] = []
    for number, root in enumerate(several):
        for clip in SpeechFolder(root, split, labels).clips:
            clips.append(clip)
            name = f"{number}/{clip.path.relative_to(root).as_posix()}"
            items.append(Item.of(name, clip.path, clip.label_index))
    return clips, items


def _cached(clips, items, settings, dtype, compute, cache_dir, skip_broken, progress):
    """Entry of the cache, and the clips it holds: all but the broken ones."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    entry: Entry = open_or_build(folder, settings, items, dtype, compute, skip_broken, progress)
    if entry.broken:
        names = [str(clips[i].path) for i in sorted(entry.broken)]
        warnings.warn(
            f"{len(names)} of {len(clips)} clips are broken and left out: {_some(names)}",
            stacklevel=3,
        )
    return entry, [clip for i, clip in enumerate(clips) if i not in entry.broken]


def _columns(clips: list[Clip]) -> tuple[np.ndarray, list[str], list[Path]]:
    label_ids = np.array([clip.label_index for clip in clips], dtype=np.int64)
    return label_ids, [clip.speaker for clip in clips], [clip.path for clip in clips]
