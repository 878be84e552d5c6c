"""One problem under several launch parameters: answers checked, then timed in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from candidates import Plan
from fastscore_kernels.gpu import launch
from replays import Replay, replay, sentence, sets, timed
from tunables import Tunable

from fastscore.measure.operations import Case, case, exact
from fastscore.measure.timing import Timing, check_equal


@dataclass
class Sitting:
    """Seconds a call by state and plan, and plans that were not timed, with the reason."""

    timings: dict[str, dict[str, Timing]]
    skipped: dict[str, str] = field(default_factory=dict)


class Bench:
    """Runs sittings of one tunable on a device, in a `lane`; each has operands of its own."""

    def __init__(self, tunable: Tunable, device: torch.device, rounds: int) -> None:
        self._tunable, self._device, self._rounds = tunable, device, rounds
        problem = tunable.problem
        self._expected = exact(problem.op, device, problem.dtype)
        self._sittings = 0

    def __call__(self, plans: Mapping[str, Plan], states: Sequence[str]) -> Sitting:
        """Time the plans in turn.

        WrongAnswerError, which names the plan, before any clock is read. What the first plan
        raises comes through; another one that cannot run is skipped.
        """
        cases = self._cases()
        sitting = Sitting({})
        replays: dict[str, dict[str, Replay]] = {state: {} for state in states}
        for name, plan in plans.items():
            try:
                found = self._replays(plan, cases, states)
            # launches have errors of many kinds; a lost device is raised again
            except Exception as error:
                sitting.skipped[name] = sentence(error)
                if name == next(iter(plans)):
                    raise
                continue
            self._check(name, found, cases[0])
            for state in states:
                replays[state][name] = found[state]
        for state in states:
            sitting.timings[state] = timed(
                replays[state], len(cases), self._device, state, self._rounds
            )
        return sitting

    def _cases(self) -> list[Case]:
        """Operands anew: the first set is always the one whose answer is known."""
        problem = self._tunable.problem
        first = case(problem.op, self._device, problem.dtype)
        count = sets(first.arguments, self._device)
        self._sittings += 1
        seeds = range(1 + count * self._sittings, count * (self._sittings + 1))
        return [first, *(case(problem.op, self._device, problem.dtype, s) for s in seeds)]

    def _replays(self, plan: Plan, cases: list[Case], states: Sequence[str]) -> dict[str, Replay]:
        calls = [one.run("triton") for one in cases]
        chosen = {"warm": calls[:1] * len(calls), "cold": calls}
        return {s: replay(chosen[s], self._device, lambda: self._with(plan)) for s in states}

    def _with(self, plan: Plan) -> Any:
        return launch.parameters(self._tunable.choice.op, **plan)

    def _check(self, name: str, found: dict[str, Replay], one: Case) -> None:
        outputs = {"float64": self._expected}
        for state, each in found.items():
            each.run()
            outputs[f"{name}, {state}"] = each.answer()
        check_equal(outputs, one.tolerance)
