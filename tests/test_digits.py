"""The preset that ships: its size, its settings, and that its parts do what they are for."""

import numpy as np
import pytest

from fastscore import Pipeline


@pytest.fixture(scope="module")
def digits():
    return Pipeline.from_pretrained("digits")


def test_fits_in_twelve_megabytes_with_a_card():
    from fastscore.presets import CARD, ROOT, preset_names

    assert "digits" in preset_names(), "the preset digits is not in the package"
    files = list((ROOT / "digits").iterdir())
    assert sum(path.stat().st_size for path in files) < 12e6
    assert (ROOT / "digits" / CARD).stat().st_size > 500
    kinds = {path.suffix for path in files}
    assert kinds <= {".safetensors", ".json", ".md"}


def test_knows_ten_digits_and_at_most_sixty_evaluations(digits):
    from fastscore.config import DIGITS

    assert digits.labels == DIGITS
    assert digits.defaults.nfe <= 60


def test_guided_samples_are_what_was_asked_for(digits):
    """By a recogniser that the guiding classifier knows nothing of; 20 evaluations."""
    from fastscore.metrics.recogniser import load_recogniser

    result = digits.sample(list(digits.labels), nfe=20, batch_size=10)
    heard = load_recogniser().judge(result.waves).predicted
    assert (heard == np.arange(10)).sum() >= 7


@pytest.mark.filterwarnings("ignore:.*speakers are heard in more than one split")
def test_hears_held_out_recordings(digits, shared_data):
    from fastscore.data import SpeechFolder

    clips = SpeechFolder(shared_data / "digits-human", "test").clips[::15]
    right = [next(iter(digits.classify(clip.path))) == clip.label for clip in clips]
    assert np.mean(right) >= 0.9


def test_copy_synthesis_is_still_understood(digits, shared_data):
    from fastscore.data import SpeechFolder
    from fastscore.metrics.recogniser import load_recogniser

    clips = SpeechFolder(shared_data / "digits-synth", "test").clips[::35]
    copies = [digits.vocode_file(clip.path) for clip in clips]
    heard = load_recogniser().judge(copies).predicted
    assert np.mean(heard == [clip.label_index for clip in clips]) >= 0.85
