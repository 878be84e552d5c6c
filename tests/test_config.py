"""Configurations survive the way to JSON and back, and refuse what does not fit by name."""

import dataclasses
import json
import math

import pytest

from fastscore import config as config_module
from fastscore.config import (
    CLASSIFIERS,
    DIGITS,
    SUBNETS,
    ClassifierConfig,
    HifiGanConfig,
    MelConfig,
    MelSpace,
    SigmaRange,
    SpectralVocoderConfig,
    SubnetConfig,
    from_dict,
    to_dict,
)

CONFIGS = [
    value
    for value in vars(config_module).values()
    if dataclasses.is_dataclass(value) and value.__module__ == config_module.__name__
]


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_round_trip_through_json(cls):
    values = json.loads(json.dumps(to_dict(cls())))
    assert from_dict(cls, values) == cls()
    assert from_dict(cls, {}) == cls()


@pytest.mark.parametrize("presets", [CLASSIFIERS, SUBNETS], ids=["classifiers", "subnets"])
def test_presets_survive_json_and_fit_each_other(presets):
    for value in presets.values():
        assert from_dict(type(value), json.loads(json.dumps(to_dict(value)))) == value
    assert set(CLASSIFIERS) == set(SUBNETS) == {"tiny", "paper"}
    for name, classifier in CLASSIFIERS.items():
        assert len(classifier.channels) == len(SUBNETS[name].channels)
        assert classifier.labels == DIGITS


def test_nested_configurations_and_tuples_come_back_as_they_were():
    config = HifiGanConfig(
        mel=MelConfig(hop_length=160, win_length=400),
        upsample_rates=(8, 5, 2, 2),
        resblock_dilation_sizes=((1, 2), (3, 4), (5, 6)),
    )
    back = from_dict(HifiGanConfig, json.loads(json.dumps(to_dict(config))))
    assert back == config
    assert back.resblock_dilation_sizes == ((1, 2), (3, 4), (5, 6))
    assert isinstance(back.mel, MelConfig)


def test_whole_numbers_serve_as_floats_only():
    assert from_dict(SigmaRange, {"min": 1, "max": 2}) == SigmaRange(1.0, 2.0)
    assert isinstance(from_dict(SigmaRange, {"min": 1, "max": 2}).min, float)
    with pytest.raises(ValueError, match=r"MelConfig\.n_fft: expected int, got 1024\.0"):
        from_dict(MelConfig, {"n_fft": 1024.0})


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (MelConfig, {"hop": 256}, r"MelConfig: unknown key 'hop'; known keys: sample_rate, n_fft"),
        (MelConfig, [1], r"MelConfig: expected a dictionary, got list"),
        (MelConfig, {"n_mels": "80"}, r"MelConfig\.n_mels: expected int, got '80'"),
        (MelConfig, {"n_mels": True}, r"MelConfig\.n_mels: expected int, got True"),
        (MelConfig, {"f_max": None}, r"MelConfig\.f_max: expected float, got None"),
        (MelConfig, {"f_max": False}, r"MelConfig\.f_max: expected float, got False"),
        (ClassifierConfig, {"channels": 64}, r"channels: expected a list, got 64"),
        (ClassifierConfig, {"channels": [64, "x"]}, r"channels\[1\]: expected int, got 'x'"),
        (SubnetConfig, {"attention": [0, 1, 0]}, r"attention\[0\]: expected bool, got 0"),
        (HifiGanConfig, {"mel": {"hop": 1}}, r"MelConfig: unknown key 'hop'"),
        (HifiGanConfig, {"mel": 3}, r"MelConfig: expected a dictionary, got int"),
    ],
)
def test_refuses_foreign_dictionaries(cls, values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(cls, values)


@pytest.mark.parametrize(
    ("cls", "values", "named"),
    [
        (MelConfig, {"hop_length": 0}, "hop_length 0"),
        (MelConfig, {"win_length": 2048}, "win_length 2048"),
        (MelConfig, {"f_max": 9000.0}, "9000"),
        (MelConfig, {"f_min": 8000.0}, "f_min 8000"),
        (MelConfig, {"n_mels": 0}, "n_mels 0"),
        (MelConfig, {"log_floor": 0.0}, "log_floor 0"),
        (MelSpace, {"frames": 0}, "frames 0"),
        (MelSpace, {"std": 0.0}, "std 0"),
        (MelSpace, {"sigma_data": -1.0}, "sigma_data -1"),
        (SigmaRange, {"min": 0.0}, "min 0"),
        (SigmaRange, {"min": 50.0}, "max 40"),
        (ClassifierConfig, {"labels": ("one",)}, "1 labels"),
        (ClassifierConfig, {"labels": ("one", "two", "one")}, "repeat"),
        (ClassifierConfig, {"blocks": (1, 1)}, "one entry a stage"),
        (ClassifierConfig, {"channels": (32, 60, 128)}, "multiples of groups 8"),
        (ClassifierConfig, {"frames": 60}, "80x60 must be a multiple of 8"),
        (ClassifierConfig, {"n_mels": 84}, "84x64 must be a multiple of 8"),
        (SubnetConfig, {"feature_taps": False, "gradient_taps": False}, "switch at least one on"),
        (SubnetConfig, {"attention": (True,)}, "one entry a scale"),
        (SubnetConfig, {"heads": 5}, "heads 5"),
        (HifiGanConfig, {"resblock": "3"}, "'3' must be '1' or '2'"),
        (HifiGanConfig, {"upsample_rates": (8, 8, 2)}, "same length"),
        (HifiGanConfig, {"upsample_rates": (8, 5, 2, 2)}, "multiply to 160"),
        (SpectralVocoderConfig, {"hop_length": 100}, "hop_length 100"),
        (SpectralVocoderConfig, {"n_fft": 300}, "n_fft 300"),
        (SpectralVocoderConfig, {"kernel_size": 4}, "kernel_size 4"),
        (SpectralVocoderConfig, {"pitch_max": 5000.0}, "5000"),
        (SpectralVocoderConfig, {"pitch_bins": 2}, "pitch_bins 2"),
    ],
)
def test_impossible_values_are_named(cls, values, named):
    with pytest.raises(ValueError, match=cls.__name__) as refusal:
        cls(**values)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MelConfig().n_mels = 40
    with pytest.raises(ValueError, match="dict is not a configuration"):
        to_dict({})


def test_derived_values():
    assert MelConfig().log_min == math.log(1e-5)
    assert ClassifierConfig().tap_names == ("stage1", "stage2", "stage3")
