"""Launches and passes of the eager operations, counted while they run."""

import pytest
import torch
import torch.nn.functional as F
from fastscore_kernels import reference, traffic
from torch.utils._python_dispatch import TorchDispatchMode

B, C, H, W = 2, 16, 8, 6
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts operations that compute, and the bytes of activations that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        if name not in VIEWS and not name.startswith("empty"):
            self.names.append(name)
        return op(*args, **(kwargs or {}))


def launches(run) -> list[str]:
    with torch.no_grad(), Counter() as counter:
        run()
    return counter.names


def last(channels: int = C) -> torch.Tensor:
    return torch.randn(B, channels, H, W).contiguous(memory_format=torch.channels_last)


def test_norm_act():
    x, weight, film = last(), torch.ones(C), torch.randn(B, 2 * C)
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    found = launches(lambda: F.silu(F.group_norm(x, 4, weight, weight) * (1 + scale) + shift))
    assert len(found) == traffic.norm_act(B, C, H * W, 4).launches_eager, found
    found = launches(lambda: F.silu(F.group_norm(x, 4, weight, weight)))
    assert len(found) == traffic.norm_act(B, C, H * W, 4, film=False).launches_eager, found


def test_norm_act_backward():
    x, weight = last().requires_grad_(), torch.ones(C)
    scale, shift = torch.randn(B, 2 * C, 1, 1).chunk(2, dim=1)
    y = F.silu(F.group_norm(x, 4, weight, weight) * (1 + scale) + shift)
    grad = torch.randn_like(y)
    with Counter() as counter:
        torch.autograd.grad(y, x, grad)
    expected = traffic.norm_act_backward(B, C, H * W, 4).launches_eager
    assert len(counter.names) == expected, counter.names


def test_tap_norm():
    feature, gradient, p = last(), last(), torch.ones(C)
    found = launches(lambda: reference.tap_norm(feature, gradient, 4, p, p, p, p, 1e-5))
    assert len(found) == traffic.tap_norm(B, C, H * W, 4).launches_eager, found


@pytest.mark.parametrize("spatial", [False, True])
def test_tap_fuse(spatial):
    q, first, second = last(), last(2 * C), last(2 * C)
    found = launches(lambda: reference.tap_fuse(q, first, second, 2, spatial))
    assert len(found) == traffic.tap_fuse(B, C, H * W, 4, spatial=spatial).launches_eager, found


@pytest.mark.parametrize("guided", [False, True])
def test_solver_step(guided):
    x, raw, old, noise = (torch.randn(B, 1, H, W) for _ in range(4))
    guidance = raw if guided else None
    coefficients = torch.randn(B, 7)
    found = launches(
        lambda: reference.solver_step(x, raw, guidance, None, old, coefficients, noise)
    )
    assert len(found) == traffic.solver_step(B, H * W, 4, guided).launches_eager, found


def test_bytes_by_hand():
    """fp32 [2, 16, 48]: 6144 bytes a pass; the input once and the output once, at least."""
    moved = traffic.norm_act(2, 16, 48, 4)
    assert (moved.must, moved.fused, moved.eager) == (2 * 6144, 3 * 6144, 9 * 6144)
    assert traffic.norm_act_backward(2, 16, 48, 4).must == 3 * 6144
    assert traffic.tap_norm(2, 16, 48, 4).must == 4 * 6144
    assert traffic.tap_fuse(2, 16, 48, 4).must == 6 * 6144
    # fp32 state in and out with x0 and old, bf16 raw and guidance
    assert traffic.solver_step(2, 768, 2).must == 4 * 6144 + 2 * 3072
    for moved in (
        traffic.norm_act(1, 8, 6, 2),
        traffic.norm_act_backward(1, 8, 6, 2),
        traffic.tap_norm(1, 8, 6, 2),
        traffic.tap_fuse(1, 8, 6, 2),
        traffic.solver_step(1, 48, 2),
    ):
        assert moved.must <= moved.fused < moved.eager
        assert moved.describe()["launches_fused"] == 1
