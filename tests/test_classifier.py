"""The classifier's shapes, what it depends on, and its size."""

from dataclasses import replace

import pytest
import torch
from small_models import CLASSIFIER, inputs, small_classifier
from torch.utils.flop_counter import FlopCounterMode

from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, ClassifierConfig

SINGLE = replace(CLASSIFIER, channels=(8,), blocks=(2,))
DEEP = replace(CLASSIFIER, n_mels=32, frames=32, channels=(4, 8, 12, 16), blocks=(1, 2, 1, 1))


@pytest.mark.parametrize("config", [CLASSIFIER, SINGLE, DEEP], ids=["three", "one", "four"])
def test_shapes_of_logits_and_taps(config):
    classifier = small_classifier(config)
    x, c_noise = torch.randn(3, 1, config.n_mels, config.frames), torch.randn(3)
    emb = classifier.embed(c_noise)
    assert emb.shape == (3, config.emb_dim)
    logits, taps = classifier.upper(classifier.lower(x, emb), emb)
    assert logits.shape == (3, len(config.labels))
    assert len(taps) == len(config.tap_names) == len(config.channels)
    for i, (tap, channels) in enumerate(zip(taps, config.channels, strict=True)):
        side = config.patch * 2**i
        assert tap.shape == (3, channels, config.n_mels // side, config.frames // side)
    assert torch.equal(logits, classifier(x, c_noise))


def test_perturbations_are_added_to_the_taps():
    classifier = small_classifier()
    x, c_noise = inputs(2)
    emb = classifier.embed(c_noise)
    h = classifier.lower(x, emb)
    plain, taps = classifier.upper(h, emb)
    zeros = tuple(torch.zeros_like(t) for t in taps)
    again, same = classifier.upper(h, emb, zeros)
    assert torch.equal(plain, again)
    assert all(map(torch.equal, taps, same))
    for i in range(len(taps)):
        nudge = torch.randn_like(taps[i])
        perturb = (*zeros[:i], nudge, *zeros[i + 1 :])
        logits, moved = classifier.upper(h, emb, perturb)
        assert all(map(torch.equal, taps[:i], moved[:i]))
        torch.testing.assert_close(moved[i], taps[i] + nudge)
        assert not torch.allclose(logits, plain, atol=1e-3)


def test_logits_depend_on_noise_level_and_absolute_pitch():
    classifier = small_classifier()
    x, _ = inputs(1)
    logits = classifier(x, torch.tensor([-1.0]))
    assert (logits - classifier(x, torch.tensor([0.7]))).abs().max() > 1e-3
    # away from the edges a convolution alone could not tell a pattern from the same one higher up
    pattern = torch.zeros(1, 1, 16, 24)
    pattern[:, :, 6:8, 10:14] = 3.0
    low, high = (classifier.lower(p, classifier.embed(torch.zeros(1))) for p in (
        pattern, pattern.roll(2, dims=2)))  # fmt: skip
    assert (low.roll(1, dims=2) - high)[:, :, 3:6, 5:7].abs().max() > 1e-3


def test_dropout_acts_in_training_only():
    classifier = small_classifier(replace(CLASSIFIER, dropout=0.5))
    x, c_noise = inputs(2)
    assert torch.equal(classifier(x, c_noise), classifier(x, c_noise))
    classifier.train()
    assert not torch.equal(classifier(x, c_noise), classifier(x, c_noise))


def test_narrow_weights_give_narrow_logits():
    classifier = small_classifier()
    x, sigma = inputs(4)
    x, c_noise = x / x.std(dim=(1, 2, 3), keepdim=True), sigma.log() / 4
    exact = classifier(x, c_noise)
    narrow = classifier.bfloat16()(x.bfloat16(), c_noise)
    assert narrow.dtype == torch.bfloat16
    # some twenty layers of 8-bit mantissas: a few roundings of 2^-8 add up, hundreds do not
    assert (narrow.float() - exact).abs().max() <= 8 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("tiny", 1.01e6, 0.155e9), ("paper", 7.9e6, 4.4e9)]
)
def test_size_and_cost_of_the_presets(name, parameters, macs):
    """The published classifier by inference: 7.9 M parameters, 4.4 GMACs forward at 80 x 64."""
    config = CLASSIFIERS[name]
    with torch.device("meta"):
        classifier = Classifier(config).eval()
        x, c_noise = torch.empty(1, 1, 80, 64), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            classifier(x, c_noise)
    count = sum(p.numel() for p in classifier.parameters())
    assert count == pytest.approx(parameters, rel=0.03)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.03)


def test_weights_load_strictly():
    classifier = small_classifier()
    other = Classifier(ClassifierConfig())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(classifier.state_dict())
    twin = Classifier(CLASSIFIER).eval()
    twin.load_state_dict(classifier.state_dict())
    x, c_noise = inputs(2)
    assert torch.equal(twin(x, c_noise), classifier(x, c_noise))
