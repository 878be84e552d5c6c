"""What a device's errors mean, and switches that are put back."""

import pytest
import torch

from fastscore.devices import device_lost, fp32_products, one_order, out_of_memory
from fastscore.engine import GraphPool

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [CUDA]: misaligned address",
        "CUDA error: unspecified launch failure",
        "CUDA error: an illegal instruction was encountered",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_errors_that_end_a_device(words):
    assert device_lost(RuntimeError(words))
    assert not out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_errors_that_smaller_batches_cure(error):
    assert out_of_memory(error)
    assert not device_lost(error)


def test_other_errors_are_neither():
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device")
    assert not device_lost(error)
    assert not out_of_memory(error)


@pytest.mark.parametrize("tf32", [False, True])
def test_precisions_are_put_back(tf32):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision

    def use() -> None:
        with fp32_products(GPU, tf32):
            assert conv.fp32_precision == matmul.fp32_precision == ("tf32" if tf32 else "ieee")
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert (conv.fp32_precision, matmul.fp32_precision) == before


@pytest.mark.parametrize(
    ("device", "wanted", "expected"), [(GPU, True, True), (GPU, False, False), (CPU, True, False)]
)
def test_one_order_of_sums_is_asked_for_and_put_back(device, wanted, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)

    def use() -> None:
        with one_order(device, wanted):
            assert torch.backends.cudnn.deterministic is expected
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert not torch.backends.cudnn.deterministic


def test_a_pool_tells_what_its_own_segments_hold(monkeypatch):
    held = [
        {"total_size": size, "segment_pool_id": pool}
        for size, pool in ((2**21, (0, 7)), (2**20, [0, 7]), (9, (0, 0)), (5, (0, 8)))
    ]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda include_traces: held)
    assert GraphPool().reserved == 3 * 2**20
