"""Evaluation from end to end, on a stand-in that plays recordings back."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastscore.audio import LogMel, fit_length, load_audio
from fastscore.config import DIGITS, MelConfig
from fastscore.data import SpeechFolder
from fastscore.metrics.evaluate import Settings, evaluate
from fastscore.metrics.measure import even_choice, split_recordings

SAMPLES = 64 * 256


@dataclass
class Played:
    waves: torch.Tensor
    mels: torch.Tensor
    sample_rate: int
    nfe: int


class Player:
    """Plays training recordings for samples; ``confused`` plays the next label instead.

    Its vocoder is the recording itself where the Mel is known: copy-synthesis without loss.
    """

    labels = DIGITS
    mel_config = MelConfig()
    frames = 64
    guidance = 3.0

    def __init__(self, root, confused: bool = False, one_voice: bool = False):
        clips = SpeechFolder(root, "train").clips
        speaker = clips[0].speaker
        if one_voice:
            clips = [c for c in clips if c.speaker == speaker]
        self.paths = [[c.path for c in clips if c.label_index == k][:20] for k in range(10)]
        self.shift = int(confused)
        self.transform = LogMel(self.mel_config)
        self.calls = []
        self.known = {}

    def sample(self, labels, *, guidance, nfe, seed, first):
        self.calls.append((tuple(labels), guidance, nfe, seed, first))
        rng = np.random.default_rng([seed, first])
        waves = []
        for label in labels:
            k = int(rng.integers(10)) if label is None else DIGITS.index(label) + self.shift
            paths = self.paths[k % 10]
            waves.append(fit_length(load_audio(paths[int(rng.integers(len(paths)))]), SAMPLES))
        waves = torch.stack(waves)
        return Played(waves, self.transform(waves), 16000, nfe or 40)

    def vocode(self, mels):
        # invert nothing: a rough resynthesis is enough to have a row
        frames = mels.shape[-1]
        noise = torch.randn(len(mels), frames * 256, generator=torch.Generator().manual_seed(0))
        envelope = mels.exp().mean(1).repeat_interleave(256, dim=1)
        return 0.1 * noise * envelope

    def guide_labels(self, mels):
        return torch.arange(len(mels)) % 10

    def describe(self):
        return {"what": "recordings"}


@pytest.fixture(scope="module")
def roots(shared_data):
    return [shared_data / "digits-human"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


QUICK = {
    "n": 20,
    "nfes": (12, None),
    "dnsmos_clips": 0,
    "bootstrap": 5,
    "progress": False,
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def played(roots, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    player = Player(roots[0])
    report = evaluate(player, roots, Settings(**QUICK), out / "new", cache_dir=cache)
    return player, report, out / "new"


def test_recordings_played_back_pass(played):
    _, report, _ = played
    names = [row.name for row in report.rows]
    assert names == [
        "recordings",
        "training recordings",
        "copy-synthesis",
        "guided, 12",
        "guided, default",
        "unguided, default",
    ]
    guided = report.default_guided()
    assert guided.recognised.value >= 0.9
    assert guided.n == 20
    assert (guided.nfe, guided.gamma) == (40, 3.0)
    assert np.sum(guided.confusion) == 20
    assert report.rows[0].recognised.value >= 0.9
    # noise in the place of a vocoder is not a digit, and the aims say so
    copy = report.rows[2]
    assert copy.recognised.value < 0.6
    met = {v.aim: v.met for v in report.verdicts()}
    assert not met["copy-synthesis: recognised within 2 points of the recordings"]
    assert met["guided: at most 60 evaluations"]


def test_unguided_is_judged_by_confidence_and_coverage(played):
    _, report, _ = played
    row = report.rows[-1]
    assert row.recognised is None
    assert row.confusion is None
    assert row.confident.value >= 0.7
    assert sum(row.label_counts.values()) == row.confident.successes


def test_labels_seeds_and_defaults_reach_the_pipeline(played):
    player, _, _ = played
    guided = [c for c in player.calls if c[2] == 12]
    assert [len(c[0]) for c in guided] == [8, 8, 4]
    assert [c[3:] for c in guided] == [(0, 0), (0, 8), (0, 16)]
    assert sorted(sum((c[0] for c in guided), ())) == sorted(DIGITS * 2)
    unguided = [c for c in player.calls if None in c[0]]
    assert all(set(c[0]) == {None} and c[1] is None and c[2] is None for c in unguided)


def test_files_are_complete_and_agree(played):
    _, report, out = played
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.json", "report.md"]
    stored = json.loads((out / "report.json").read_text())
    assert stored["rows"][4]["recognised"]["value"] == report.default_guided().recognised.value
    assert stored["provenance"]["settings"]["n"] == 20
    assert len(stored["provenance"]["recogniser"]["sha256"]) == 64
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.split("</style>")[1].split("<pre>")[0]
    assert len(page) < 1_000_000
    assert "guided, default" in (out / "report.md").read_text()
    assert "no evidence" in report.to_text()


def test_wrong_digits_are_seen_for_what_they_are(roots, cache):
    player = Player(roots[0], confused=True)
    report = evaluate(player, roots, Settings(**QUICK | {"nfes": (None,)}), cache_dir=cache)
    guided = report.default_guided()
    assert guided.recognised.value <= 0.1
    assert guided.confident.value >= 0.8, "they are digits, only not those asked for"
    table = np.array(guided.confusion)
    assert np.trace(np.roll(table, -1, axis=1)) >= 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n 0"),
        ({"nfes": (0,)}, "0 evaluations"),
        ({"gamma": float("nan")}, "gamma"),
        ({"gamma": -1.0}, "gamma"),
        ({"seed": -1}, "seed"),
        ({"dnsmos_clips": -1}, "dnsmos_clips"),
    ],
)
def test_settings_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_evaluation_refuses_unknown_labels_few_samples_and_bad_folders(roots, cache, tmp_path):
    player = Player(roots[0])
    with pytest.raises(ValueError, match="n 10"):
        evaluate(player, roots, Settings(**QUICK | {"n": 10}), cache_dir=cache)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot make the folder"):
        evaluate(player, roots, Settings(**QUICK), tmp_path / "file" / "out", cache_dir=cache)
    player.labels = ("left", "right")
    with pytest.raises(ValueError, match="left"):
        evaluate(player, roots, Settings(**QUICK), cache_dir=cache)
    assert not player.calls


def test_split_and_even_choice_are_disjoint_and_level():
    labels = np.repeat(np.arange(3), [4, 10, 40])
    shown, held = split_recordings(labels, 30, seed=0)
    assert not set(shown) & set(held)
    assert np.bincount(labels[shown]).tolist() == [2, 5, 10]
    chosen = even_choice(labels, 12, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
    assert len(set(chosen.tolist())) == 12
    with pytest.raises(ValueError, match="at least 4"):
        split_recordings(np.array([0, 0, 0, 1, 1, 1, 1]), 2, seed=0)
