"""What a machine with a GPU runs on it: everything that takes its device from interpreter."""

import interpreter
import pytest
import test_engine
import test_engine_cuda
import test_gpu_launch
import test_gpu_norm_act


@pytest.mark.parametrize(
    ("module", "expected"),
    [(test_gpu_norm_act, True), (test_gpu_launch, True), (test_engine, False), (None, False)],
)
def test_modules_that_take_their_device_from_it_are_known(module, expected):
    assert interpreter.used_by(module) is expected


def test_others_are_marked_by_themselves():
    assert not interpreter.used_by(test_engine_cuda)
    assert pytest.mark.gpu in test_engine_cuda.pytestmark
