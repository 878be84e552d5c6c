"""Small folders of clips in the layout of Speech Commands, for tests."""

from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")

# speakers whose split Speech Commands v0.02 publishes: its own lists hold the first two rows
VALIDATION = ("026290a7", "060cd039", "099d52ad", "8b775397", "2643992f")
TEST = ("0c40e715", "0ea0e2f4", "0d53e045", "b83c1acf", "9a7c1f83")


def write_clip(path: Path, seconds: float = 0.3, rate: int = 16000, channels: int = 1) -> None:
    """A tone in noise that depends on the name of the file alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(f"{path.parent.name}/{path.name}".encode()))
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * t) + 0.01 * rng.standard_normal(t.size)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)


def write_folder(root: Path, lists: bool = True) -> Path:
    """Labels one, two and three; speakers a (train), b (validation), c (test); two takes each."""
    for label in ("one", "two", "three"):
        for speaker in "abc":
            for take in range(2):
                write_clip(root / label / f"{speaker}_nohash_{take}.wav", 0.1)
    if lists:
        for name, speaker in (("validation_list.txt", "b"), ("testing_list.txt", "c")):
            names = [
                f"{w}/{speaker}_nohash_{i}.wav\n" for w in ("one", "two", "three") for i in (0, 1)
            ]
            (root / name).write_text("".join(names))
    return root
