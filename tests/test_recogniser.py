"""The recogniser in the package, and the training that makes it."""

import numpy as np
import pytest
import torch

from fastscore.audio import fit_length, load_audio
from fastscore.config import DIGITS
from fastscore.data import SpeechFolder
from fastscore.metrics.recogniser import (
    CONFIDENT,
    PRESET,
    FrontEnd,
    Recogniser,
    RecogniserConfig,
    load_recogniser,
)
from fastscore.train import augment
from fastscore.train.recogniser import RecogniserTask

TINY = RecogniserConfig(channels=16, blocks=1, kernel_size=3, attention=8, embedding=8)


@pytest.fixture(scope="module")
def recogniser():
    return load_recogniser()


@pytest.fixture(scope="module")
def human_test(shared_data):
    clips = SpeechFolder(shared_data / "digits-human", "test").clips
    return [load_audio(c.path) for c in clips], np.array([c.label_index for c in clips])


def test_weights_are_small_and_fit(recogniser):
    assert PRESET.stat().st_size < 2_000_000
    assert recogniser.config.labels == DIGITS
    assert not recogniser.training
    assert not any(p.requires_grad for p in recogniser.parameters())


def test_held_out_human_recordings(recogniser, human_test):
    waves, labels = human_test
    judgement = recogniser.judge([fit_length(w, 16384) for w in waves])
    assert len(labels) == 300
    assert (judgement.predicted == labels).mean() >= 0.97
    right = judgement.predicted == labels
    assert (right & judgement.confident).mean() >= 0.9


def test_unsure_of_noise_silence_and_clicks(recogniser):
    rng = np.random.default_rng(5)
    noise = torch.randn(20, 16384) * torch.logspace(-3, -0.3, 20)[:, None]
    click = torch.zeros(1, 16384)
    click[0, 9000] = 1.0
    hum = 0.2 * torch.sin(2 * np.pi * 110 * torch.arange(16384) / 16000)[None]
    falling = np.cumsum(rng.standard_normal((5, 16384)), axis=1).astype(np.float32)
    falling = torch.from_numpy(falling / np.abs(falling).max(1, keepdims=True))
    judgement = recogniser.judge(torch.cat([noise, click, hum, torch.zeros(1, 16384), falling]))
    assert judgement.confident.mean() <= 0.1
    assert judgement.confidence[22] < CONFIDENT, "silence"


def test_gain_and_position_change_nothing_that_matters(recogniser, human_test):
    waves, _ = human_test
    chosen = [fit_length(w, 14000) for w in waves[::15]]
    middle = recogniser.judge(chosen)
    quiet = recogniser.judge([0.05 * w for w in chosen])
    np.testing.assert_allclose(quiet.probabilities, middle.probabilities, atol=0.02)
    shifted = recogniser.judge([torch.cat([torch.zeros(2384), w]) for w in chosen])
    assert (shifted.predicted == middle.predicted).mean() >= 0.95


def test_order_and_batch_do_not_matter(recogniser):
    waves = [0.1 * torch.randn(n) for n in (9000, 30000, 16384, 17000)]
    together = recogniser.judge(waves, batch_size=2)
    for i, wave in enumerate(waves):
        alone = recogniser.judge([wave])
        np.testing.assert_allclose(together.probabilities[i], alone.probabilities[0], atol=1e-5)
    assert together.embeddings.shape == (4, recogniser.config.embedding)


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ([], "no clips"),
        ([torch.zeros(0)], "clip 0"),
        ([torch.zeros(9), torch.full((9,), float("nan"))], "clip 1"),
        ([torch.zeros(2, 9)], "shape"),
    ],
)
def test_judge_refuses(recogniser, waves, message):
    with pytest.raises(ValueError, match=message):
        recogniser.judge(waves)


def test_foreign_weights_are_refused(tmp_path):
    from fastscore.checkpoint import save_checkpoint
    from fastscore.config import to_dict

    path = tmp_path / "other.safetensors"
    save_checkpoint(path, "recogniser", to_dict(TINY), {"stem.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        load_recogniser(path)
    with pytest.raises(ValueError, match="missing"):
        load_recogniser(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "values", [{"labels": ("a", "a")}, {"f_max": 9000.0}, {"temperature": 0.0}, {"kernel_size": 4}]
)
def test_config_refuses(values):
    with pytest.raises(ValueError, match="RecogniserConfig"):
        RecogniserConfig(**values)


def test_front_end_peaks_at_a_tone_and_is_flat_for_silence():
    front_end = FrontEnd(TINY)
    tone = torch.sin(2 * np.pi * 1000 * torch.arange(16000) / 16000)[None]
    features = front_end(tone)
    assert features.shape == (1, TINY.n_mels, 101)
    # band centres are evenly spaced on the HTK scale
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    step = (mel(TINY.f_max) - mel(TINY.f_min)) / (TINY.n_mels + 1)
    assert abs(int(features[0, :, 50].argmax()) - ((mel(1000) - mel(TINY.f_min)) / step - 1)) <= 1
    assert features.max() == 0.0
    assert features.min() >= -2.0
    assert not front_end(torch.zeros(1, 16000)).any()


def test_augmentation_is_a_pure_function_of_its_generator():
    wave = torch.randn(6, 16384)
    wave[0] = 0.0
    first, second = (augment.augment(wave, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, augment.augment(wave, torch.Generator().manual_seed(4)))


def test_pieces_of_augmentation_keep_what_they_promise():
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(8000) / 5).astype(np.float32)
    placed = augment.place(wave, 16384, rng)
    assert placed.shape == (16384,)
    assert np.square(placed).sum() == pytest.approx(np.square(wave).sum(), rel=1e-5)
    assert augment.place(wave, 4000, rng).shape == (4000,)
    assert len(augment.change_speed(wave, 1.25)) == 6400
    shuffled = augment.shuffle_in_time(wave, rng)
    assert sorted(shuffled.tolist()) == sorted(wave.tolist())
    assert not np.array_equal(shuffled, wave)
    masks = augment.spec_masks(64, 48, 103, torch.Generator().manual_seed(0))
    assert 0.02 < masks.float().mean() < 0.4


@pytest.fixture
def folder(tmp_path):
    """Two labels of two tones, in the layout of the recordings."""
    from fastscore.audio import save_wav

    t = torch.arange(6000) / 16000
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for label, pitch in (("low", 200), ("high", 900)):
        (tmp_path / "d" / label).mkdir(parents=True)
        for i in range(8):
            name = f"{label}/speaker{i}_nohash_0.wav"
            tone = 0.3 * torch.sin(2 * np.pi * (pitch + 5 * i) * t)
            save_wav(tmp_path / "d" / name, tone, 16000)
            if i < 4:
                lists["validation_list.txt" if i < 2 else "testing_list.txt"].append(name)
    for name, lines in lists.items():
        (tmp_path / "d" / name).write_text("\n".join(lines) + "\n")
    return tmp_path / "d"


def test_task_learns_and_exports_what_loads(folder, tmp_path):
    config = RecogniserConfig(
        labels=("low", "high"), channels=16, blocks=1, kernel_size=3, attention=8, embedding=8
    )
    task = RecogniserTask([folder], config, cache_dir=tmp_path / "cache", batch_size=8)
    model = task.trained["recogniser"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(16):
        batch = task.batch(step, torch.Generator().manual_seed(step), 0, 1)
        loss, _ = task.loss("recogniser", task.trained, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.03
    again = task.batch(3, torch.Generator().manual_seed(3), 0, 1)
    same = task.batch(3, torch.Generator().manual_seed(3), 0, 1)
    assert all(torch.equal(again[k], same[k]) for k in again)
    # garbage asks for no label
    assert (again["target"].amax(1) == 0.5).sum() == 1
    model.eval()
    task.export(task.trained, tmp_path / "r.safetensors")
    loaded = load_recogniser(tmp_path / "r.safetensors")
    assert loaded.config.labels == ("low", "high")
    wave = 0.1 * torch.randn(2, 16384)
    torch.testing.assert_close(loaded(wave), model(wave), atol=0.02, rtol=0.02)
    figures = task.validate(task.trained)
    assert set(figures) == {"accuracy/d", "nll/d", "garbage_confident"}


def test_task_refuses_a_share_of_garbage_of_one(folder):
    with pytest.raises(ValueError, match="garbage"):
        RecogniserTask([folder], garbage=1.0)


def test_recogniser_differentiates_in_bf16_with_an_fp32_front_end():
    model = Recogniser(TINY)
    wave = 0.1 * torch.randn(2, 16384)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.front_end(wave).dtype == torch.float32
        model(wave).float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
