"""What a pipeline returns, and writing it to a folder: all files or none."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastscore.config import MelConfig


@dataclass(frozen=True)
class Result:
    """Samples and what they took.

    ``waves`` [B, samples] fp32, full scale 1, at ``sample_rate`` Hz; ``mels`` [B, n_mels, frames]
    fp32, natural-log Mels of the front end ``mel``; ``labels`` (None: unguided) and ``guidance``
    (gamma), one a sample; ``nfe`` denoiser evaluations each sample took; ``seconds`` a stage;
    ``first``, the number of the first sample in the stream of ``seed``.
    """

    waves: Tensor
    sample_rate: int
    mels: Tensor
    mel: MelConfig
    labels: tuple[str | None, ...]
    guidance: tuple[float, ...]
    nfe: int
    sampler: str
    seconds: dict[str, float]
    seed: int
    first: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def audio_seconds(self) -> float:
        """Length of all samples together."""
        return self.waves.shape[0] * self.waves.shape[1] / self.sample_rate

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of computing, all stages, for a second of audio."""
        return sum(self.seconds.values()) / self.audio_seconds

    @property
    def names(self) -> list[str]:
        """File stems, such as seven_000: label and number in the stream of the seed."""
        stems = [re.sub(r"[^\w-]", "_", label or "unguided") for label in self.labels]
        return [f"{stem}_{self.first + i:03d}" for i, stem in enumerate(stems)]


def save_result(result: Result, folder: str | os.PathLike[str], plot: bool = False) -> list[Path]:
    """Write LABEL_NUMBER.wav (16-bit PCM) for every sample, and mels.png with ``plot``; the paths.

    The folder is created where needed. All files appear or none: ValueError where the folder cannot
    be written or the disk is full, ImportError where matplotlib is missing.
    """
    with staged_folder(folder) as stage:
        names = write_result(result, stage, plot)
    return [Path(folder) / name for name in names]


def write_result(
    result: Result, folder: Path, plot: bool = False, stem: str | None = None
) -> list[str]:
    """Write the files of ``save_result`` into an existing folder, one by one; their names.

    ``stem`` names the files of a single sample instead: STEM.wav and STEM.png.
    """
    from fastscore.audio import save_wav

    stems = result.names if stem is None else [stem]
    names = [f"{name}.wav" for name in stems]
    for name, wave in zip(names, result.waves, strict=True):
        save_wav(folder / name, wave, result.sample_rate)
    if plot:
        from fastscore.plot import plot_mels

        names.append(f"{stem or 'mels'}.png")
        plot_mels(folder / names[-1], result.mels, stems, result.mel)
    return names


@contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden folder within ``folder``; its files move out of it when the block ends well.

    ``folder`` is created where needed, at once, so that a place that cannot be written is known
    before any work. When the block raises, everything made is removed again. Raises ValueError
    where the folder cannot be made or written, or where a file would replace a folder.
    """
    folder = Path(folder)
    made = _make_folder(folder)
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(prefix=".fastscore-", dir=folder))
        yield stage
        files = sorted(stage.iterdir())
        for path in files:
            if (folder / path.name).is_dir():
                raise ValueError(
                    f"cannot write {folder / path.name}: a folder has that name; remove it or "
                    "choose another output folder"
                )
        for path in files:
            os.replace(path, folder / path.name)
        made = []
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder}: {error.strerror or error}; free space or choose another "
            "folder"
        ) from error
    except ValueError as error:
        # the hidden folder's name means nothing to anybody
        raise ValueError(str(error).replace(str(stage), str(folder))) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else may have put something there
            for parent in made:
                parent.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Create a folder with its parents; those that were absent, innermost first."""
    absent = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(
            f"{folder} is a file, but a folder is needed; choose another output folder"
        ) from None
    except OSError as error:
        raise ValueError(
            f"cannot make the folder {folder}: {error.strerror}; choose another output folder"
        ) from error
    return absent
