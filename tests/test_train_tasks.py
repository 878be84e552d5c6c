"""Batches, losses and exports of the classifier and score trainings."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CLASSIFIER, LABELS, SPACE, SUBNET, randomise, small_classifier
from torch import Tensor

from fastscore.checkpoint import load_checkpoint
from fastscore.classifier import Classifier
from fastscore.config import (
    ClassifierConfig,
    MelConfig,
    MelSpace,
    SigmaRange,
    SubnetConfig,
    from_dict,
)
from fastscore.data import MelSet
from fastscore.subnet import ScoreSubnet
from fastscore.taps import read_taps
from fastscore.train.classifier import ClassifierTask
from fastscore.train.loop import LoopConfig, run
from fastscore.train.mels import (
    MelAugment,
    MelBatches,
    NoiseLevels,
    log_sigma_grid,
    measure_space,
    shift_frames,
)
from fastscore.train.score import ScoreTask

MEL = MelConfig(n_mels=16)
LOOP = LoopConfig(
    steps=40,
    batch_size=16,
    lr=4e-3,
    warmup_steps=4,
    ema_decay=0.8,
    log_every=20,
    validate_every=40,
    accelerator="cpu",
    num_threads=1,
)


def mel_set(clips: int = 24, seed: int = 0) -> MelSet:
    """Clips whose label is the band that sounds, over a quiet random background."""
    rng = np.random.default_rng(seed)
    label_ids = np.arange(clips) % len(LABELS)
    mels = rng.normal(-6.0, 0.5, (clips, 16, 24)).astype(np.float32)
    for i, label in enumerate(label_ids):
        mels[i, 4 * label : 4 * label + 4, 6:18] += 5.0
    return MelSet(mels, label_ids, ["a"] * clips, [Path("a.wav")] * clips, LABELS, MEL)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier_task(**kwargs) -> ClassifierTask:
    mels = mel_set()
    space = measure_space(mels)
    return ClassifierTask(CLASSIFIER, mels, mel_set(16, 1), space, SigmaRange(), 16, **kwargs)


def score_task(classifier: Classifier, space: MelSpace | None = None, **kwargs) -> ScoreTask:
    mels = mel_set()
    space = space or measure_space(mels)
    return ScoreTask(SUBNET, classifier, mels, mel_set(16, 1), space, SigmaRange(), 16, **kwargs)


@pytest.mark.parametrize("shifts", [[0, 3, -3], [23, -23, 1], [24, -24, 100]])
def test_shift_frames_moves_clips_over_silence(shifts):
    mels = torch.randn(3, 16, 24)
    moved = shift_frames(mels, torch.tensor(shifts), -9.0)
    for clip, shift, result in zip(mels.numpy(), shifts, moved.numpy(), strict=True):
        expected = np.full_like(clip, -9.0)
        for frame in range(24):
            if 0 <= frame - shift < 24:
                expected[:, frame] = clip[:, frame - shift]
        np.testing.assert_array_equal(result, expected)


def test_space_is_that_of_the_data():
    mels = mel_set()
    space = measure_space(mels)
    x0, _ = MelBatches(mels, space).first(24)
    assert (space.frames, space.sigma_data) == (24, 1.0)
    assert x0.mean().item() == pytest.approx(0, abs=1e-5)
    assert x0.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_batches_are_a_function_of_the_generator():
    task = classifier_task()
    first, same, other = (task.batch(0, rng(s), 0, 1) for s in (5, 5, 6))
    for key, value in first.items():
        assert torch.equal(value, same[key])
        assert not torch.equal(value, other[key])


def test_augmentation_stays_within_its_limits():
    mels = mel_set()
    space = MelSpace(frames=24)
    batches = MelBatches(mels, space, MelAugment(shift=0, gain=1.5))
    x0, label = batches.draw(64, rng())
    clips = torch.from_numpy(mels.mels)
    seen = []
    for clip, y in zip(x0[:, 0], label, strict=True):
        gain = (clip - clips).flatten(1)
        spread = gain.std(dim=1)
        source = int(spread.argmin())
        assert spread[source] < 1e-5
        assert mels.label_ids[source] == y
        seen.append(gain[source].mean().item())
    assert -1.5 <= min(seen) < -1
    assert 1 < max(seen) <= 1.5
    floor = MEL.log_min
    quiet = MelBatches(mels, space, MelAugment(gain=30.0)).draw(64, rng())[0]
    assert quiet.min().item() == pytest.approx(floor)
    shifted = MelBatches(mels, space, MelAugment(shift=20)).draw(64, rng())[0]
    silent = (shifted == floor).all(dim=2)[:, 0].sum(dim=1)
    assert silent.max() > 10
    assert silent.max() <= 20


def test_first_is_spread_over_the_set_and_unaugmented():
    mels = mel_set()
    batches = MelBatches(mels, MelSpace(frames=24), MelAugment(shift=5, gain=2.0))
    x0, label = batches.first(4)
    assert torch.equal(x0[:, 0], torch.from_numpy(mels.mels[[0, 7, 15, 23]]))
    assert label.tolist() == mels.label_ids[[0, 7, 15, 23]].tolist()
    assert len(batches.first(1000)[0]) == len(mels)


def test_noise_levels_are_log_normal_and_clipped():
    levels = NoiseLevels(log_mean=-0.5, log_std=1.2)
    drawn = levels.draw(20000, SigmaRange(1e-6, 1e6), rng()).log()
    assert drawn.mean().item() == pytest.approx(-0.5, abs=0.04)
    assert drawn.std().item() == pytest.approx(1.2, abs=0.03)
    clipped = levels.draw(20000, SigmaRange(0.5, 2.0), rng())
    assert clipped.min().item() == 0.5
    assert clipped.max().item() == 2.0
    grid = log_sigma_grid(0.01, 1.0, 3)
    assert grid == pytest.approx([0.01, 0.1, 1.0])


def test_classifier_input_is_scaled_noisy_data():
    """c_in (x0 + sigma eps), as the denoiser feeds it: variance one at every noise level."""
    task = classifier_task(levels=NoiseLevels(0.0, 1.5), augment=MelAugment())
    batch = [task.batch(s, rng(s), 0, 1) for s in range(20)]
    x, c_noise = (torch.cat([b[k] for b in batch]) for k in ("x", "c_noise"))
    assert x.shape == (320, 1, 16, 24)
    loud = c_noise > 0.4
    # noise prevails here; below, single clips differ in power
    assert x[loud].square().mean().item() == pytest.approx(1, abs=0.05)
    assert x.square().mean().item() == pytest.approx(1, abs=0.1)
    sigma = (4 * c_noise).exp()
    assert sigma.log().std().item() == pytest.approx(1.5, abs=0.2)


def test_classifier_loss_of_an_untrained_net_and_after_some_steps(tmp_path):
    task = classifier_task(augment=MelAugment())
    batch = task.batch(0, rng(), 0, 1)
    model = task.trained["classifier"]
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    loss, _ = task.loss("classifier", task.trained, batch)
    assert loss.item() == pytest.approx(math.log(len(LABELS)), rel=1e-6)
    record = run(task, LOOP, tmp_path)
    assert task.loss("classifier", task.trained, batch)[0].item() < 0.6 * loss.item()
    assert record["validation"]["accuracy_sigma_0.02"] > 0.9
    assert set(record["validation"]) == {f"accuracy_sigma_{s}" for s in ("0.02", "0.3", "1", "3")}


def test_classifier_export_carries_all_that_feeds_it(tmp_path):
    task = classifier_task()
    randomise(task.trained["classifier"])
    path = tmp_path / "classifier.safetensors"
    task.export(task.trained, path)
    loaded = load_checkpoint(path, "classifier")
    twin = Classifier(from_dict(ClassifierConfig, loaded.config["classifier"]))
    twin.load_state_dict(loaded.tensors)
    x, c_noise = torch.randn(2, 1, 16, 24), torch.zeros(2)
    trained = task.trained["classifier"].eval()
    torch.testing.assert_close(twin.eval()(x, c_noise), trained(x, c_noise))
    assert from_dict(MelConfig, loaded.config["mel"]) == MEL
    assert from_dict(MelSpace, loaded.config["space"]) == task.space
    assert from_dict(SigmaRange, loaded.config["sigma"]) == task.sigma


def test_classifier_training_starts_from_given_weights(tmp_path):
    task = classifier_task()
    randomise(task.trained["classifier"])
    task.export(task.trained, tmp_path / "first.safetensors")
    later = classifier_task(initial=load_checkpoint(tmp_path / "first.safetensors", "classifier"))
    pairs = zip(
        later.trained["classifier"].parameters(),
        task.trained["classifier"].parameters(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert later.config != task.config


def expected_errors(x0: Tensor, sigma: Tensor, noise: Tensor, data: float) -> np.ndarray:
    """Weighted error of D = c_skip x, by sample: all that an untrained subnet predicts."""
    x0, noise, s = x0.double().numpy(), noise.double().numpy(), sigma.double().numpy()
    s = s[:, None, None, None]
    denoised = data**2 / (s**2 + data**2) * (x0 + s * noise)
    weight = (s**2 + data**2) / (s * data) ** 2
    return (weight * (denoised - x0) ** 2).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("data", [1.0, 0.5])
def test_untrained_loss_is_the_analytic_one(data):
    task = score_task(small_classifier(), MelSpace(24, -5.0, 2.0, sigma_data=data))
    batch = task.batch(0, rng(), 0, 1)
    loss, _ = task.loss("score", {"score": task.trained["subnet"]}, batch)
    expected = expected_errors(**batch, data=data)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)


def test_untrained_loss_is_one_on_data_of_the_stated_deviation():
    task = score_task(small_classifier(), levels=NoiseLevels(0.0, 2.0), augment=MelAugment())
    batches = [task.batch(s, rng(s), 0, 1) for s in range(12)]
    losses = [task.loss("subnet", task.trained, b)[0].item() for b in batches]
    assert np.mean(losses) == pytest.approx(1.0, abs=0.1)


def test_score_loss_is_the_weighted_error_of_the_denoiser():
    """The same as lambda |D(x) - x0|^2 computed through the denoiser that samples."""
    from fastscore.config import to_dict
    from fastscore.denoiser import TapDenoiser

    classifier = small_classifier()
    task = score_task(classifier, SPACE)
    subnet = randomise(task.trained["subnet"], seed=4).eval()
    batch = task.batch(0, rng(), 0, 1)
    loss, _ = task.loss("subnet", task.trained, batch)
    x0, sigma, data = batch["x0"], batch["sigma"], SPACE.sigma_data
    x = x0 + sigma[:, None, None, None] * batch["noise"]
    denoised = TapDenoiser(classifier, subnet, SPACE, SigmaRange())(x, sigma)
    weight = (sigma.square() + data**2) / (sigma * data).square()
    errors = weight * (denoised - x0).square().mean(dim=(1, 2, 3))
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-3)
    assert task.config["space"] == to_dict(SPACE)


def test_score_training_lowers_the_loss_and_leaves_the_classifier_alone(tmp_path):
    classifier = small_classifier()
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    task = score_task(classifier, augment=MelAugment())
    frozen = {k: v.clone() for k, v in task.frozen.state_dict().items()}
    batches = [task.batch(s, rng(100 + s), 0, 1) for s in range(4)]

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([task.loss("subnet", task.trained, b)[0].item() for b in batches]))

    start = loss()
    record = run(task, LOOP, tmp_path)
    assert start == pytest.approx(1, abs=0.1)
    assert loss() < 0.85
    assert record["validation"]["loss"] < 0.95
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())
    assert all(torch.equal(v, frozen[k]) for k, v in task.frozen.state_dict().items())
    assert all(p.requires_grad for p in classifier.parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.frozen.parameters())
    assert not task.frozen.training
    loaded = load_checkpoint(tmp_path / "score.safetensors", "score")
    subnet = ScoreSubnet(
        from_dict(SubnetConfig, loaded.config["subnet"]),
        from_dict(ClassifierConfig, loaded.config["classifier"]),
    )
    subnet.load_state_dict(loaded.tensors)
    taken = set(dict(task.trained["subnet"].named_parameters()))
    assert taken == set(dict(subnet.named_parameters()))


def test_no_gradient_reaches_the_taps():
    task = score_task(small_classifier())
    randomise(task.trained["subnet"])
    seen = {}

    def watch(module, args):
        seen["taps"] = [*args[2], *args[3]]

    hook = task.trained["subnet"].register_forward_pre_hook(watch)
    loss, _ = task.loss("subnet", task.trained, task.batch(0, rng(), 0, 1))
    hook.remove()
    loss.backward()
    assert len(seen["taps"]) == 6
    assert not any(t.requires_grad for t in seen["taps"])
    assert all(p.grad is not None for p in task.trained["subnet"].parameters())


def test_narrow_taps_change_the_loss_a_little_only():
    classifier = small_classifier()
    tasks = [score_task(classifier, tap_dtype=t) for t in (torch.float32, torch.bfloat16)]
    state = randomise(tasks[0].trained["subnet"]).state_dict()
    tasks[1].trained["subnet"].load_state_dict(state)
    batch = tasks[0].batch(0, rng(), 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        wide, narrow = (t.loss("subnet", t.trained, batch)[0].item() for t in tasks)
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.05)
    assert all(p.dtype == torch.float32 for p in classifier.parameters())


def test_score_task_reads_the_taps_of_the_scaled_input():
    task = score_task(small_classifier())
    x, c_noise = torch.randn(2, 1, 16, 24), torch.zeros(2)
    features, gradients = task._read(x, c_noise)
    expected = read_taps(small_classifier(), x, c_noise)
    for a, b in zip(
        (*features, *gradients), (*expected.features, *expected.gradients), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
