"""Launch parameters around what the rule chooses: few, each a step from it that may pay.

A step doubles or halves a block, warps, splits, or takes the other plan altogether: one launch for
two, moments on the way or before. What cannot run, or is no other launch, is named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fastscore_kernels.gpu.launch import Choice, ceil_div, power_of_two
from fastscore_kernels.gpu.plans import norm_rule, taps_rule

Plan = dict[str, int]
NORMS = ("norm_act", "norm_act_backward")
TAPS = ("tap_norm", "tap_path_moments")
# a tensor core takes no fewer rows and columns
_TENSOR_CORE = 16
# bounds by parameter, blocks of tensor-core kernels apart
_BOUNDS = {
    "warps": (1, 16),
    "stages": (1, 4),
    "quads": (32, 1024),
    "block": (64, 4096),
    "block_n": (1, 4096),
    "block_r": (1, 1024),
    "bundle": (1, 64),
}
# what a block of a parameter covers at most, by the name of its size in the key
_COVERS = {"block_n": "positions", "block_m": "positions", "block_k": "channels"}
# more stretches than these a launch never makes
_MOST_SPLITS = 128
_TILES = (_TENSOR_CORE, 128)
# numbers of a tile that a program of 16 warps can hold, and of a tile of queries and keys
_MOST_NUMBERS = 32768
_MOST_LOGITS = 128 * 64
# a thread's numbers of a tile: above, registers spill for certain
_MOST_A_THREAD = 128


def sizes(key: str) -> dict[str, int | str]:
    """The sizes that a table's key names."""
    pairs = (part.split("=") for part in key.split())
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def candidates(choice: Choice, multiprocessors: int) -> tuple[dict[str, Plan], dict[str, str]]:
    """Parameters by a name that tells the step, and steps that cannot run, with the reason."""
    rule = dict(choice.rule)
    valid: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    for plan in (*_steps(choice), *_other_plans(choice, multiprocessors), dict(choice.chosen)):
        if plan == rule or plan in valid.values():
            continue
        name = _name(plan, rule)
        why = obstacle(choice, plan)
        if why:
            refused[name] = why
        else:
            valid[name] = plan
    return valid, refused


def obstacle(choice: Choice, plan: Mapping[str, int]) -> str:
    """Why a plan cannot run, or is not worth it; "" where nothing is known against it."""
    shape = sizes(choice.key)
    # what the rule itself chose is taken as it is
    for name, value in plan.items():
        if value == choice.rule[name]:
            continue
        low, high = _bounds(choice.op, name)
        if not low <= value <= high:
            return f"{name} {value} is outside {low} .. {high}"
        covered = int(shape.get(_COVERS.get(name, ""), 65536))
        if value > max(_TENSOR_CORE, power_of_two(covered)):
            return f"{name} {value} is more than {covered} {_COVERS[name]} need"
    if choice.op in (*NORMS, *TAPS):
        if int(shape["groups"]) % plan["bundle"]:
            return f"bundle {plan['bundle']} does not divide {shape['groups']} groups"
        width = plan["bundle"] * int(shape["channels"]) // int(shape["groups"])
        return _too_large(power_of_two(width) * power_of_two(plan["block_n"]), plan["warps"])
    if "block_m" in plan and "block_n" in plan:
        logits = plan["block_m"] * plan["block_n"]
        if logits > _MOST_LOGITS:
            return f"{logits} logits a tile are above {_MOST_LOGITS}"
    return ""


def _too_large(numbers: int, warps: int) -> str:
    if numbers > _MOST_NUMBERS:
        return f"a tile of {numbers} numbers is above {_MOST_NUMBERS}"
    each = numbers // (32 * warps)
    if each > _MOST_A_THREAD:
        return f"{each} numbers a thread are above {_MOST_A_THREAD}"
    return ""


def _bounds(op: str, name: str) -> tuple[int, int]:
    products = op.endswith("_all") or op in ("tap_path_own", "tap_path_project", "tap_path_attend")
    if products and name.startswith("block_"):
        return _TILES
    # whether (known), and divisors, which are checked for themselves
    return _BOUNDS.get(name, (0, 65536))


def _steps(choice: Choice) -> Iterator[Plan]:
    """One parameter a step away, and a block together with its warps."""
    rule = dict(choice.rule)
    for name, value in rule.items():
        for other in _neighbours(name, value, choice):
            yield rule | {name: other}
    for name, value in rule.items():
        if name.startswith("block_") or name == "bundle":
            for other in _neighbours(name, value, choice):
                warps = 2 * rule["warps"] if other > value else rule["warps"] // 2
                yield rule | {name: other, "warps": warps}


def _neighbours(name: str, value: int, choice: Choice) -> Iterator[int]:
    if name == "known":
        yield 1 - value
    elif name == "stages":
        yield from (value - 1, value + 1)
    elif name == "bundle":
        groups = int(sizes(choice.key)["groups"])
        divisors = [d for d in range(1, groups + 1) if groups % d == 0]
        at = divisors.index(value)
        yield from divisors[max(0, at - 1) : at] + divisors[at + 1 : at + 2]
    elif name == "splits":
        # of one launch stretches make two, which is another plan
        if value > 1:
            made = _made(choice)
            yield from (n for n in (2 * made, made // 2, made // 4) if 1 < n <= _MOST_SPLITS)
    else:
        yield from (2 * value, value // 2)


def _made(choice: Choice) -> int:
    """Stretches that the rule's plan comes to: none is empty."""
    tiles = ceil_div(int(sizes(choice.key)["positions"]), choice.rule["block_n"])
    return min(choice.rule["splits"], _MOST_SPLITS, tiles)


def _other_plans(choice: Choice, multiprocessors: int) -> Iterator[Plan]:
    """One launch where the rule makes two, and two for one; each with other warps as well."""
    shape = sizes(choice.key)
    for split in (False, True):
        if choice.op in NORMS:
            plan = norm_rule(choice.op, shape, multiprocessors, split)
        elif choice.op == "tap_norm":
            plan = taps_rule(shape, multiprocessors, split)
        else:
            return
        if (plan["splits"] > 1) != (choice.rule["splits"] > 1):
            yield plan
            yield plan | {"warps": 2 * plan["warps"]}
            yield plan | {"warps": plan["warps"] // 2}


def _name(plan: Plan, rule: Plan) -> str:
    """What is other than in the rule."""
    return " ".join(f"{name}={value}" for name, value in plan.items() if value != rule[name])
