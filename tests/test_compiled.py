"""The compiled modes: once a batch size, guided and not, and never for another number."""

import shutil

import pytest
import torch

from fastscore import Pipeline
from fastscore.config import SigmaRange
from fastscore.engine import Clips, Engine, Model, Options, Rerun, Task
from fastscore.samplers import SAMPLERS, schedule_for
from fastscore.trajectory import Parts

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
SHAPE = (1, 4, 8)
CPU = torch.device("cpu")


class Little:
    """A denoiser small enough to be compiled in seconds."""

    sigma_range = SigmaRange(0.01, 40.0)
    pitch = 3.0

    def parts(self, x, sigma, label, gamma):
        wave = torch.sin(self.pitch * x) + x.mean(dim=(2, 3), keepdim=True)
        total = sigma * sigma + 0.5
        guidance = None
        if label is not None:
            column = label[:, None, None, None]
            guidance = (column >= 0).float() * torch.tanh(x + column)
        weight = torch.zeros_like(sigma) if gamma is None else gamma * 0.1
        return Parts(wave, guidance, 0.5 / total, sigma / total, weight)

    def __call__(self, x, sigma, label, gamma):
        return self.parts(x, sigma, label, gamma).total(x)


def engine_of(mode, denoiser=None, **options):
    model = Model(denoiser or Little(), lambda x0: (x0, x0.mean(dim=(1, 2, 3))), SHAPE, CPU)
    # replayed by running again, as a device without graphs can
    recorder = Rerun() if mode == "compiled-graphs" else None
    return Engine(model, Options(mode=mode, buckets=(1, 2), **options), recorder=recorder)


def task_of(name, nfe=3):
    sigmas = schedule_for(name, nfe, Little.sigma_range)
    return Task(SAMPLERS[name], sigmas, {}, (0.1, 8.0))


def compiler_runs(engine):
    stats = engine.stats()
    return stats.compilations, stats.recompilations


def clips(labels, gamma, seed):
    n = len(labels)
    return Clips(labels, [gamma] * n, list(range(seed, seed + n)), [0] * n)


def test_numbers_compile_nothing_anew():
    eager, compiled = engine_of("eager"), engine_of("compile")
    levels = Little.sigma_range
    calls = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, nfe, top in (("dpmpp_2m_sde", 5, 40.0), ("euler", 3, 10.0), ("heun", 5, 40.0)):
            sigmas = schedule_for(name, nfe, levels, sigma_max=top)
            task = Task(SAMPLERS[name], sigmas, {}, (0.1, 8.0))
            for labels, gamma, seed in (([1], 2.0, 3), ([3], 0.5, 4), ([0, -1], 1.0, 5)):
                batch = clips(labels, gamma, seed)
                one, two = (e.draw(task, batch).outputs[0] for e in (eager, compiled))
                torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
                calls += 1
    stats = compiled.stats()
    # batches of 1 and of 2, guided and not
    assert (stats.compilations, stats.recompilations) == (4, 0)
    assert stats.compile_seconds > 0
    assert stats.clips == calls // 3 * 4


def test_another_engine_compiles_for_itself():
    """Caches of the compiler are bounded: every shape of every engine has one of its own."""
    for _ in range(2):
        engine = engine_of("compile")
        task = Task(SAMPLERS["euler"], (2.0, 1.0, 0.0))
        engine.draw(task, clips([-1], 0.0, 0))
        assert (engine.stats().compilations, engine.stats().recompilations) == (1, 0)


def test_no_compiler_is_said_at_once():
    from torch._inductor import config

    missing = {"cpp.cxx": (None, "no-such-compiler")}
    message = r'needs a C\+\+ compiler .* or use mode "eager"'
    with config.patch(missing), pytest.raises(ValueError, match=message):
        engine_of("compile")


class TestGraphs:
    """Recorded programs of the compiled denoiser."""

    def test_replays_have_the_bits_of_the_compiled_mode(self):
        compiled, graphs = engine_of("compile"), engine_of("compiled-graphs")
        seen = []
        tasks = [task_of(name) for name in ("dpmpp_2m_sde", "unipc", "heun")]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for task in (*tasks, *tasks):
                for labels in ([1], [3, -1], [-1]):
                    for watch in (None, lambda *state: seen.append(state[:3])):
                        batch = clips(labels, 2.0, 3)
                        one, two = (e.draw(task, batch, watch=watch) for e in (compiled, graphs))
                        for a, b in zip(one.outputs, two.outputs, strict=True):
                            assert torch.equal(a, b)
        assert seen
        # batches of 1 and of 2, guided and not: recorded in many programs, compiled once
        assert compiler_runs(compiled) == compiler_runs(graphs) == (4, 0)
        assert graphs.stats().recorded > 4
        assert compiled.stats().recorded == compiled.stats().replays == 0

    def test_warming_up_leaves_nothing_to_the_compiler(self):
        engine, task = engine_of("compiled-graphs"), task_of("dpmpp_2m_sde")
        took = engine.warm_up(task, (1, 2))
        assert compiler_runs(engine) == (4, 0)
        assert took["programs"] == engine.stats().recorded == 4
        # the compiler runs while a program is recorded
        assert 0 < took["compile_seconds"] <= took["record_seconds"] <= took["seconds"]
        with torch.compiler.set_stance("fail_on_recompile"):
            for labels in ([0], [-1], [2, 1], [-1, -1]):
                engine.draw(task, clips(labels, 1.5, 7))
        # a trajectory is one replay, and so is every one of the warm-up
        assert (engine.stats().recorded, engine.stats().replays) == (4, 8)

    def test_a_recompilation_shows(self):
        denoiser = Little()
        engine = engine_of("compiled-graphs", denoiser)
        engine.draw(task_of("euler"), clips([-1], 0.0, 0))
        assert compiler_runs(engine) == (1, 0)
        before = engine.stats().compile_seconds
        # what the compiler took for fixed is another number, and another program is recorded
        denoiser.pitch = 2.0
        drawn = engine.draw(task_of("euler", nfe=4), clips([-1], 0.0, 0))
        assert compiler_runs(engine) == (2, 1)
        assert engine.stats().compile_seconds > before
        expected = engine_of("eager", denoiser).draw(task_of("euler", nfe=4), clips([-1], 0.0, 0))
        torch.testing.assert_close(drawn.outputs[0], expected.outputs[0], rtol=1e-4, atol=1e-4)

    def test_deterministic_clips_depend_on_themselves_alone(self):
        task, batch = task_of("dpmpp_2m_sde"), clips([1, -1, 3], 2.0, 3)
        alone = engine_of("compile", deterministic=True)
        expected = [alone.draw(task, batch[i : i + 1]).outputs for i in range(3)]
        engine = engine_of("compiled-graphs", deterministic=True)
        for order in ([0, 1, 2], [2, 0], [1]):
            mixed = Clips(*([values[i] for i in order] for values in columns(batch)))
            for slot, i in enumerate(order):
                for output, one in zip(engine.draw(task, mixed).outputs, expected[i], strict=True):
                    assert torch.equal(output[slot], one[0])
        # clips of one, guided and not
        assert compiler_runs(engine) == (2, 0)

    def test_inference_mode_of_a_caller_changes_nothing(self):
        engine, task, batch = engine_of("compiled-graphs"), task_of("euler"), clips([1], 2.0, 0)
        with torch.inference_mode():
            first = engine.draw(task, batch).outputs[0]
        assert torch.equal(engine.draw(task, batch).outputs[0], first)
        assert not first.is_inference()
        assert (compiler_runs(engine), engine.stats().recorded) == ((2, 0), 1)

    def test_after_close_nothing_is_left(self):
        engine, task = engine_of("compiled-graphs"), task_of("euler")
        engine.draw(task, clips([-1], 0.0, 0))
        engine.close()
        assert engine.stats().programs == 0
        assert compiler_runs(engine) == (1, 0)
        with pytest.raises(RuntimeError, match="this engine is closed"):
            engine.draw(task, clips([-1], 0.0, 0))

    def test_a_cpu_has_no_graphs(self):
        model = Model(Little(), lambda x0: (x0,), SHAPE, CPU)
        message = r'"compiled-graphs" needs a CUDA device, not cpu; choose "eager" or "compile"'
        with pytest.raises(ValueError, match=message):
            Engine(model, Options(mode="compiled-graphs"))


@pytest.mark.parametrize("mode", ["compile", "compiled-graphs"])
def test_memory_that_the_compiler_lacks_splits_the_batch(monkeypatch, mode):
    from torch._inductor import compile_fx

    compile_all = compile_fx.compile_fx

    def compile_small(graph, inputs, **options):
        if any(t.ndim == 4 and len(t) > 1 for t in inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compile_all(graph, inputs, **options)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_small)
    engine, task, batch = engine_of(mode), task_of("euler"), clips([-1, -1], 0.0, 3)
    drawn = engine.draw(task, batch)
    assert engine.stats().splits == 1
    expected = engine_of("eager").draw(task, batch).outputs[0]
    torch.testing.assert_close(drawn.outputs[0], expected, rtol=1e-4, atol=1e-4)


def columns(batch):
    return batch.labels, batch.gammas, batch.seeds, batch.numbers


@pytest.mark.slow
def test_a_warm_pipeline_leaves_nothing_to_the_compiler(preset):
    pipe = Pipeline.from_pretrained(preset, engine=Options(mode="compile", buckets=(1,)))
    pipe.warmup()
    with torch.compiler.set_stance("fail_on_recompile"):
        for label in (pipe.labels[0], None):
            pipe.sample(label, nfe=3)
    # guided and not
    assert compiler_runs(pipe.engine) == (2, 0)
