"""Block sizes and splits of the normalising kernels: the deterministic rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fastscore_kernels.gpu.launch import ceil_div, choose, device_of, is_last, power_of_two
from torch import Tensor

# bytes that memory moves at least for one access
_SECTOR = 32
# bytes of the widest access of one thread
_WIDE = 16
# elements of one tile, and of the largest that a program keeps in registers
_TILE = 4096
_WHOLE = 16384
# a lone program reads this much before splitting its positions pays for a second launch
_SPLIT_ABOVE = 8192
_MAX_SPLITS = 128
# elements of a gradient tap that every program may read for itself
_LONE_TAP = 32768
_MAX_CHANNELS = 1024


@dataclass(frozen=True)
class NormPlan:
    """How one normalising operation is cut into programs.

    bundle groups and, with splits > 1, chunk positions a program; whole: a program keeps all its
    numbers in registers.
    """

    bundle: int
    splits: int
    chunk: int
    whole: bool
    block_n: int
    block_c: int
    block_g: int
    block_s: int
    warps: int
    all_groups: int
    flat: int = 4096


def plan_norm(op: str, x: Tensor, groups: int, rows: int) -> NormPlan:
    """Plan for x [B, C, H, W] in ``groups`` groups, with ``rows`` samples to work on."""
    shape, device = _shape(x, rows, groups), device_of(x)
    rule = norm_rule(op, shape, device.multiprocessors)
    return _checked(choose(op, device, shape, rule), shape)


def plan_taps(op: str, x: Tensor, groups: int, split: bool | None = None) -> NormPlan:
    """Plan for the taps x [B, C, H, W]; ``split`` forces two launches or one."""
    shape, device = _shape(x, int(x.shape[0]), groups), device_of(x)
    rule = taps_rule(shape, device.multiprocessors, split)
    return _checked(choose(op, device, shape, rule), shape)


def norm_rule(
    op: str, shape: Mapping[str, Any], multiprocessors: int, split: bool | None = None
) -> dict[str, int]:
    """Launch parameters of a norm of ``shape``, as a table's key has it.

    ``split`` forces two launches or one; None decides by how many programs keep a device busy.
    """
    groups, positions, last = shape["groups"], shape["positions"], bool(shape["last"])
    per_group = shape["channels"] // groups
    bundle = _narrow(groups, per_group, _itemsize(shape)) if last else 1
    programs = shape["rows"] * (groups // bundle)
    if split is None:
        large = bundle * per_group * positions > _SPLIT_ABOVE
        split = programs < multiprocessors and large
    if split and last:
        bundle = _wide(groups, per_group)
    if split:
        rule = _split_rule(positions, per_group * bundle, last)
        bundles = shape["rows"] * (groups // bundle)
        rule["splits"] = ceil_div(2 * multiprocessors, bundles)
    else:
        # backward has two inputs and two sums an element: half as many elements a thread
        backward = op == "norm_act_backward"
        whole = _WHOLE // 2 if backward else _WHOLE
        rule = _whole_rule(positions, per_group * bundle, last, whole)
        rule["warps"] = min(16, rule["warps"] * (2 if backward else 1))
    rule["bundle"] = bundle
    return rule


def taps_rule(
    shape: Mapping[str, Any], multiprocessors: int, split: bool | None = None
) -> dict[str, int]:
    """Launch parameters for the taps of ``shape``; ``split`` forces two launches or one.

    In one launch every program reads the whole gradient: for samples so small that this costs less
    than a launch.
    """
    groups, positions, batch = shape["groups"], shape["positions"], shape["rows"]
    per_group = shape["channels"] // groups
    if split is None:
        split = shape["channels"] * positions > _LONE_TAP
    if split:
        bundle = _wide(groups, per_group)
        # half a tile of fp32 numbers takes the registers of a whole one when squares are fp64
        rule = _split_rule(positions, per_group * bundle, bool(shape["last"]), _TILE // 2)
        rule["warps"] = 8
        # every later program combines the moments of all stretches, in fp64
        most = ceil_div(2 * multiprocessors, batch * (groups // bundle))
        rule["splits"] = min(64, most)
    else:
        # taps are written with channels side by side, whatever they are read from
        bundle = _narrow(groups, per_group, _itemsize(shape))
        rule = _whole_rule(positions, per_group * bundle, True)
        rule["warps"] = min(16, 2 * rule["warps"])
    rule["bundle"] = bundle
    return rule


def _shape(x: Tensor, rows: int, groups: int) -> dict[str, int | str]:
    """Sizes that a table's key is made of."""
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "rows": int(rows),
        "channels": int(x.shape[1]),
        "positions": int(x.shape[2] * x.shape[3]),
        "groups": groups,
        "last": int(is_last(x)),
    }


def _itemsize(shape: Mapping[str, Any]) -> int:
    return getattr(torch, shape["dtype"]).itemsize


def _narrow(groups: int, per_group: int, itemsize: int) -> int:
    """Fewest groups whose channels at one position fill a sector and begin on a wide access."""
    divisors = [d for d in range(1, groups + 1) if groups % d == 0]
    sizes = {d: d * per_group * itemsize for d in divisors}
    return next((d for d, n in sizes.items() if n >= _SECTOR and n % _WIDE == 0), groups)


def _wide(groups: int, per_group: int) -> int:
    """Most groups whose channels fit in one tile."""
    divisors = [d for d in range(groups, 0, -1) if groups % d == 0]
    return next((d for d in divisors if d * per_group <= _MAX_CHANNELS), 1)


def _split_rule(positions: int, channels: int, last: bool, tile: int = _TILE) -> dict[str, int]:
    block_n = max(1, tile // power_of_two(channels))
    if not last:
        block_n = max(64, block_n)
    return {"block_n": min(block_n, power_of_two(positions)), "warps": 4, "splits": 1}


def _whole_rule(positions: int, channels: int, last: bool, whole: int = _WHOLE) -> dict[str, int]:
    block_c, block_n = power_of_two(channels), power_of_two(positions)
    if block_c * block_n > whole:
        block_n = max(1, min(block_n, 2 * _TILE // block_c))
        if not last:
            block_n = min(power_of_two(positions), max(64, block_n))
    warps = max(1, min(16, block_c * block_n // 1024))
    return {"block_n": block_n, "warps": warps, "splits": 1}


def _checked(chosen: dict[str, int], shape: Mapping[str, Any]) -> NormPlan:
    channels, groups, positions = shape["channels"], shape["groups"], shape["positions"]
    bundle, block_n = chosen["bundle"], power_of_two(max(1, chosen["block_n"]))
    if bundle < 1 or groups % bundle:
        raise ValueError(f"bundle {bundle} must divide {groups} groups")
    most = max(1, min(chosen["splits"], _MAX_SPLITS, ceil_div(positions, block_n)))
    # whole tiles a stretch, then only as many stretches as hold a position
    chunk = ceil_div(ceil_div(positions, most), block_n) * block_n
    splits = ceil_div(positions, chunk)
    return NormPlan(
        bundle=bundle,
        splits=splits,
        chunk=chunk,
        whole=splits == 1 and block_n >= positions,
        block_n=block_n,
        block_c=power_of_two(bundle * (channels // groups)),
        block_g=power_of_two(bundle),
        block_s=power_of_two(splits),
        warps=chosen["warps"],
        all_groups=power_of_two(groups),
    )


__all__ = ["NormPlan", "norm_rule", "plan_norm", "plan_taps", "taps_rule"]
