"""Rows of quality: sizes and devices do not mix, time ends a call, DNSMOS can come later."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_presets import speech_like

from fastscore.config import DIGITS
from fastscore.metrics.measure import Heard, clips_for_dnsmos, mean_dnsmos
from fastscore.metrics.recogniser import Judgement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quality():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield importlib.import_module("headline_quality")


@pytest.fixture
def published(quality):
    return quality.read(quality.out_file("tiny"))


@pytest.fixture
def heard():
    """Four clips, one of them silent."""
    rng = torch.Generator().manual_seed(0)
    waves = torch.stack([speech_like(8000) for _ in range(4)])
    waves += 0.05 * torch.randn(waves.shape, generator=rng)
    waves[2] = 0
    judgement = Judgement(DIGITS, np.eye(10)[:4], np.zeros((4, 2)))
    return Heard(waves, np.arange(4), judgement, np.zeros((4, 1)))


def arguments(quality, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["headline_quality.py", *map(str, words)])
    return quality.parse()


def test_published_rows_are_what_the_same_command_would_draw(quality, published, monkeypatch):
    assert published
    assert quality.alike(published) == published
    args = arguments(quality, monkeypatch, "--data", ".")
    for row in published:
        again = quality.wanted(args, row["contestant"], row["weights"])
        assert quality.key(row) in {quality.key(r) for r in again}


@pytest.mark.parametrize(
    "change",
    [
        {"--size": "paper"},
        {"--device": "cuda"},
        {"--precision": "bf16"},
        {"--vocoder": "hifigan-v1"},
    ],
)
def test_another_setup_is_another_row(quality, monkeypatch, change):
    words = [word for pair in change.items() for word in pair]
    plain, other = (
        quality.wanted(arguments(quality, monkeypatch, "--data", ".", *more), "scoresubnet", "x")
        for more in ([], words)
    )
    assert not {quality.key(r) for r in plain} & {quality.key(r) for r in other}
    setup = {k.removeprefix("--"): v for k, v in change.items()}
    assert quality.alike(plain + other) == plain
    assert quality.alike(plain + other, **setup) == other


def test_sizes_have_files_of_their_own(quality, monkeypatch):
    files = [
        arguments(quality, monkeypatch, "--data", ".", "--size", size).out for size in quality.SIZES
    ]
    assert [f.name for f in files] == ["quality.jsonl", "quality-paper.jsonl"]
    # a dry run leaves them alone
    with pytest.raises(SystemExit):
        arguments(quality, monkeypatch, "--data", ".", "--dry")
    with pytest.raises(SystemExit):
        arguments(quality, monkeypatch)


def test_dnsmos_of_kept_clips_is_that_of_the_row(quality, heard, tmp_path, monkeypatch):
    row = {
        "contestant": "scoresubnet", "guided": True, "nfe": 8, "seed": 0, "n": 4,
        "weights": "x", "dnsmos_clips": 4, "guidance": None,
    }  # fmt: skip
    direct = quality.rate(heard, 4, tmp_path, "unused.npy")
    assert not list(tmp_path.iterdir())
    assert direct["dnsmos"] == mean_dnsmos(clips_for_dnsmos(heard, 4), lambda done: None)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "speechmos", None)
        later = row | quality.rate(heard, 4, tmp_path, quality.waves_name(row))
        assert later["dnsmos"] is None
        assert "speechmos" in later["dnsmos_missing"]
        with pytest.raises(ImportError, match="speechmos"):
            quality.add_dnsmos([later], tmp_path)
    kept = np.load(tmp_path / later["waves"])
    # the silent clip has no speech to rate
    assert (kept.dtype, kept.shape) == (np.float16, (3, 8000))
    rows = [dict(row, dnsmos=None), later, dict(row, dnsmos={"ovrl": [1.0, 0.0]}, waves="gone")]
    assert quality.add_dnsmos(rows, tmp_path) == 1
    assert rows[0]["dnsmos"] is None
    assert "dnsmos_missing" not in later
    for name, (mean, half) in direct["dnsmos"].items():
        assert later["dnsmos"][name] == pytest.approx([mean, half], abs=0.02)


def test_kept_clips_that_are_none_are_refused(quality, tmp_path):
    row = {"waves": "a.npy", "dnsmos": None}
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        quality.add_dnsmos([row], tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(4, dtype=np.float32))
    with pytest.raises(ValueError, match="no clips"):
        quality.add_dnsmos([row], tmp_path)
    # a name that leads elsewhere is taken as a name
    row["waves"] = "../../a.npy"
    with pytest.raises(ValueError, match="no clips"):
        quality.add_dnsmos([row], tmp_path)


def test_no_row_is_begun_without_time_for_it(quality, monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["--data", tmp_path, "--only", "scoresubnet", "--out", out, "--minutes", "0"]
    arguments(quality, monkeypatch, *words)
    quality.main()
    assert "8 rows are left" in capsys.readouterr().out
    assert not out.exists()


def test_rows_that_are_there_are_not_drawn_again(quality, published, monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    quality.write(out, published)
    # the folder of recordings is empty: drawing a row would fail
    arguments(quality, monkeypatch, "--data", tmp_path, "--only", "scoresubnet", "--out", out)
    quality.main()
    assert "rows are left" not in capsys.readouterr().out
    assert [json.loads(line) for line in out.read_text().splitlines()] == published
