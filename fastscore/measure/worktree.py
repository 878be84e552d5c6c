"""Another commit of this repository, checked out and built in a folder that is gone afterwards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# what the compiled library is made from
_NATIVE = ("kernels/native", "CMakeLists.txt")
_LIBRARY = Path("kernels/library.py")
# modules that a commit must have for its rows to be run
_NEEDED = "fastscore/measure/worker.py"

Say = Callable[[str], object]


@dataclass(frozen=True)
class Checkout:
    """A commit in a folder; ``note`` says what is to be known of its native kernels."""

    root: Path
    commit: str
    note: str


def find_root(folder: Path) -> Path:
    """``folder``, if it is the top of a git repository; ValueError where it is not."""
    if shutil.which("git") is None:
        raise ValueError("--against needs git, which is not installed here")
    run = _git(folder, "rev-parse", "--show-toplevel")
    if run.returncode or Path(run.stdout.strip()).resolve() != folder.resolve():
        raise ValueError(
            f"{folder}, where fastscore is, is no git repository; --against compares with a "
            "commit, so it needs a clone: pip install -e there"
        )
    return folder.resolve()


def find_commit(root: Path, ref: str) -> str:
    """Full name of the commit; ValueError for one that is unknown, or without a benchmark."""
    # the name could start with a dash
    run = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
    if run.returncode or not run.stdout.strip():
        raise ValueError(
            f"{ref!r} names no commit of this repository; git log --all shows those there are, "
            "git fetch gets more"
        )
    commit = run.stdout.strip()
    if _git(root, "cat-file", "-e", f"{commit}:{_NEEDED}").returncode:
        raise ValueError(
            f"{ref} ({commit[:10]}) is older than fastscore bench --against, which cannot run its "
            "rows; choose a later commit"
        )
    return commit


def uncommitted(root: Path) -> list[str]:
    """Tracked files that differ from the last commit."""
    run = _git(root, "status", "--porcelain", "--untracked-files=no")
    return [line[3:] for line in run.stdout.splitlines() if line.strip()]


@contextmanager
def checked_out(root: Path, ref: str, say: Say = lambda sentence: None) -> Iterator[Checkout]:
    """A worktree of ``ref`` in a temporary folder, with native kernels where this one has them.

    It is removed however the block ends. Raises ValueError where it cannot be made or built.
    """
    commit = find_commit(root, ref)
    # of runs that were killed
    _git(root, "worktree", "prune")
    folder = Path(tempfile.mkdtemp(prefix="fastscore-against-"))
    path = folder / "worktree"
    try:
        run = _git(root, "worktree", "add", "--detach", "--quiet", str(path), commit)
        if run.returncode:
            raise ValueError(f"git cannot check {ref} out: {_last(run.stderr)}")
        yield Checkout(path, commit, _with_library(root, path, ref, say))
    finally:
        _git(root, "worktree", "remove", "--force", str(path))
        shutil.rmtree(folder, ignore_errors=True)
        _git(root, "worktree", "prune")


def _with_library(root: Path, path: Path, ref: str, say: Say) -> str:
    """Put the native kernels into a worktree: those of here where they are the same."""
    libraries = sorted((root / "kernels" / "lib").glob("*fastscore_native.*"))
    if not libraries:
        return "native kernels are not built here, so rows on them are skipped on both sides"
    if _same_sources(root, path):
        (path / "kernels" / "lib").mkdir(parents=True, exist_ok=True)
        for library in libraries:
            shutil.copy2(library, path / "kernels" / "lib")
        return ""
    say(f"building the native kernels of {ref}")
    _build(path, ref)
    return f"the native kernels of {ref} differ from those here and were built for it"


def _same_sources(root: Path, path: Path) -> bool:
    run = _git(root, "diff", "--quiet", _head(path), "--", *_NATIVE)
    return run.returncode == 0 and _abi(root) == _abi(path)


def _head(path: Path) -> str:
    return _git(path, "rev-parse", "HEAD").stdout.strip()


def _abi(root: Path) -> str | None:
    try:
        found = re.search(r"^ABI = (\d+)", (root / _LIBRARY).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found.group(1) if found else None


def _build(path: Path, ref: str) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise ValueError(
            f"the native kernels of {ref} differ from those here and cmake, which builds them, is "
            "not found; pip install cmake"
        )
    build = str(path / "build")
    for command in (
        [cmake, "-S", str(path), "-B", build, "-DCMAKE_BUILD_TYPE=Release"],
        [cmake, "--build", build, "-j", str(os.cpu_count() or 1), "--target", "install"],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(
                f"the native kernels of {ref} do not build: {_error(run.stdout + run.stderr)}; "
                "choose a commit that builds"
            )


def _error(output: str) -> str:
    """The line that tells most: the first that speaks of an error, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (wrong or lines or ["no reason was given"])[0 if wrong else -1]


def _last(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # a hook or an alias of the caller's repository must not turn up here
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=kept
    )
