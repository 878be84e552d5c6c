"""``fastscore bench SUITE --against REF``: another commit and this one, in turn, in one run.

Each runs in a worker process of its own, whose imports come from its own sources; what the two say
to each other are lines of JSON, so that workers of other commits can be asked the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fastscore.measure.results import Check, Results, Rounds, Row, Time, none, read_results
from fastscore.measure.verdict import Verdict, compare, differs
from fastscore.measure.workloads import chosen
from fastscore.measure.worktree import Say, checked_out, find_root, uncommitted

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = 1
NOT_HERE = "not measured by --against"
# seconds of a round at least, and of one side's rounds of a row about
ROUND_SECONDS, BUDGET = 2e-3, 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 24, 192

Plain = dict[str, Any]
# rows done, rows in all, name of the next
Watcher = Callable[[int, int, str], Any]

# what a worker starts with: no site, because the hook of an editable installation would import the
# sources that it was made for; then the package and its kernels from one folder, and proof of it
_BOOT = """
import importlib.util, json, pathlib, sys
root, paths = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
sys.path[:] = [str(root), *paths]
kernels = root / "kernels"
spec = importlib.util.spec_from_file_location(
    "fastscore_kernels", kernels / "__init__.py", submodule_search_locations=[str(kernels)])
sys.modules["fastscore_kernels"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import fastscore
for found in (fastscore, module):
    if root.resolve() not in pathlib.Path(found.__file__).resolve().parents:
        sys.exit(f"{found.__name__} was imported from {found.__file__}, not from {root}")
from fastscore.measure.worker import serve
serve()
"""


@dataclass(frozen=True)
class Options:
    """What both sides are run with.

    ``only``: rows, as `workloads.chosen` takes them. ``sittings``: how often a row's operands are
    built anew. ``budget``: seconds of rounds a row gets on each side.
    """

    device: str = "cpu"
    threads: int | None = None
    only: tuple[str, ...] = ()
    sittings: int = 12
    budget: float = BUDGET

    def __post_init__(self) -> None:
        if self.sittings < 4:
            raise ValueError(f"sittings {self.sittings} must be at least 4")
        if not self.budget > 0:
            raise ValueError(f"budget {self.budget} must be above 0 seconds")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads {self.threads} must be at least 1")


class Worker:
    """A process that runs rows of the fastscore in ``root``; ends with the block."""

    def __init__(self, root: Path, name: str, threads: int | None = None) -> None:
        self._name = name
        # an error file, because a pipe that nobody reads fills up
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # after the worker's own root, which they cannot hide
        paths = [p for p in sys.path if p]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-c", _BOOT, str(root), json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=root,
            env=environment,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, do: str, **rest: Any) -> Plain:
        """Send a request and wait for the answer; ValueError where it is an error, or none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **rest}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ValueError(f"fastscore of {self._name} stopped: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"fastscore of {self._name} refused: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip()
        return f"its process ended with status {self._process.returncode}"


def against(
    suite: str,
    ref: str,
    out: tuple[Path, Path],
    options: Options | None = None,
    command: str = "",
    *,
    root: Path = ROOT,
    say: Say = lambda sentence: None,
    progress: Watcher = lambda done, total, name: None,
) -> Verdict:
    """Run a suite's rows at ``ref`` and here, in turn; write both result files and compare them.

    A is ``ref``, B what is here, whose files are ``out``. Raises ValueError, in a sentence, where
    ``root`` is no git repository, ``ref`` is unknown, older than this command, or does not build,
    and for a suite or rows that are unknown.
    """
    options = options or Options()
    chosen(suite, options.only)
    root = find_root(root)
    notes = _changes_here(root)
    with checked_out(root, ref, say) as there:
        notes += [there.note] if there.note else []
        with (
            Worker(there.root, ref, options.threads) as a,
            Worker(root, "here", options.threads) as b,
        ):
            _Run((a, b), suite, options, out, command).all(progress)
    first, second = (read_results(path) for path in out)
    return compare(first, second, (ref, "here"), notes=notes, in_turn=True)


def _changes_here(root: Path) -> list[str]:
    changed = uncommitted(root)
    if not changed:
        return []
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return [f"B has changes that are not committed: {', '.join(changed[:3])}{more}"]


class _Run:
    """Both workers through all rows, each row written when it is done."""

    def __init__(
        self,
        workers: tuple[Worker, Worker],
        suite: str,
        options: Options,
        out: tuple[Path, Path],
        command: str,
    ) -> None:
        self._workers, self._options = workers, options
        self._names: list[list[str]] = []
        self._results = []
        for worker, path in zip(workers, out, strict=True):
            answer = worker.ask(
                "start",
                suite=suite,
                only=list(options.only),
                device=options.device,
                threads=options.threads,
            )
            if answer.get("protocol") != PROTOCOL:
                raise ValueError(
                    "the two commits do not understand each other (protocol "
                    f"{answer.get('protocol')}, not {PROTOCOL}); choose a later one"
                )
            self._names.append(answer["rows"])
            self._results.append(Results.start(path, suite, command, answer["provenance"]))

    def all(self, progress: Watcher) -> None:
        """Every row that either side has."""
        names = list(dict.fromkeys(self._names[1] + self._names[0]))
        for done, name in enumerate(names):
            progress(done, len(names), name)
            self._row(name)
        progress(len(names), len(names), "")
        for results in self._results:
            results.finish()

    def _row(self, name: str) -> None:
        sides = [i for i in (0, 1) if name in self._names[i]]
        found = {i: self._workers[i].ask("row", name=name) for i in sides}
        rounds: dict[int, Rounds] = {}
        both = len(sides) == 2 and all(found[i]["status"] == "ok" for i in sides)
        if both and not differs(found[0]["workload"], found[1]["workload"]):
            rounds = self._timed(found)
        for i in sides:
            self._results[i].add(_as_row(name, found[i], rounds.get(i)))

    def _timed(self, found: dict[int, Plain]) -> dict[int, Rounds]:
        """Rounds of both sides: A B B A A B B A, each turn with operands built anew."""
        once = max(found[i]["once"] for i in found)
        calls = max(1, math.ceil(ROUND_SECONDS / once))
        count = self._options.sittings
        rounds = self._options.budget / (calls * once)
        each = math.ceil(max(FEWEST_ROUNDS, min(MOST_ROUNDS, rounds)) / count)
        # a model that takes long to load stays
        anew = max(found[i]["build"] for i in found) * count <= 2 * self._options.budget
        parts: dict[int, list[Rounds]] = {0: [], 1: []}
        for turn in range(count):
            for i in (0, 1) if turn % 4 in (0, 3) else (1, 0):
                answer = self._workers[i].ask("time", rounds=each, calls=calls, anew=anew)
                parts[i].append(Rounds(tuple(answer["values"]), tuple(answer["reference"])))
        joined = {i: Rounds.joined(parts[i]) for i in parts}
        if anew:
            return joined
        return {i: Rounds(r.values, r.reference) for i, r in joined.items()}


def _as_row(name: str, found: Plain, rounds: Rounds | None) -> Row:
    check = found.get("check")
    nothing = {key: none(NOT_HERE) for key in ("memory", "energy", "bound")}
    return Row(
        name,
        found["workload"],
        found["status"],
        found.get("reason", ""),
        Check(**check) if check else None,
        rounds,
        Time.of(rounds.values) if rounds else None,
        **nothing,
    )
