"""CUDA graphs of the engine: the bits of direct drawing, no waiting, no memory asked for.

Graphs of the denoiser as it is, and of the compiled one.
"""

import threading

import pytest
import torch
from fastscore_kernels.gpu.launch import early
from small_presets import write_preset

from fastscore import Pipeline
from fastscore.engine import CudaGraphs, Engine, GraphPool, Model, Options
from fastscore.request import make_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LABELS = ["yes", None, "no", "up", "down"]
# a mode that records, and the one whose bits it has
DIRECT = {"graphs": "eager", "compiled-graphs": "compile"}


@pytest.fixture(autouse=True)
def _one_order(monkeypatch):
    """What is told apart here is not what cuDNN adds up in another order from call to call."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("preset") / "small")


def pipeline(folder, **options):
    return Pipeline.from_pretrained(
        folder, device="cuda", backend="triton", engine=Options(**options)
    )


@pytest.fixture(scope="module", params=list(DIRECT))
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def direct(folder, mode):
    return pipeline(folder, mode=DIRECT[mode], buckets=(1, 2, 8))


@pytest.fixture(scope="module")
def graphs(folder, mode):
    return pipeline(folder, mode=mode, buckets=(1, 2, 8))


@pytest.fixture(scope="module")
def eager(folder):
    return pipeline(folder)


def asked_of(pipe, **options):
    return make_request(
        pipe.defaults, pipe.denoiser.sigma_range, pipe.labels, batch_size=8, **options
    )


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "unipc", "heun", "pc_vp"])
@pytest.mark.parametrize("watched", [False, True])
def test_replays_have_the_bits_of_direct_drawing(direct, graphs, sampler, watched):
    seen = []
    options = {"sampler": sampler, "nfe": 5, "batch_size": 8, "seed": 3}
    expected = direct.sample([*LABELS, None, "yes", "no"], **options)
    for _ in range(2):
        callback = seen.append if watched else None
        found = graphs.sample([*LABELS, None, "yes", "no"], callback=callback, **options)
        assert torch.equal(found.mels, expected.mels)
        assert torch.equal(found.waves, expected.waves)
    assert bool(seen) == watched
    # labels, samplers and programs are many, and none of them compiles anything anew
    assert graphs.stats()["recompilations"] == direct.stats()["recompilations"] == 0


def test_kernels_that_begin_before_the_last_has_ended_give_the_same_bits(folder, direct, mode):
    if mode != "graphs" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("only our own launches, on chips from sm_90, can begin early")
    asked = [{"labels": [*LABELS, None, "yes", "no"], "nfe": 5, "seed": s} for s in range(20)]
    expected = [direct.sample(batch_size=8, **one) for one in asked]
    with early(True):
        pipe = pipeline(folder, mode=mode, buckets=(8,))
        found = [pipe.sample(batch_size=8, **one) for one in asked]
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.mels, b.mels)
        assert torch.equal(a.waves, b.waves)


def test_compiled_clips_are_close_to_eager_ones(eager, direct, graphs):
    options = {"sampler": "dpmpp_2m_sde", "nfe": 5, "batch_size": 8, "seed": 3}
    labels = [*LABELS, None, "yes", "no"]
    expected = eager.sample(labels, **options).mels
    for pipe in (direct, graphs):
        found = pipe.sample(labels, **options).mels
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_deterministic_clips_have_one_set_of_bits(folder, mode, direct, monkeypatch):
    alone = torch.cat([direct.sample(k, first=i, nfe=4).waves for i, k in enumerate(LABELS)])
    # a deterministic engine asks for it by itself
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    exact = pipeline(folder, mode=mode, deterministic=True)
    for size in (1, 3, 8):
        assert torch.equal(exact.sample(LABELS, nfe=4, batch_size=size).waves, alone)


def test_a_replay_reads_nothing_of_the_last_one(folder, mode):
    pipe = pipeline(folder, mode=mode, buckets=(2,))
    first = pipe.sample(["yes", None], nfe=4, batch_size=2)
    for program in pipe.engine._programs._programs.values():
        for t in (*program.recorded.outputs, *program.buffers.values()):
            t.fill_(torch.nan if t.is_floating_point() else 0)
    assert torch.equal(pipe.sample(["yes", None], nfe=4, batch_size=2).waves, first.waves)


def test_steady_state_waits_for_nothing_and_allocates_nothing(graphs):
    asked = asked_of(graphs, labels=["yes", None], nfe=5)
    batch = asked.clips().tensors(2)
    runner = graphs.engine._runner
    with torch.no_grad():
        runner.finish(runner.draw(asked.task, batch, True, None))
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        replays = graphs.stats()["replays"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                runner.finish(runner.draw(asked.task, batch, True, None))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    # a trajectory with its vocoder is one replay
    assert graphs.stats()["replays"] == replays + 20


def test_warming_up_leaves_nothing_to_record_or_compile(folder, mode):
    pipe = pipeline(folder, mode=mode, buckets=(1, 2, 8))
    took = pipe.warmup((1, 2, 8))
    assert took["programs"] == 6
    assert 0 < took["record_seconds"] <= took["seconds"]
    assert took["graph_memory"] > 0
    compiled = mode == "compiled-graphs"
    assert (took["compile_seconds"] > 0) == compiled
    before = pipe.stats()
    for count in (1, 2, 3):
        pipe.sample(LABELS[:count], batch_size=8)
    after = pipe.stats()
    assert after["recorded"] == before["recorded"] == 6
    assert after["compilations"] == before["compilations"] == 6 * compiled
    assert after["recompilations"] == 0
    pipe.close()
    assert pipe.stats()["programs"] == 0


def test_other_threads_may_use_the_device_while_the_compiler_runs(folder, mode):
    """Autotuning waits for the device in the warm-up runs; a capture is of one thread alone."""
    pipe, stop, failed = pipeline(folder, mode=mode, buckets=(1,)), threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                torch.ones(64, device="cuda").sum().item()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        first = pipe.sample("yes", nfe=3).waves
    finally:
        stop.set()
        thread.join()
    assert failed == []
    assert torch.equal(pipe.sample("yes", nfe=3).waves, first)


def test_engines_do_not_share_a_pool(eager, mode):
    pool = GraphPool()
    shape = (1, eager.mel_config.n_mels, eager.frames)
    model = Model(eager.denoiser, eager.finish, shape, eager.device, eager.backend)
    engine = Engine(model, Options(mode=mode), recorder=CudaGraphs(eager.device, pool), pool=pool)
    with pytest.raises(ValueError, match="belongs to another engine"):
        Engine(model, Options(mode=mode), pool=pool)
    engine.close()


def test_tf32_is_stated_and_left_as_it_was(folder):
    before = torch.backends.cudnn.conv.fp32_precision
    for precision in ("fp32", "tf32"):
        pipe = Pipeline.from_pretrained(folder, device="cuda", precision=precision)
        assert pipe.describe()["precision"] == precision
        pipe.sample("yes", nfe=2)
        assert torch.backends.cudnn.conv.fp32_precision == before
