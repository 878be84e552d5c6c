"""Running a command line that must be refused, and what must be left when it was."""

import resource
from pathlib import Path

import pytest

from fastscore.cli import main


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one sentence on stderr of a command line that ends with exit code 2."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    # bars, and tables of differing settings, may stand around the sentence
    said = [line for line in lines if line.startswith("fastscore: error: ")]
    assert code == 2, lines
    assert len(said) == 1, lines
    assert "Traceback" not in "\n".join(lines)
    return said[0].removeprefix("fastscore: error: ")


def everything(folder: Path) -> list[str]:
    """Every file and folder within, hidden ones included."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


class FileSizeLimit:
    """What a full disk does to whoever writes more than ``limit`` bytes to a file."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
