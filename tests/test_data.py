"""Cached log-Mels and waves are what the files hold, for every kind of file."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_folders import write_clip, write_folder

from fastscore import data
from fastscore.audio import LogMel, fit_length, load_audio
from fastscore.config import DIGITS, MelConfig
from fastscore.data import MelSet, load_mels, load_waves

soundfile = pytest.importorskip("soundfile")

LABELS = ("one", "two", "three")


@pytest.fixture
def load(tmp_path: Path):
    def call(function, roots, split="train", labels=LABELS, **options):
        options = {"cache_dir": tmp_path / "cache", "progress": False} | options
        return function(roots, split, labels, **options)

    return call


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "root")


def test_mels_are_those_of_the_files(root: Path, load) -> None:
    write_clip(root / "one" / "a_nohash_2.flac", 2.2, 44100, channels=2)
    write_clip(root / "two" / "a_nohash_2.ogg", 0.4, 8000)
    mels = load(load_mels, root)
    assert isinstance(mels, MelSet)
    assert isinstance(mels.mels, np.memmap)
    assert mels.mels.shape == (8, 80, 64)
    assert mels.mels.dtype == np.float32
    assert mels.label_ids.dtype == np.int64
    assert len(mels) == len(mels.speakers) == len(mels.paths) == 8
    assert mels.labels == LABELS
    transform = LogMel()
    for i, path in enumerate(mels.paths):
        wave = fit_length(load_audio(path), 64 * 256)
        assert np.array_equal(mels.mels[i], transform(wave).numpy())
        assert LABELS[mels.label_ids[i]] == path.parent.name
        assert path.name.startswith(mels.speakers[i])


def test_waves_keep_their_length(root: Path, load) -> None:
    write_clip(root / "one" / "a_nohash_2.flac", 2.2, 44100, channels=2)
    waves = load(load_waves, root)
    assert waves.samples.dtype == np.int16
    assert np.diff(waves.offsets).tolist().count(35200) == 1
    assert waves.offsets[-1] == len(waves.samples)
    for i, path in enumerate(waves.paths):
        torch.testing.assert_close(waves.wave(i), load_audio(path), rtol=0, atol=0.5 / 32768)
    assert torch.equal(waves.wave(-1), waves.wave(len(waves) - 1))
    with pytest.raises(IndexError):
        waves.wave(len(waves))


def test_waves_clip_and_do_not_wrap(root: Path, load) -> None:
    loud = np.random.default_rng(0).uniform(-3, 3, 800)
    soundfile.write(root / "one" / "a_nohash_2.wav", loud, 16000, subtype="FLOAT")
    wave = load(load_waves, root).wave(2)
    assert np.array_equal(np.sign(wave.numpy()), np.sign(loud.round(5)))
    assert wave.abs().max() <= 1


def test_other_front_end(root: Path, load) -> None:
    mel = MelConfig(win_length=400, hop_length=160)
    mels = load(load_mels, root, mel=mel, frames=100)
    assert mels.mels.shape == (6, 80, 100)
    assert mels.mel == mel
    wave = fit_length(load_audio(mels.paths[0]), 16000)
    assert np.array_equal(mels.mels[0], LogMel(mel)(wave).numpy())
    assert load(load_waves, root, mel=MelConfig(sample_rate=22050)).sample_rate == 22050


def test_second_time_reads_no_audio(root: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(load_mels, root)
    calls = []

    def spy(path, *arguments, **options):
        calls.append(path)
        return load_audio(path, *arguments, **options)

    monkeypatch.setattr(data, "load_audio", spy)
    assert np.array_equal(load(load_mels, root).mels, first.mels)
    # a dataset that moves keeps its cache
    moved = root.rename(root.with_name("moved"))
    assert load(load_mels, moved).paths[0].is_relative_to(moved)
    assert calls == []
    # other labels, splits, lengths, front ends and contents have none
    for expected, change in enumerate(
        [{"labels": ("one",)}, {"labels": LABELS[::-1]}, {"split": "test"}, {"frames": 32}]
    ):
        load(load_mels, moved, **change)
        assert len(set(calls)) > 0, expected
        calls.clear()
    load(load_mels, moved, mel=MelConfig(f_max=7600.0))
    assert len(calls) == 6
    calls.clear()
    write_clip(moved / "one" / "a_nohash_1.wav", 0.12)
    load(load_mels, moved)
    assert len(calls) == 6


def test_several_roots(root: Path, load, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", lists=False)
    both = load(load_mels, [root, str(other)])
    assert len(both) == len(load(load_mels, root)) + len(load(load_mels, other))
    assert both.paths[0].is_relative_to(root)
    assert both.paths[-1].is_relative_to(other)
    for roots in ([], [root, root / ".." / root.name]):
        with pytest.raises(ValueError, match="one or more different folders"):
            load(load_mels, roots)


def spoil(root: Path) -> dict[str, str]:
    """Every way in which a clip of label one can be broken, and how it is said."""
    whole = (root / "one" / "a_nohash_0.wav").read_bytes()
    (root / "one" / "k0_nohash_0.wav").write_bytes(whole[:-500])
    (root / "one" / "k1_nohash_0.wav").touch()
    (root / "one" / "k2_nohash_0.wav").write_text("not audio" * 9)
    soundfile.write(root / "one" / "k3_nohash_0.wav", np.zeros(1600), 16000)
    soundfile.write(root / "one" / "k4_nohash_0.wav", np.full(9, np.nan), 16000, subtype="FLOAT")
    soundfile.write(root / "one" / "k5_nohash_0.wav", np.zeros(0), 16000)
    with open(root / "testing_list.txt", "a") as file:
        file.write("one/k6_nohash_0.wav\n")
    faults = "truncated", "empty", "not wav", "silent", "NaN", "no samples", "no such file"
    return {f"k{i}_nohash_0.wav": fault for i, fault in enumerate(faults)}


@pytest.mark.parametrize("function", [load_mels, load_waves])
def test_broken_clips_are_never_used(root: Path, load, function) -> None:
    faults = spoil(root)
    with pytest.raises(ValueError, match=r"7 of 25 clips are broken: .*and 4 more; mend") as caught:
        load(function, root, "all")
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"7 of 25 clips .* left out: .* and 2 more"):
        clips = load(function, root, "all", skip_broken=True)
    assert len(clips) == len(clips.speakers) == 18
    assert not {path.name for path in clips.paths} & set(faults)
    if function is load_mels:
        assert np.isfinite(clips.mels).all()
        last = fit_length(load_audio(clips.paths[-1]), 64 * 256)
        assert np.array_equal(clips.mels[-1], LogMel()(last).numpy())


def test_each_fault_is_named(root: Path, load) -> None:
    for name, fault in spoil(root).items():
        only = root.parent / name
        (only / "one").mkdir(parents=True)
        (only / "validation_list.txt").touch()
        (only / "testing_list.txt").write_text(f"one/{name}\n")
        if (root / "one" / name).exists():
            (root / "one" / name).rename(only / "one" / name)
        with pytest.raises(ValueError, match=f"1 of 1 clips are broken: .*{name}.*{fault}"):
            load(load_mels, only, "test", labels=("one",))


def test_wrong_arguments(root: Path, load) -> None:
    with pytest.raises(ValueError, match="frames 0 must be positive"):
        load(load_mels, root, frames=0)
    with pytest.raises(ValueError, match="too few"):
        load(load_mels, root, frames=1)
    with pytest.raises(ValueError, match="'zero' is unknown; available: one, three, two"):
        load(load_mels, root, labels=DIGITS)


def test_default_cache_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path / "default"))
    load_mels(root, "test", LABELS, progress=False)
    assert len(list((tmp_path / "default").iterdir())) == 1


def test_shared_recordings(shared_data: Path, load) -> None:
    roots = [shared_data / "digits-human", shared_data / "digits-synth"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*speakers are heard")
        mels = load(load_mels, roots, "validation", ("nine",))
    assert mels.mels.shape == (62, 80, 64)
    assert mels.speakers.count("george") == 5
    assert np.isfinite(mels.mels).all()
    assert mels.mels.min() == pytest.approx(mels.mel.log_min)
    # every clip reaches well above the floor
    assert mels.mels.max(axis=(1, 2)).min() > -6
