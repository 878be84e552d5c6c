"""Exported graphs: equal to autograd and to the vocoder, free of what only PyTorch can run."""

import itertools
import math
import threading

import pytest
import torch
from refusals import everything
from small_presets import write_preset
from test_denoiser import by_hand
from test_step import assert_close, questions

from fastscore.cli import main
from fastscore.config import SpectralVocoderConfig
from fastscore.engine import Options
from fastscore.export import export_onnx, load_exported
from fastscore.export import onnx as export_module
from fastscore.export.draw import draw_text
from fastscore.export.graphs import (
    GRAPHS,
    INPUTS,
    OUTPUTS,
    VOCODER,
    example_inputs,
    foreign_operations,
    load_model,
    plain_vocoder,
    trace,
)
from fastscore.export.pipeline import ExportedPipeline
from fastscore.vocoder import SpectralGenerator

BATCHES = (1, 3, 8)
# of the largest sample: what rounding in the pitch's logits becomes at the highest harmonics of a
# vocoder that was never trained
WAVE_BOUND = 1e-3
# of the log-Mel, after a whole trajectory
MEL_BOUND = 1e-4


@pytest.fixture(scope="module")
def model(preset):
    return load_model(preset, torch.device("cpu"))


@pytest.fixture(scope="module")
def programs(model):
    return {name: trace(model, name, 16) for name in GRAPHS}


@pytest.fixture(scope="module")
def folder(preset, programs, tmp_path_factory):
    """The preset, exported to ONNX."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        # traced once for all tests: the same model as the export loads
        patch.setattr(export_module, "trace", lambda model, name, most: programs[name])
        return export_onnx(preset, tmp_path_factory.mktemp("export") / "small", max_batch=16).path


@pytest.fixture(scope="module")
def exported(folder):
    return load_exported(folder)


@pytest.fixture(scope="module")
def drawer(exported):
    return ExportedPipeline(exported)


def assert_equals_autograd(denoise, model):
    """For random questions, guided and not, in batches of several sizes."""
    oracle = model.graphs["guided"].denoiser
    for seed, batch in enumerate(BATCHES):
        args = questions(batch, seed)
        assert_close(denoise(*args), by_hand(*args, denoiser=oracle))
        assert_close(denoise(*args[:2]), by_hand(*args[:2], denoiser=oracle))


def assert_vocodes(vocode, model):
    for batch in BATCHES:
        (mels,) = example_inputs(model, VOCODER, batch)
        expected = model.parts.vocoder(mels)
        assert (vocode(mels) - expected).abs().max() <= WAVE_BOUND * expected.abs().max()


class TestGraphs:
    def test_equal_autograd_in_every_batch(self, programs, model):
        guided, unguided = programs["guided"].module(), programs["unguided"].module()
        assert_equals_autograd(lambda *a: (guided if len(a) > 2 else unguided)(*a), model)
        with torch.no_grad():
            assert_vocodes(programs["vocoder"].module(), model)

    def test_hold_plain_operations_only(self, programs):
        for name, program in programs.items():
            assert not foreign_operations(program)
            targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
            # derivatives in closed form, written out: nothing that would record or replay a tape
            closed = {"aten.silu_backward.default", "aten.native_group_norm_backward.default"}
            backward = {t for t in targets if "backward" in t or "autograd" in t}
            assert backward == (set() if name == "vocoder" else closed)
            assert not any(node.op == "call_module" for node in program.graph.nodes)
            assert not [t for t in targets if "fft" in t or "complex" in t]

    def test_unguided_one_computes_nothing_below_the_shallowest_tap(self, programs):
        def count(name):
            nodes = programs[name].graph.nodes
            return sum("conv_transpose" in str(node.target) for node in nodes)

        # a residual block of two convolutions and the stem
        assert count("guided") - count("unguided") == 3

    def test_custom_operations_would_be_found(self):
        class Draws(torch.nn.Module):
            def forward(self, x):
                return torch.ops.fastscore_native.normals(x, x, x, 4, 0)

        seeds = torch.zeros(2, dtype=torch.int64)
        program = torch.export.export(Draws(), (seeds,))
        assert foreign_operations(program) == ["fastscore_native.normals.default"]

    @torch.no_grad()
    def test_fourier_matrices_are_the_transforms(self):
        torch.manual_seed(1)
        vocoder = SpectralGenerator(SpectralVocoderConfig()).eval()
        plain = plain_vocoder(vocoder)
        frames = torch.randn(2, 9, 512)
        for ours, theirs in zip(plain._transform(frames), vocoder._transform(frames), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        spectrum = vocoder._transform(frames)
        back = plain._transform_back(spectrum) * math.sqrt(512)
        torch.testing.assert_close(back, frames, atol=1e-5, rtol=0)
        f0 = 100 + 50 * torch.rand(2, 7, dtype=torch.float64)
        torch.testing.assert_close(plain._stretch(f0), vocoder._stretch(f0), atol=1e-9, rtol=0)
        mels = torch.randn(2, 80, 16) - 4
        expected = vocoder(mels)
        assert (plain(mels) - expected).abs().max() <= 1e-5 * expected.abs().max()


class TestOnnx:
    def test_equals_autograd_in_every_batch(self, exported, model):
        assert_equals_autograd(exported.denoise, model)
        assert_vocodes(exported.vocode, model)

    def test_files_stand_alone_and_say_what_they_are(self, folder):
        onnx = pytest.importorskip("onnx")
        assert everything(folder) == sorted([*(f"{n}.onnx" for n in GRAPHS), "manifest.json"])
        for name in GRAPHS:
            file = onnx.load(folder / f"{name}.onnx")
            onnx.checker.check_model(file)
            assert tuple(i.name for i in file.graph.input) == INPUTS[name]
            assert [o.name for o in file.graph.output] == [OUTPUTS[name]]
            assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
            assert {o.domain for o in file.opset_import} <= {"", "ai.onnx"}
            assert not file.functions
            assert '"name": "small"' in {p.key: p.value for p in file.metadata_props}["fastscore"]

    @pytest.mark.parametrize(
        "asked",
        [
            {"labels": ["yes", "no", None, "up"], "nfe": 8, "batch_size": 4},
            {"labels": "down", "n": 2, "sampler": "heun", "nfe": 7},
            {"labels": None, "n": 2, "sampler": "dpmpp_2m_sde", "nfe": 5},
        ],
    )
    def test_samples_as_the_networks_do(self, drawer, pipe, asked):
        ours, theirs = drawer.sample(seed=3, **asked), pipe.sample(seed=3, **asked)
        torch.testing.assert_close(ours.mels, theirs.mels, atol=MEL_BOUND, rtol=0)
        bound = WAVE_BOUND * theirs.waves.abs().max()
        torch.testing.assert_close(ours.waves, theirs.waves, atol=bound.item(), rtol=0)
        assert (ours.nfe, ours.labels, ours.mel) == (theirs.nfe, theirs.labels, theirs.mel)

    def test_is_a_pipeline_in_all_else(self, drawer, pipe):
        assert drawer.labels == pipe.labels
        assert drawer.sample_rate == pipe.sample_rate
        assert drawer.describe()["hashes"] == pipe.describe()["hashes"]
        assert drawer.warmup()["compile_seconds"] == 0
        assert drawer.stats()["recompilations"] == 0

    def test_streams_to_several_threads(self, drawer):
        expected = {seed: drawer.sample("no", seed=seed).waves[0] for seed in range(4)}
        found = {}
        with drawer.stream(max_batch=1) as stream:

            def ask(seed):
                found[seed] = stream.submit("no", seed=seed).result().waves[0]

            threads = [threading.Thread(target=ask, args=(seed,)) for seed in expected]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert all(torch.equal(found[seed], expected[seed]) for seed in expected)

    def test_command_line_draws_what_python_draws(self, folder, drawer, here, capsys):
        assert main([*_SAMPLE, "--model", str(folder), "--out", "a.wav", "--seed", "5"]) == 0
        assert "6 evaluations each (euler_ancestral, guidance 2, seed 5)" in capsys.readouterr().out
        drawer.save(drawer.sample("yes", seed=5), here / "b")
        assert (here / "a.wav").read_bytes() == (here / "b" / "yes_000.wav").read_bytes()

    def test_what_graphs_cannot_do_is_refused(self, drawer, exported):
        x, sigma, label, gamma = questions(2, 0)
        with pytest.raises(ValueError, match="draws and does not classify"):
            drawer.probabilities(torch.zeros(1, 16, 24))
        with pytest.raises(ValueError, match=r"takes \[batch, 16, 24\]"):
            drawer.vocode(torch.zeros(1, 16, 32))
        with pytest.raises(ValueError, match=r"batch of 17 .* takes 1 to 16; choose a smaller"):
            drawer.sample("yes", n=17, batch_size=17)
        with pytest.raises(ValueError, match="choose mode"):
            ExportedPipeline(exported, engine=Options(mode="compile"))
        for wrong in (4, -2):
            with pytest.raises(ValueError, match=f"label {wrong} is out of range: .* 0 to 3"):
                exported.denoise(x, sigma, torch.tensor([0, wrong]), gamma)
        with pytest.raises(ValueError, match="label and gamma together"):
            exported.denoise(x, sigma, label)
        with pytest.raises(ValueError, match=r"takes float32 \[batch, 1, 16, 24\]"):
            exported.denoise(x.double(), sigma)


_SAMPLE = ["sample", "yes", "--quiet", "--runtime", "onnx"]


class TestDrawText:
    @pytest.fixture
    def lines(self, model):
        parts = model.parts
        config = parts.classifier.config
        text = draw_text(
            *(config.labels, parts.mel, parts.space, parts.sigma, parts.defaults),
            device="cpu",
            torch="2.11",
            processor=("avx2", "fma"),
        )
        return text.splitlines()

    def test_holds_the_plan_that_python_follows(self, lines, pipe):
        start = lines.index("plan 6 euler_ancestral")
        steps = itertools.takewhile(lambda line: line.startswith("step"), lines[start + 1 :])
        rows = [[float.fromhex(word) for word in line.split()[2:]] for line in steps]
        guided = [line.split()[1] for line in lines[start + 1 : start + 7]]
        sigmas = []
        pipe.sample("yes", callback=lambda progress: sigmas.append(progress.sigma))
        assert [row[0] for row in rows] == pytest.approx(sigmas)
        # the interval is 0.1 < sigma <= 9
        assert guided == [str(int(0.1 < row[0] <= 9)) for row in rows]
        assert rows[-1][1:] == [0, 1, 0, 0, 0]

    def test_offers_plans_of_several_lengths(self, lines):
        plans = [line for line in lines if line.startswith("plan ")]
        assert [int(plan.split()[1]) for plan in plans] == [4, 6, 8, 12, 16, 30, 60]
        assert lines[0] == "fastscore-draw 1"
        assert lines[-1] == "end"

    def test_has_no_plan_where_the_sampler_has_none(self, tmp_path):
        other = load_model(
            write_preset(tmp_path / "heun", defaults={"sampler": "heun"}), torch.device("cpu")
        ).parts
        text = draw_text(
            *(other.classifier.config.labels, other.mel, other.space, other.sigma, other.defaults),
            device="cpu",
            torch="2.11",
            processor=(),
        )
        assert "plan" not in text
