"""A compiled package: equal to autograd, and drawn from in C++. Compiling takes minutes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from refusals import everything
from test_export import MEL_BOUND, WAVE_BOUND, assert_equals_autograd, assert_vocodes

from fastscore.cli import main
from fastscore.export import export_pt2, load_exported
from fastscore.export.graphs import load_model
from fastscore.export.pipeline import ExportedPipeline

COMPILER = next(filter(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++")), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def package(preset, tmp_path_factory) -> Path:
    """The preset, compiled."""
    reports = []
    out = tmp_path_factory.mktemp("package") / "small.pt2"
    done = export_pt2(preset, out, report=lambda *took: reports.append(took))
    assert [name for name, *_ in reports] == list(done.seconds)
    assert everything(out.parent) == ["small.pt2"]
    return out


@pytest.fixture(scope="module")
def exported(package, preset):
    return load_exported(package, "pt2", preset=preset)


def test_equals_autograd_in_every_batch(exported, preset):
    model = load_model(preset, torch.device("cpu"))
    assert_equals_autograd(exported.denoise, model)
    assert_vocodes(exported.vocode, model)


def test_bits_do_not_depend_on_how_often_it_was_loaded(exported, package):
    x, sigma = torch.randn(3, 1, 16, 24), torch.tensor([0.1, 1.0, 10.0])
    assert torch.equal(exported.denoise(x, sigma), load_exported(package).denoise(x, sigma))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "heun"])
def test_samples_as_the_networks_do(sampler, exported, pipe):
    asked = {"labels": ["yes", None, "up"], "nfe": 8, "batch_size": 4, "sampler": sampler}
    ours, theirs = ExportedPipeline(exported).sample(**asked), pipe.sample(**asked)
    torch.testing.assert_close(ours.mels, theirs.mels, atol=MEL_BOUND, rtol=0)
    bound = WAVE_BOUND * theirs.waves.abs().max()
    torch.testing.assert_close(ours.waves, theirs.waves, atol=bound.item(), rtol=0)


def test_a_package_without_its_end_is_refused(package, tmp_path):
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(package.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_exported(cut)


class TestWithoutPython:
    """The program that -DFASTSCORE_DRAW=ON builds, where FASTSCORE_DRAW_PROGRAM names it."""

    @pytest.fixture
    def draw(self, here):
        program = os.environ.get("FASTSCORE_DRAW_PROGRAM")
        if not program:
            pytest.skip("FASTSCORE_DRAW_PROGRAM names no fastscore_draw")

        def run(*arguments):
            command = [program, *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)

        return run

    @pytest.mark.parametrize("label", ["yes", None])
    def test_draws_the_same_file_as_python(self, label, draw, package, here):
        labels = [label] if label else []
        shared = ["--seed", 3, "--first", 2, "--nfe", 8, "--threads", 1]
        run = draw(package, *labels, *shared, "--out", "c.wav")
        assert run.returncode == 0, run.stderr
        python = ["--runtime", "pt2", "--model", package, "--quiet", "--out", "python.wav"]
        assert main(["sample", *labels, *map(str, [*shared, *python])]) == 0
        assert (here / "c.wav").read_bytes() == (here / "python.wav").read_bytes()

    def test_says_one_sentence_where_it_refuses(self, draw, package, here):
        (here / "cut.pt2").write_bytes(package.read_bytes()[:1_000_000])
        (here / "text.pt2").write_text("no package")
        wav = ["--out", "c.wav"]
        for arguments, said in [
            ([], "no file was named"),
            ([package, "yes", "--out", "c.mp3"], "must name a .wav file"),
            ([package, "maybe", *wav], "label 'maybe' is unknown; choose from yes, no, up, down"),
            ([package, "yes", "no", *wav], "argument no is one too many"),
            ([package, "yes", *wav, "--speed", 2], "argument --speed is unknown"),
            ([package, "yes", *wav, "--seed"], "argument --seed needs a value"),
            ([package, "yes", *wav, "--seed", -1], "--seed -1 is not a whole number from 0 to"),
            ([package, "yes", *wav, "--nfe", 7], "choose from 4, 6, 8, 12, 16, 30, 60"),
            ([package, "yes", *wav, "--guidance", "nan"], "--guidance nan must be a finite number"),
            ([package, "yes", "--out", "no/c.wav"], "cannot write no/c.wav: No such file"),
            (["absent.pt2", "yes", *wav], "absent.pt2 does not exist"),
            (["cut.pt2", "yes", *wav], "cut.pt2 is damaged, truncated or no .pt2 file"),
            (["text.pt2", "yes", *wav], "text.pt2 is damaged, truncated or no .pt2 file"),
        ]:
            run = draw(*arguments)
            assert run.returncode == 2, arguments
            assert run.stdout == ""
            (line,) = run.stderr.splitlines()
            assert line.startswith("fastscore_draw: error: ")
            assert said in line
        assert everything(here) == ["cut.pt2", "text.pt2"]
