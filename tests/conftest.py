"""Fixtures every test may use."""

import interpreter  # before anything brings Triton

# isort: split
import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastscore_kernels import cpu
from kernel_cases import native_or_skip
from refusals import refusal
from small_presets import write_preset
from small_workloads import SMALL
from streams import Clock, Drawing, prepare
from torch import Tensor

from fastscore import Pipeline
from fastscore.measure.models import MODELS
from fastscore.stream import Stream

# small tensors gain nothing from a second thread, and the threads' spinning costs the other core;
# tests of threads choose their number themselves
torch.set_num_threads(1)

if torch.cuda.is_available():
    # what kernels are held to here is exact to rounding; PyTorch lets convolutions use TF32
    torch.backends.cudnn.allow_tf32 = False

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, ``-m gpu`` takes all that runs on it: tests of Triton kernels too."""
    if torch.cuda.is_available():
        for item in items:
            if interpreter.used_by(getattr(item, "module", None)):
                item.add_marker(pytest.mark.gpu)


# processes that the whole suite takes at most: each holds PyTorch, about a GB
_MOST_PROCESSES = 8


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Give the whole suite as many processes as there are cores; a part of it runs in this one.

    Tests compute with one thread each. ``-n 0`` runs all of them one after the other.
    """
    options = config.option
    # a worker is asked too
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not options.keyword
    alone = options.collectonly or options.usepdb or options.markexpr != "not slow"
    if whole and not alone and getattr(options, "numprocesses", 0) is None:
        options.numprocesses = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no recordings at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def bench() -> Callable[[str], ModuleType]:
    """Imports a script of bench/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
        yield importlib.import_module


@pytest.fixture(scope="session")
def preset(tmp_path_factory) -> Path:
    """A preset of small networks."""
    return write_preset(tmp_path_factory.mktemp("preset") / "small")


@pytest.fixture(scope="session")
def pipe(preset) -> Pipeline:
    return Pipeline.from_pretrained(preset)


@pytest.fixture
def small(monkeypatch) -> None:
    """Models "taps" and "pair" to measure."""
    for name, make in SMALL.items():
        monkeypatch.setitem(MODELS, name, make)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run a command line that must be refused; the sentence on stderr."""
    return functools.partial(refusal, capsys)


@pytest.fixture(params=["reference", "native"])
def backend(request) -> str:
    return native_or_skip() if request.param == "native" else request.param


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Every output begins as NaN: what a kernel leaves unwritten shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    class Poisoned:
        empty, empty_like = (
            staticmethod(poison(torch.empty)),
            staticmethod(poison(torch.empty_like)),
        )

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(cpu, "torch", Poisoned())


@pytest.fixture
def drawing():
    return Drawing()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_stream(drawing):
    """Make streams over ``drawing`` that are closed at the end, whatever happened."""
    with contextlib.ExitStack() as stack:

        def make(draw=drawing, max_batch=4, **limits):
            stream = Stream(prepare, draw, max_batch=max_batch, **limits)
            stack.callback(stream.close, cancel=True)
            stack.callback(drawing.gate.set)
            return stream

        yield make
