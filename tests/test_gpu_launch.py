"""The rule behind launch parameters, its tables, and the recording of launches."""

import json

import pytest
import torch
from interpreter import activation

# isort: split
from fastscore_kernels.gpu import launch, shapes
from fastscore_kernels.gpu.cases import cases
from fastscore_kernels.gpu.norm_act import norm_act
from fastscore_kernels.gpu.plans import norm_rule, plan_norm, plan_taps, taps_rule


def taps():
    for preset in shapes.CLASSIFIERS.values():
        for channels, plane in zip(preset.channels, shapes.PLANES, strict=True):
            for batch in shapes.BATCHES:
                for dtype in (torch.float32, torch.bfloat16):
                    yield torch.empty(batch, channels, *plane, dtype=dtype, device="meta")


@pytest.mark.parametrize("arch", launch.DEVICES)
def test_plans_cover_every_position_once(arch):
    for x in taps():
        positions = x.shape[2] * x.shape[3]
        for tensor in (x, x.contiguous(memory_format=torch.channels_last)):
            with launch.record(launch.DEVICES[arch]):
                plans = [plan_norm("norm_act", tensor, 8, len(x)), plan_taps("tap_norm", tensor, 8)]
            for plan in plans:
                assert (plan.splits - 1) * plan.chunk < positions <= plan.splits * plan.chunk
                assert plan.chunk % plan.block_n == 0
                assert 8 % plan.bundle == 0
                assert plan.block_c >= plan.bundle * x.shape[1] // 8
                assert plan.block_s >= plan.splits
                assert plan.warps in (1, 2, 4, 8, 16)


def test_a_lone_large_sample_is_split_and_a_full_batch_is_not():
    with launch.record(launch.DEVICES["sm_90"]):
        lone, full = (
            plan_norm("norm_act", activation(1, 192, 40, 32), 8, rows) for rows in (1, 256)
        )
    assert lone.splits > 32
    assert full.splits == 1


def test_launches_are_recorded_and_not_made(monkeypatch):
    x = activation(1, 8, 2, 2)
    weight = torch.ones(8)
    with launch.record(launch.DEVICES["sm_80"]) as launches:
        y, _ = norm_act(x, weight, weight, None, 2, True, 1e-5, None)
        y.fill_(7)
    assert [one.kernel.__name__ for one in launches] == ["norm_act_kernel"]
    assert (y == 7).all()


def test_launches_are_early_where_asked_for_and_possible():
    x, weight = activation(1, 8, 2, 2), torch.ones(8)
    given = (x, weight, weight, None, 2, True, 1e-5, None)
    with launch.record(launch.DEVICES["sm_90"]) as launches:
        norm_act(*given)
        for wanted in (False, True):
            with launch.early(wanted):
                norm_act(*given)
    assert [one.options["DEPENDENT"] for one in launches] == [False, False, True]
    assert [one.options.get("launch_pdl", False) for one in launches] == [False, False, True]
    with (
        launch.record(launch.DEVICES["sm_80"]),
        launch.early(True),
        pytest.raises(ValueError, match="cannot be launched early on sm_80; sm_90 and sm_100 can"),
    ):
        norm_act(*given)


def test_a_table_replaces_the_rule(tmp_path, monkeypatch):
    x = activation(1, 8, 2, 2)
    key = "dtype=float32 rows=1 channels=8 positions=4 groups=2 last=1"
    (tmp_path / "sm_90.json").write_text(json.dumps({"norm_act": {key: {"warps": 16}}}))
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch.table.cache_clear()
    try:
        with launch.record(launch.DEVICES["sm_90"]):
            assert plan_norm("norm_act", x, 2, 1).warps == 16
            assert plan_norm("norm_act", x, 2, 2).warps != 16
        with launch.record(launch.DEVICES["sm_80"]):
            assert plan_norm("norm_act", x, 2, 1).warps != 16
    finally:
        launch.table.cache_clear()


def test_choices_tell_problem_rule_and_answer():
    x = activation(1, 8, 2, 2)
    weight = torch.ones(8)
    with launch.choices() as found, launch.record(launch.DEVICES["sm_90"]):
        norm_act(x, weight, weight, None, 2, True, 1e-5, None)
        with launch.parameters("norm_act", warps=16):
            norm_act(x, weight, weight, None, 2, True, 1e-5, None)
    # outside nothing is collected any more
    with launch.record(launch.DEVICES["sm_90"]):
        norm_act(x, weight, weight, None, 2, True, 1e-5, None)
    assert [c.op for c in found] == ["norm_act", "norm_act"]
    assert {c.key for c in found} == {"dtype=float32 rows=1 channels=8 positions=4 groups=2 last=1"}
    assert [c.chosen["warps"] for c in found] == [1, 16]
    assert found[0].rule == found[1].rule == found[0].chosen


def test_moments_of_a_tap_path_are_a_problem_of_their_own():
    """They serve another reader than those of tap_norm: a table may split them differently."""
    with launch.choices() as found, launch.record(launch.DEVICES["sm_90"]):
        for case in cases(ops=("tap_path", "tap_norm"), presets=("tiny",), batches=(1,)):
            case.call()
    own = {c.key for c in found if c.op == "tap_norm"}
    assert own == {c.key for c in found if c.op == "tap_path_moments"}
    assert {c.op for c in found} == {
        *("tap_norm", "tap_path_own", "tap_path_project", "tap_path_attend", "tap_path_moments")
    }


def test_a_norm_can_be_told_to_take_one_launch_or_two():
    shape = {"dtype": "bfloat16", "rows": 1, "channels": 192, "positions": 1280, "groups": 8}
    shape["last"] = 1
    by_itself, one = (norm_rule("norm_act", shape, 132, split) for split in (None, False))
    assert by_itself == norm_rule("norm_act", shape, 132, True)
    assert by_itself["splits"] > 1 == one["splits"]
    assert [taps_rule(shape, 132, split)["splits"] > 1 for split in (None, True, False)] == [
        *(True, True, False)
    ]


@pytest.mark.parametrize("path", sorted(launch.TABLES.glob("*.json")), ids=lambda p: p.stem)
def test_checked_in_tables_are_tables_of_known_chips(path):
    assert path.stem in launch.DEVICES
    launch.read_table(path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold an object of operations"),
        ('{"norm_act": 3}', "'norm_act' must hold an object of problems"),
        ('{"norm_act": {"a": {"warps": "4"}}}', "whole numbers"),
        ('{"norm_act": {"a": {"warps": -4}}}', "whole numbers"),
        ('{"norm_act": {"a": {"warps": true}}}', "whole numbers"),
    ],
)
def test_a_broken_table_is_named(text, word, tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=word) as error:
        launch.read_table(path)
    assert str(path) in str(error.value)


def test_an_unknown_parameter_is_named():
    with (
        launch.parameters("norm_act", wraps=4),
        pytest.raises(ValueError, match="norm_act has no launch parameter 'wraps'; it has"),
    ):
        plan_norm("norm_act", activation(1, 8, 2, 2), 2, 1)
