"""Folders of spoken words in the layout of Google Speech Commands, their splits and speakers."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastscore.config import DIGITS

SPLITS = ("train", "validation", "test", "all")
_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
_EXTENSIONS = (".wav", ".flac", ".ogg")
_NAME = re.compile(r"(?P<speaker>.+?)_nohash_(?P<take>\d+)\.[A-Za-z0-9.]+")

SPEECH_COMMANDS = "speech_commands_v0.02"
SPEECH_COMMANDS_CLIPS = 105_829  # Warden 2018, section 7: utterances of 35 words


@dataclass(frozen=True)
class Clip:
    """One recording of one word: ``label_index`` counts in the labels asked for."""

    path: Path
    label_index: int
    label: str
    speaker: str


def which_split(speaker: str, validation: float = 10.0, test: float = 10.0) -> str:
    """Split of a speaker by hash, in percent, as Speech Commands does (Warden 2018, section 7.1).

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
    A split that shares speakers with another one is used with a warning.

    Attributes: ``clips`` sorted by name, ``labels``, ``root``, ``split``, and ``shared_speakers``,
    the speakers of these labels that are heard in more than one split.

    Raises ValueError for a missing folder, an unknown label or split, broken lists, or no clips.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, labels: Sequence[str] = DIGITS
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        self.root, self.split, self.labels = Path(root), split, check_labels(labels)
        if not self.root.is_dir():
            raise ValueError(
                f"{self.root}: no such folder; expected LABEL/SPEAKER_nohash_TAKE.EXT in it"
            )
        splits = _assign(self.root, _scan(self.root, self.labels), self.labels)
        self.shared_speakers = self._shared(splits)
        index = {label: i for i, label in enumerate(self.labels)}
        self.clips = [
            Clip(self.root / name, index[label := name.split("/")[0]], label, _speaker(name))
            for name in sorted(splits)
            if split in ("all", splits[name])
        ]
        if not self.clips:
            raise ValueError(
                f"{self.root}: split {split!r} holds no clip of {', '.join(self.labels)}; name "
                f"some in {' and '.join(_LISTS.values())}, or record more speakers"
            )

    def _shared(self, splits: dict[str, str]) -> frozenset[str]:
        heard: dict[str, set[str]] = {}
        for name, split in splits.items():
            heard.setdefault(_speaker(name), set()).add(split)
        shared = frozenset(speaker for speaker, where in heard.items() if len(where) > 1)
        if shared and self.split != "all":
            warnings.warn(
                f"{self.root}: {len(shared)} of {len(heard)} speakers are heard in more than one "
                "split, so figures on held-out clips are not figures on unknown voices",
                stacklevel=3,
            )
        return shared

    @property
    def speaker_disjoint(self) -> bool:
        """Whether no speaker is heard in two splits."""
        return not self.shared_speakers

    def __len__(self) -> int:
        return len(self.clips)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as a tuple; ValueError where they are none, repeated, or one string."""
    if isinstance(labels, str) or not labels or len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels!r} must be a list of one or more different names")
    return tuple(labels)


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _speaker(name: str) -> str:
    return name.split("/")[1].split("_nohash_")[0]


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
            (names if _NAME.fullmatch(entry.name) else strange).append(f"{label}/{entry.name}")
    if strange:
        warnings.warn(
            f"{root}: {len(strange)} audio files are not named SPEAKER_nohash_TAKE.EXT and are "
            f"left out: {some(sorted(strange))}",
            stacklevel=3,
        )
    return names


def _assign(root: Path, files: list[str], labels: tuple[str, ...]) -> dict[str, str]:
    """Split of every clip: by the two lists, or by the speaker's hash where both are absent."""
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
        for name in _read_list(root / file):
            if listed.setdefault(name, split) != split:
                raise ValueError(f"{root}: {name} is in both lists; remove it from one")
            # a listed file that is not there stays in: reading it names it among the broken ones
            if name.split("/")[0] in labels:
                splits[name] = split
    return splits


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as UTF-8 text ({error})") from None
    names = [line.strip().removeprefix("./") for line in lines if line.strip()]
    for name in names:
        parts = name.split("/")
        if len(parts) != 2 or parts[0] == ".." or not _NAME.fullmatch(parts[1]):
            raise ValueError(
                f"{path}: entry {name!r} is not of the form LABEL/SPEAKER_nohash_TAKE.EXT"
            )
    return names


def speech_commands(root: str | os.PathLike[str], download: bool = True) -> Path:
    """Folder of Speech Commands v0.02, SC09 among it, for ``SpeechFolder``; through torchaudio.

    Looks in ``root``/SpeechCommands; else unpacks, or downloads (2.4 GB), the archive. What is
    unpacked appears there complete or not at all.

    Raises ValueError where it is not there and cannot be had, and where clips are missing.
    """
    # imported here: no other use of this module needs torchaudio
    from torchaudio.datasets import SPEECHCOMMANDS

    root = Path(root)
    folder = root / "SpeechCommands" / SPEECH_COMMANDS
    if not folder.is_dir():
        remedy = (
            f"put {SPEECH_COMMANDS}.tar.gz from http://download.tensorflow.org/data/ into {root}, "
            f"or its content into {folder}"
        )
        if not download:
            raise ValueError(f"Speech Commands is not in {root}; allow the download, or {remedy}")
        try:
            _fetch(root, folder)
        # torchaudio says RuntimeError where the checksum differs
        except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as e:
            raise ValueError(f"cannot get Speech Commands ({e}); {remedy}") from None
    # a folder unpacked by hand may have been cut short
    found = len(SPEECHCOMMANDS(root, SPEECH_COMMANDS))
    if found != SPEECH_COMMANDS_CLIPS:
        raise ValueError(
            f"{folder}: {found} clips, but Speech Commands has {SPEECH_COMMANDS_CLIPS}; delete "
            "this folder and unpack the archive again"
        )
    return folder


def _fetch(root: Path, folder: Path) -> None:
    """Download and unpack under a private name, then rename."""
    from torchaudio.datasets import SPEECHCOMMANDS

    created = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".unpacking-"))
    try:
        archive = root / f"{SPEECH_COMMANDS}.tar.gz"
        if archive.is_file():
            (temporary / archive.name).symlink_to(archive.resolve())
        SPEECHCOMMANDS(temporary, SPEECH_COMMANDS, download=True)
        folder.parent.mkdir(exist_ok=True)
        os.rename(temporary / "SpeechCommands" / SPEECH_COMMANDS, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):  # it stays where the corpus is in it
                root.rmdir()
