"""What a step costs, by hand and beside what was published."""

import pytest
import torch
from small_presets import write_preset
from torch.utils.flop_counter import FlopCounterMode

from fastscore import Pipeline
from fastscore.commands.info import _model
from fastscore.cost import PUBLISHED, step_macs, tap_shapes


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return Pipeline.from_pretrained(write_preset(tmp_path_factory.mktemp("preset") / "small"))


def test_macs_by_hand(pipe):
    """Convolutions of the small classifier's forward pass, summed by hand."""
    assert tap_shapes(pipe.denoiser) == {"stage1": (8, 8, 12), "stage2": (16, 4, 6)}
    macs = step_macs(pipe.denoiser)
    forward = 8 * 12 * 9 * (4 * 8 + 2 * 8 * 8) + 4 * 6 * 9 * (8 * 16 + 2 * 16 * 16)
    c_noise = torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        pipe.denoiser.classifier(torch.zeros(1, 1, 16, 24), c_noise)
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert convolutions // 2 == forward
    # guidance adds one pass back through everything, stem included
    added = macs["guided"] - macs["unguided"]
    assert forward <= added <= 1.1 * forward
    assert step_macs(pipe.denoiser, batch=3) == {k: 3 * v for k, v in macs.items()}


def test_paper_has_the_published_size_and_cost():
    facts = _model("paper")
    counts = facts["parameters"]
    assert counts["subnet"] == pytest.approx(PUBLISHED["trainable"], rel=0.02)
    assert sum(counts.values()) == pytest.approx(PUBLISHED["total"], rel=0.02)
    added = facts["macs"]["guided"] - facts["macs"]["unguided"]
    assert added == pytest.approx(PUBLISHED["guided"] - PUBLISHED["unguided"], rel=0.02)
