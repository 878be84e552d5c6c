"""Peak memory against allocations of known size."""

import json
import os
import resource

import pytest
import torch
from fastscore_kernels import cpu
from kernel_cases import native_or_skip
from small_models import inputs, small_denoiser
from torch import nn

from fastscore.layers import set_backend
from fastscore.measure import memory
from fastscore.packed import pack

MIB = 2**20
# the kernel adds up resident pages in lots: 64 to a thread (SPLIT_RSS_COUNTING), or from Linux 6.2
# two for each CPU of the machine, on every CPU that the call has run on; a block of the heap begins
# in the middle of a page
CPUS = os.cpu_count() or 1
PAGES = (max(64, 2 * CPUS) * min(CPUS, 4) + 16) * resource.getpagesize()


def filled(mebibytes: int) -> torch.Tensor:
    """A tensor whose pages have been written to: pages that nobody touched are not resident."""
    return torch.ones(mebibytes * MIB // 4)


def empty(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def held_then_temporary() -> torch.Tensor:
    held = filled(64)
    filled(32)
    return held


def one_after_the_other() -> None:
    filled(16)
    filled(8)


def make() -> memory.Call:
    """For another process, which imports this module."""
    return held_then_temporary


def fail() -> memory.Call:
    raise RuntimeError("no such model")


def die() -> memory.Call:
    os._exit(9)


def test_tensors_are_counted_to_the_byte():
    assert memory.tensor_peak(held_then_temporary) == {
        "tensor_peak": 96 * MIB,
        "tensor_held": 64 * MIB,
    }
    assert memory.tensor_peak(one_after_the_other) == {"tensor_peak": 16 * MIB, "tensor_held": 0}
    found = memory.tensor_peak(lambda: empty(12345), warm=0)
    assert found == {"tensor_peak": 12345, "tensor_held": 12345}


def test_what_a_call_frees_before_it_allocates_is_seen():
    kept = []

    def replace() -> None:
        kept.clear()
        kept.append(empty(MIB))

    assert memory.tensor_peak(replace) == {"tensor_peak": 0, "tensor_held": 0}
    # nothing before it: the first of a process
    kept.clear()
    assert memory.tensor_peak(replace, warm=0)["tensor_peak"] == MIB


def test_resident_pages_of_a_known_allocation():
    found = memory.peak(held_then_temporary)
    if "none" in found["rss"]:
        pytest.skip(found["rss"]["none"])
    assert found["rss"]["growth"] == pytest.approx(96 * MIB, abs=PAGES)
    assert found["rss"]["peak"] == found["rss"]["before"] + found["rss"]["growth"]
    # an earlier peak does not count; whether the second gets the first one's pages is the heap's
    # affair, which depends on what has been freed before
    growth = memory.resident_peak(one_after_the_other)["growth"]
    assert 16 * MIB - PAGES <= growth <= 24 * MIB + PAGES
    json.dumps(found)


def test_a_system_that_cannot_reset_the_peak_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear_refs")
    assert "cannot be reset" in memory.resident_peak(one_after_the_other)["none"]


def test_in_a_process_of_its_own():
    found = memory.in_child(make, threads=1)
    assert found["tensor_peak"] == 96 * MIB
    if "none" not in found["rss"]:
        assert found["rss"]["growth"] == pytest.approx(96 * MIB, abs=PAGES)
        assert found["made"] <= found["rss"]["peak"]


def test_what_fails_in_another_process_is_told():
    class Pipe:
        def send(self, found):
            self.found = found

        def close(self):
            pass

    pipe = Pipe()
    memory._child(pipe, fail, (), "cpu", 1, None)
    assert pipe.found == {"none": "RuntimeError: no such model"}
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        memory.in_child(lambda: None)


@pytest.mark.slow
def test_a_process_that_was_killed_or_hangs_gives_a_reason():
    assert "ended with code 9" in memory.in_child(die)["none"]
    assert "longer than 0.1 s" in memory.in_child(make, timeout=0.1)["none"]


def test_weights_by_hand():
    first, second = nn.Linear(10, 20), nn.Linear(10, 20, bias=False)
    second.weight = first.weight
    norm = nn.BatchNorm1d(4)
    found = memory.weights(first, second, norm)
    assert found["parameters"] == 4 * (10 * 20 + 20 + 4 + 4)
    # two running statistics and a count of 8 bytes
    assert found["buffers"] == 4 * (4 + 4) + 8
    assert found["packed"] == 0
    assert found["total"] == found["parameters"] + found["buffers"]


def test_packed_weights_and_the_path_that_uses_them():
    native_or_skip()
    denoiser = small_denoiser()
    set_backend(denoiser, "native")
    head = denoiser.classifier.head
    pack(denoiser)
    sizes = cpu.linear_size(24, 4) + cpu.linear_size(4, 24)
    assert memory.weights(head)["packed"] == 4 * sizes
    assert memory.weights(denoiser)["packed"] > memory.weights(denoiser)["parameters"]
    taken = []
    prepared = denoiser.classifier.stages[1].down.prepared
    forward = prepared.forward
    prepared.forward = lambda *args: taken.append(1) or forward(*args)
    x, sigma = inputs(1)
    with torch.no_grad():
        found = memory.tensor_peak(lambda: denoiser(x, sigma))
    assert len(taken) == 2
    assert found["tensor_held"] == x.nbytes


def test_what_onednn_allocates_is_seen():
    """A weight laid out anew comes from the allocator that tensors come from."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    weight = torch.randn(128, 64, 3, 3)

    def reorder() -> torch.Tensor:
        geometry = ([1, 1], [1, 1], [1, 1], 1, [1, 64, 8, 8])
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry)

    found = memory.tensor_peak(reorder)
    assert found["tensor_held"] == torch.ops.mkldnn._nbytes(reorder()) >= weight.nbytes


def test_a_training_step_by_hand():
    net = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    x = torch.randn(8, 256)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    average = [net.weight.detach().clone(), net.weight]
    found = memory.training(step, [net], [optimizer], averages=average)
    assert found["weights"] == found["gradients"] == found["averages"] == 4 * 256**2
    # two moments, and the number of steps
    assert found["optimizer_state"] == 2 * 4 * 256**2 + 4
    # at its most while the new gradient is computed: the cotangent of the output, the loss, and
    # the cotangent of that; the old gradient has gone by then and does not count twice
    assert found["tensor_peak"] == 4 * 8 * 256 + 4 + 4
    assert found["total"] == 5 * 4 * 256**2 + 4 + found["tensor_peak"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_known_allocation_on_a_gpu():
    kept = []

    def call() -> None:
        kept.clear()
        kept.append(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"))
        torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")

    torch.cuda.init()
    found = memory.peak(call, "cuda", warm=0)
    assert found["tensor_peak"] == 96 * MIB
    assert found["tensor_held"] == 64 * MIB
    assert found["reserved_peak"] >= found["allocated_peak"] >= 96 * MIB
    before = memory.graph_pools()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.append(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"))
    assert memory.graph_pools()["allocated"] - before["allocated"] == 64 * MIB
    json.dumps(found)
