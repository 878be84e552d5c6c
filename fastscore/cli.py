"""The program ``fastscore``: one subcommand a module of ``fastscore.commands``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from fastscore.commands import (
    bench,
    classify,
    evaluate,
    export,
    info,
    profile,
    sample,
    train,
    vocode,
)

COMMANDS = (sample, classify, vocode, info, bench, evaluate, train, export, profile)
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 128 + signal.SIGINT


class Parser(argparse.ArgumentParser):
    """Argument parser that says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with 2."""
        _complain(f"{message}; see {self.prog} --help")
        raise SystemExit(EXIT_USAGE)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        # looked up when asked for: reading the metadata takes longer than parsing arguments
        from fastscore import __version__

        print(f"fastscore {__version__}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Parser of the whole command line; imports nothing heavy."""
    parser = Parser(
        prog="fastscore",
        description="Speech by guided diffusion from a frozen classifier: it classifies, "
        "generates and guides.",
        epilog="fastscore COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error arose, for a bug report"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: the program's own) and return its exit code.

    0: done; 2: refused, with one sentence on stderr; 1: a training diverged, a device was lost,
    or an answer that was to be timed is wrong; 130: interrupted.
    """
    with warnings.catch_warnings(), _termination_raises():
        warnings.showwarning = _show_warning
        try:
            try:
                return _run(make_parser().parse_args(arguments))
            finally:
                # a reader that has gone is noticed here, not when the interpreter ends
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("fastscore: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace) -> int:
    """Run the command; its exit code, after a sentence where the command refused."""
    try:
        return args.run(args) or 0
    except BrokenPipeError:
        raise
    except (ValueError, ImportError, OSError, MemoryError) as error:
        if args.traceback:
            raise
        _complain(str(error))
        return EXIT_USAGE
    except RuntimeError as error:
        # by name, because importing it would load the framework
        if type(error).__name__ not in ("DivergenceError", "DeviceLostError") or args.traceback:
            raise
        _complain(str(error))
        return EXIT_FAILED


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what is half-written is removed on the way out."""

    def leave(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler may be set
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(sentence: str) -> None:
    print(f"fastscore: error: {sentence}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings as sentences, without the source line that issued them."""
    print(f"fastscore: warning: {message}", file=file or sys.stderr)
