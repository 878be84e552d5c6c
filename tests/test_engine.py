"""The engine: programs, buckets, splitting, and the same bits however a clip is drawn."""

import gc
import multiprocessing
import threading
from dataclasses import replace

import pytest
import torch
from small_models import small_denoiser

from fastscore.devices import DeviceLostError
from fastscore.engine import Clips, Engine, GraphPool, Model, Options, Rerun, Task
from fastscore.inpaint import Inpainting
from fastscore.samplers import SAMPLERS, SamplingCancelledError, schedule_for

SHAPE = (1, 16, 24)
CLIPS = Clips(
    labels=[0, -1, 2, 1, 3, -1, 0],
    gammas=[2.0, 1.0, 0.5, 3.0, 1.5, 0.0, 9.0],
    seeds=[5, 5, 2**62, 0, 7, 8, 9],
    numbers=[0, 1, 0, 3, 2**31, 5, 6],
)


@pytest.fixture(scope="module")
def denoiser():
    return small_denoiser()


def finish(x0):
    return x0.mean(dim=(1, 2, 3)), torch.tanh(x0[:, 0, 0])


def model_of(denoise):
    return Model(denoise, finish, SHAPE, torch.device("cpu"))


def task_of(name, denoiser, nfe=7, **options):
    spec = SAMPLERS[name]
    return Task(spec, schedule_for(name, nfe, denoiser.sigma_range), options, (0.1, 9.0))


def engine_of(denoiser, recorder=None, **options):
    return Engine(model_of(denoiser), Options(**options), recorder=recorder)


class TestBits:
    @pytest.mark.parametrize("name", list(SAMPLERS))
    @pytest.mark.parametrize("watched", [False, True])
    def test_replayed_clips_have_the_bits_of_eager_ones(self, denoiser, name, watched):
        task = task_of(name, denoiser)
        eager = engine_of(denoiser).draw(task, CLIPS)
        seen = []
        engine = engine_of(denoiser, Rerun(), buckets=(7,))
        watch = (lambda *state: seen.append(state[:3])) if watched else None
        for _ in range(2):
            drawn = engine.draw(task, CLIPS, watch=watch)
            assert drawn.nfe == eager.nfe == task.nfe
            for one, two in zip(drawn.outputs, eager.outputs, strict=True):
                assert torch.equal(one, two)
        steps = len(task.sigmas) - 1
        assert seen == [(0, 7, step) for _ in range(2) for step in range(steps)] * watched

    def test_deterministic_clips_depend_on_themselves_alone(self, denoiser):
        task = task_of("dpmpp_2m_sde", denoiser)
        alone = [engine_of(denoiser).draw(task, CLIPS[i : i + 1]).outputs for i in range(7)]
        for recorder in (None, Rerun()):
            # no bucket of one: a clip must not be filled up all the same
            engine = engine_of(denoiser, recorder, deterministic=True, buckets=(2, 8))
            for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 5, 0, 3], [4]):
                mixed = Clips(*([values[i] for i in order] for values in vars_of(CLIPS)))
                drawn = engine.draw(task, mixed, max_batch=3)
                for slot, i in enumerate(order):
                    for output, expected in zip(drawn.outputs, alone[i], strict=True):
                        assert torch.equal(output[slot], expected[0])

    def test_batches_differ_by_rounding_only(self, denoiser):
        task = task_of("dpmpp_2m_sde", denoiser)
        one = engine_of(denoiser).draw(task, CLIPS, max_batch=1).outputs[0]
        for size in (2, 3, 7):
            many = engine_of(denoiser).draw(task, CLIPS, max_batch=size).outputs[0]
            assert (many - one).abs().max() < 1e-3 * one.std()

    def test_filling_up_changes_nothing_that_is_kept(self, denoiser):
        task = task_of("euler_ancestral", denoiser)
        five = CLIPS[:5]
        filled = engine_of(denoiser, Rerun(), buckets=(8,)).draw(task, five).outputs
        repeated = Clips(*(list(values) + [values[-1]] * 3 for values in vars_of(five)))
        whole = engine_of(denoiser).draw(task, repeated).outputs
        for one, two in zip(filled, whole, strict=True):
            assert torch.equal(one, two[:5])

    def test_replays_read_nothing_of_the_last_one(self, denoiser):
        """Everything a program computed before is poisoned; nothing of it comes out."""
        task = task_of("dpmpp_2m", denoiser)
        engine = engine_of(denoiser, Rerun(), buckets=(7,))
        first = engine.draw(task, CLIPS).outputs
        for program in engine._programs._programs.values():
            for output in program.recorded.outputs:
                output.fill_(torch.nan)
            for buffer in program.buffers.values():
                buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
        for one, two in zip(engine.draw(task, CLIPS).outputs, first, strict=True):
            assert torch.equal(one, two)


def vars_of(clips):
    return clips.labels, clips.gammas, clips.seeds, clips.numbers


class TestInpainting:
    @pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde", "heun", "unipc"])
    @pytest.mark.parametrize("rows", [1, 7])
    def test_what_is_known_comes_out(self, denoiser, name, rows):
        rng = torch.Generator().manual_seed(3)
        known = torch.randn(rows, *SHAPE, generator=rng)
        mask = torch.rand(rows, *SHAPE, generator=rng) < 0.4
        task = task_of(name, denoiser)
        clips = replace(CLIPS, inpainting=Inpainting(known, mask))
        shown = []
        results = [
            engine.draw(task, clips, watch=watch, max_batch=4).outputs[0]
            for engine in (engine_of(denoiser), engine_of(denoiser, Rerun(), buckets=(3, 4)))
            for watch in (None, lambda start, n, step, x, x0: shown.append((start, n, x0.clone())))
        ]
        for result in results:
            assert torch.equal(result, results[0])
            assert torch.equal(
                result[mask.expand(7, -1, -1, -1)],
                known.expand(7, -1, -1, -1)[mask.expand(7, -1, -1, -1)],
            )
        for start, count, x0 in shown:
            where = mask.expand(7, -1, -1, -1)[start : start + count]
            assert torch.equal(x0[where], known.expand(7, -1, -1, -1)[start : start + count][where])
        free = engine_of(denoiser).draw(task, CLIPS).outputs[0]
        assert not torch.allclose(
            results[0][~mask.expand(7, -1, -1, -1)], free[~mask.expand(7, -1, -1, -1)], atol=1e-3
        )


class TestPrograms:
    def test_numbers_never_make_another_program(self, denoiser):
        """Labels, strengths, seeds, levels and samplers of one shape share a program."""
        engine = engine_of(denoiser, Rerun(), buckets=(2,))
        for name in ("euler", "dpmpp_2m", "euler"):
            for label, gamma, seed in ((0, 1.0, 3), (2, 7.5, 4)):
                clips = Clips([label, 1], [gamma, 1.0], [seed, 1], [0, 0])
                engine.draw(replace(task_of(name, denoiser), interval=(0.0, 100.0)), clips)
        stats = engine.stats()
        # euler looks back at no answer, dpmpp_2m at one
        assert (stats.recorded, stats.replays, stats.programs) == (2, 6, 2)
        levels = schedule_for("euler", 7, denoiser.sigma_range, sigma_max=5.0)
        engine.draw(replace(task_of("euler", denoiser), sigmas=levels, interval=(0, 100)), clips)
        assert engine.stats().recorded == 2

    def test_a_whole_trajectory_is_one_replay(self, denoiser):
        engine = engine_of(denoiser, Rerun(), buckets=(2, 4))
        task = task_of("dpmpp_2m_sde", denoiser)
        for count in (1, 2, 3, 4, 5):
            engine.draw(task, CLIPS[:count])
        stats = engine.stats()
        assert stats.replays == 6  # five clips take two batches
        assert stats.recorded == 2
        assert (stats.batches, stats.clips) == (6, 15)
        assert stats.evaluations == 15 * task.nfe
        assert stats.record_seconds > 0

    def test_unguided_clips_have_their_own(self, denoiser):
        labels = []

        def spy(x, sigma, label, gamma):
            labels.append(None if label is None else label.tolist())
            return denoiser(x, sigma, label, gamma)

        engine = Engine(model_of(spy), Options(buckets=(1,)), recorder=Rerun())
        task = task_of("euler", denoiser)
        engine.draw(task, CLIPS[1:2])
        assert set(map(str, labels)) == {"None"}
        engine.draw(task, CLIPS[0:1])
        assert "[0]" in map(str, labels)
        assert engine.stats().recorded == 2

    def test_those_used_last_are_kept(self, denoiser):
        engine = engine_of(denoiser, Rerun(), max_graphs=2, buckets=(1, 2, 4))
        task = task_of("euler", denoiser, nfe=3)
        expected = {n: engine_of(denoiser).draw(task, CLIPS[:n]).outputs[0] for n in (1, 2, 4)}
        for count in (1, 2, 1, 4, 1):
            drawn = engine.draw(task, CLIPS[:count])
            assert torch.equal(drawn.outputs[0], expected[count])
        assert engine.stats().recorded == 3
        assert (engine.stats().programs, engine.stats().evicted) == (2, 1)
        engine.draw(task, CLIPS[:2])
        assert (engine.stats().recorded, engine.stats().evicted) == (4, 2)

    def test_warming_up_records_all_that_is_needed(self, denoiser):
        engine = engine_of(denoiser, Rerun(), buckets=(1, 2, 4))
        task = task_of("dpmpp_2m_sde", denoiser)
        took = engine.warm_up(task, (1, 2, 4))
        assert took["programs"] == engine.stats().recorded == 6
        assert 0 < took["record_seconds"] <= took["seconds"]
        for count in (1, 2, 3, 4):
            engine.draw(task, CLIPS[:count])
            engine.draw(task, CLIPS[1:2])
        assert engine.stats().recorded == 6

    def test_outputs_survive_the_next_replay(self, denoiser):
        engine = engine_of(denoiser, Rerun(), buckets=(1,))
        task = task_of("euler", denoiser)
        first = engine.draw(task, CLIPS[:1]).outputs[0]
        kept = first.clone()
        engine.draw(task, CLIPS[2:3])
        assert torch.equal(first, kept)


class TestThreads:
    def test_results_are_not_crossed(self, denoiser):
        engine = engine_of(denoiser, Rerun(), buckets=(1,))
        task = task_of("dpmpp_2m_sde", denoiser, nfe=3)
        alone = [engine.draw(task, CLIPS[i : i + 1]).outputs[0] for i in range(7)]
        wrong, done = [], []

        def work(offset):
            for k in range(14):
                i = (offset + k) % 7
                found = engine.draw(task, CLIPS[i : i + 1]).outputs[0]
                (done if torch.equal(found, alone[i]) else wrong).append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(done), wrong) == (84, [])

    def test_a_cancelled_batch_leaves_the_engine_usable(self, denoiser):
        task = task_of("euler", denoiser)
        for recorder in (None, Rerun()):
            engine = engine_of(denoiser, recorder)

            def cancel(start, count, step, x, x0):
                if step == 1:
                    raise SamplingCancelledError(step, 2)

            with pytest.raises(SamplingCancelledError):
                engine.draw(task, CLIPS, watch=cancel)
            assert torch.isfinite(engine.draw(task, CLIPS).outputs[0]).all()


def fork_and_draw(engine, task, pipe):
    try:
        engine.draw(task, CLIPS[:1])
        pipe.send("drew")
    except RuntimeError as error:
        pipe.send(str(error))


class TestBadInput:
    def test_graphs_need_a_device_that_has_them(self, denoiser):
        with pytest.raises(ValueError, match=r'"graphs" needs a CUDA device, not cpu; choose'):
            engine_of(denoiser, mode="graphs")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "fast"}, "mode 'fast' is unknown; choose one of eager, compile, graphs"),
            ({"buckets": ()}, "must be different batch sizes of at least 1"),
            ({"buckets": (2, 2)}, "must be different batch sizes"),
            ({"buckets": (0, 2)}, "at least 1"),
            ({"max_graphs": 0}, "max_graphs 0 must be at least 1"),
        ],
    )
    def test_options(self, denoiser, options, message):
        with pytest.raises(ValueError, match=message):
            engine_of(denoiser, **options)

    def test_two_engines_on_one_pool(self, denoiser):
        pool = GraphPool()
        first = Engine(model_of(denoiser), pool=pool)
        with pytest.raises(ValueError, match="belongs to another engine"):
            Engine(model_of(denoiser), pool=pool)
        first.close()
        second = Engine(model_of(denoiser), pool=pool)
        del second
        gc.collect()
        Engine(model_of(denoiser), pool=pool)

    def test_use_after_close(self, denoiser):
        engine = engine_of(denoiser, Rerun())
        task = task_of("euler", denoiser)
        engine.draw(task, CLIPS[:1])
        engine.close()
        engine.close()
        assert engine.stats().programs == 0
        with pytest.raises(RuntimeError, match="this engine is closed; make another one"):
            engine.draw(task, CLIPS[:1])

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_split(self, denoiser, error):
        sizes = []

        def narrow(x, sigma, label, gamma):
            sizes.append(len(x))
            if len(x) > 2:
                raise error
            return denoiser(x, sigma, label, gamma)

        task = task_of("euler", denoiser, nfe=2)
        for recorder in (None, Rerun()):
            sizes.clear()
            engine = Engine(model_of(narrow), Options(), recorder=recorder)
            drawn = engine.draw(task, CLIPS)
            expected = engine_of(denoiser).draw(task, CLIPS).outputs[0]
            assert torch.allclose(drawn.outputs[0], expected, atol=1e-4)
            assert engine.stats().splits >= 1
            assert max(sizes) > 2
            sizes.clear()
            engine.draw(task, CLIPS)
            assert max(sizes) <= 2  # it is remembered

    def test_memory_for_not_even_one(self, denoiser):
        def full(x, sigma, label, gamma):
            raise torch.OutOfMemoryError("CUDA out of memory")

        engine = Engine(model_of(full))
        with pytest.raises(MemoryError, match="not memory enough for one clip"):
            engine.draw(task_of("euler", denoiser), CLIPS[:1])

    def test_a_lost_device_is_lost_for_good(self, denoiser):
        failing = [True]

        def dies(x, sigma, label, gamma):
            if failing.pop() if failing else False:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            return denoiser(x, sigma, label, gamma)

        engine = Engine(model_of(dies))
        for _ in range(2):
            with pytest.raises(DeviceLostError, match=r"cpu was lost .*; .* start a new process"):
                engine.draw(task_of("euler", denoiser), CLIPS[:1])

    def test_an_error_of_the_model_is_passed_on(self, denoiser):
        def wrong(x, sigma, label, gamma):
            return x[:, :, 1:]

        with pytest.raises(ValueError, match="must keep shape and dtype"):
            Engine(model_of(wrong)).draw(task_of("euler", denoiser), CLIPS)

    def test_a_fork_is_told(self, denoiser):
        engine, task = engine_of(denoiser), task_of("euler", denoiser)
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        child = context.Process(target=fork_and_draw, args=(engine, task, there))
        child.start()
        assert here.poll(30)
        message = here.recv()
        child.join()
        assert "this is its fork" in message
        assert "spawn" in message
