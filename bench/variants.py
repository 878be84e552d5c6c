"""Launch parameters worth a sitting: those that make launches of their own, and compile."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from candidates import Plan, candidates
from fastscore_kernels.gpu.launch import Device, Launch
from precompile import Compilers, obstacle
from torch import Tensor
from tunables import Tunable, launches


@dataclass
class Variants:
    """Plans of a tunable that are being compiled, by name, and those refused, with the reason."""

    plans: dict[str, Plan]
    refused: dict[str, str]
    begun: dict[str, list[Future[str]]]

    def ready(self) -> dict[str, Plan]:
        """Wait for the compilers; what cannot run is refused."""
        for name in list(self.plans):
            if why := obstacle(self.begun[name]):
                self.refused[name] = why
                del self.plans[name]
        return self.plans


def variants(
    tunable: Tunable, device: Device, compilers: Compilers, most: int | None = None
) -> Variants:
    """Begin to compile the rule and at most ``most`` candidates that make other launches."""
    choice = tunable.choice
    plans, refused = candidates(choice, device.multiprocessors)
    found = Variants({}, refused, {})
    made = {_print(_launches(tunable, device, choice.rule, compilers, [])): "the rule"}
    for name, plan in plans.items():
        if most is not None and len(found.plans) == most:
            refused[name] = f"of candidates only {most} is tried"
            continue
        begun: list[Future[str]] = []
        try:
            printed = _print(_launches(tunable, device, plan, compilers, begun))
        except ValueError as error:
            refused[name] = str(error)
            continue
        if printed in made:
            refused[name] = f"the same launches as {made[printed]}"
            continue
        made[printed] = name
        found.plans[name], found.begun[name] = plan, begun
    return found


def _launches(
    tunable: Tunable,
    device: Device,
    plan: Mapping[str, int],
    compilers: Compilers,
    begun: list[Future[str]],
) -> list[Launch]:
    found = launches(tunable.problem, device, **{tunable.choice.op: plan})
    begun += compilers.start(found)
    return found


def _print(found: list[Launch]) -> str:
    """What tells launches from others on the same operands."""
    return repr([_parts(one) for one in found])


def _parts(one: Launch) -> tuple[Any, ...]:
    numbers = [a for a in one.args if not isinstance(a, Tensor)]
    return one.kernel.fn.__name__, one.grid, numbers, sorted(one.options.items(), key=str)
