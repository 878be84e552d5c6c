"""Which backend runs, and what is said when the one asked for cannot."""

import os
import subprocess
import sys

import fastscore_kernels
import pytest
import torch
from fastscore_kernels import backends, library, norm_act, resolve
from kernel_cases import native_or_skip
from small_models import inputs, small_denoiser

from fastscore.layers import NormAct, set_backend
from fastscore.subnet import TapFusion

ARGUMENTS = (2, torch.ones(4), torch.zeros(4))


def fresh(code: str, **environment: str) -> str:
    """Output of a new interpreter, the last line of its error where it fails."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


def test_native_is_what_a_cpu_gets_where_it_is_built():
    expected = "native" if "native" in fastscore_kernels.available() else "reference"
    code = "import fastscore_kernels as k; print(k.resolve(None, 'cpu'), k.resolve('auto', 'cpu'))"
    assert fresh(code, FASTSCORE_BACKEND="auto") == f"{expected} {expected}"
    assert fresh(code, FASTSCORE_BACKEND="reference") == "reference reference"


def test_nothing_runs_on_meta_but_the_reference():
    assert resolve(None, "meta") == "reference"
    with pytest.raises(ValueError, match="tensors are on meta"):
        resolve("native", "meta")


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="backend 'cuda' is unknown; choose reference, native"):
        norm_act(torch.ones(1, 4, 2, 2), *ARGUMENTS, backend="cuda")
    code = "import fastscore_kernels as k; k.resolve(None, 'cpu')"
    assert "backend 'fast' is unknown" in fresh(code, FASTSCORE_BACKEND="fast")


def test_triton_on_a_cpu_says_how():
    code = "import fastscore_kernels as k; k.resolve('triton', 'cpu')"
    said = fresh(code, TRITON_INTERPRET="0")
    assert "backend triton cannot run here" in said
    assert "TRITON_INTERPRET=1" in said
    code = "import fastscore_kernels as k; print(k.available())"
    assert "triton" in fresh(code, TRITON_INTERPRET="1")


@pytest.fixture
def forgetful():
    """Whatever is decided inside is forgotten again."""

    def forget():
        library._load.cache_clear()
        backends._resolve.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("forgetful")
class TestLibrary:
    def test_that_was_not_built(self, tmp_path, monkeypatch):
        monkeypatch.setattr(library, "_file", lambda: tmp_path / "none.so")
        monkeypatch.delenv("FASTSCORE_BACKEND", raising=False)
        assert resolve(None, "cpu") == "reference"
        assert "reference" in fastscore_kernels.available()
        assert "native" not in fastscore_kernels.available()
        with pytest.raises(
            ValueError, match=r"not built when fastscore was installed; install a C"
        ):
            norm_act(torch.ones(1, 4, 2, 2), *ARGUMENTS, backend="native")

    def test_that_is_no_library(self, tmp_path, monkeypatch):
        path = tmp_path / "libfastscore_native.so"
        path.write_bytes(b"\x7fELF, but no more")
        monkeypatch.setattr(library, "_file", lambda: path)
        with pytest.raises(ValueError, match="cannot be loaded"):
            resolve("native", "cpu")

    def test_of_another_interface(self, monkeypatch):
        native_or_skip()
        backends._resolve.cache_clear()
        library._load.cache_clear()
        monkeypatch.setattr(library, "ABI", 99)
        with pytest.raises(ValueError, match="have interface 2, not 99"):
            resolve("native", "cpu")


def test_instruction_set_is_one_of_those_there_are():
    native_or_skip()
    assert library.instruction_set() in ("avx512", "avx2", "neon", "portable")


def test_float64_is_the_reference_s():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    assert norm_act(x, 2, torch.ones(4).double(), torch.zeros(4).double()).dtype == torch.float64
    with pytest.raises(ValueError, match="float64; use reference"):
        norm_act(x, 2, torch.ones(4).double(), torch.zeros(4).double(), backend="native")


def test_a_model_s_operations_follow_set_backend():
    model = small_denoiser()
    set_backend(model, "reference")
    chosen = [m for m in model.modules() if isinstance(m, NormAct | TapFusion)]
    assert len(chosen) > 10
    assert {m.backend for m in chosen} == {"reference"}
    with pytest.raises(ValueError, match="unknown"):
        set_backend(model, "fast")
    assert {m.backend for m in chosen} == {"reference"}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_step_is_the_same_on_every_cpu_backend(guided, layout):
    native_or_skip()
    model = small_denoiser().requires_grad_(False).to(memory_format=layout)
    x, sigma = inputs(3)
    guidance = (torch.tensor([1, -1, 3]), torch.tensor([2.0, 1.0, 5.0])) if guided else ()
    found = []
    for name in ("reference", "native"):
        set_backend(model, name)
        with torch.no_grad():
            found.append(model(x, sigma, *guidance))
    # fp32 roundings of sums taken in another order, through some thirty layers
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
