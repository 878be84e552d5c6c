"""What several subcommands share: arguments, a progress bar, times."""

from __future__ import annotations

import argparse
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastscore.pipeline import Pipeline, Progress

DEFAULT_PRESET = "digits"


def add_preset(parser: argparse.ArgumentParser) -> None:
    """--preset."""
    parser.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        metavar="NAME|FOLDER",
        help="a preset in the package, or the folder of one (default: %(default)s)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--device and --threads."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)"
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """--backend."""
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="kernels of the classifier and ScoreSubnet: reference, native (CPU) or triton (GPU) "
        "(default: native on a CPU where it was built)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--precision, --mode and --deterministic."""
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="NAME",
        help="products in fp32, tf32 (GPU) or bf16 (default: %(default)s)",
    )
    parser.add_argument(
        "--mode",
        default="eager",
        metavar="NAME",
        help="eager, compile (torch.compile), graphs (CUDA graphs) or compiled-graphs (both) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="compute samples one by one: their bits then depend on nothing else",
    )


def set_threads(threads: int | None) -> None:
    """Apply --threads; ValueError below 1."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads {threads} must be at least 1")
    import torch

    torch.set_num_threads(threads)


def load_pipeline(args: argparse.Namespace, batch_size: int | None = None) -> Pipeline:
    """Pipeline of --preset on --device, with what `add_engine` and the rest of them say."""
    set_threads(args.threads)
    from fastscore.engine import Options
    from fastscore.pipeline import Pipeline

    options = Options(
        mode=getattr(args, "mode", "eager"), deterministic=getattr(args, "deterministic", False)
    )
    return Pipeline.from_pretrained(
        args.preset,
        device=args.device,
        batch_size=batch_size,
        backend=args.backend,
        precision=getattr(args, "precision", "fp32"),
        engine=options,
    )


class Stopwatch:
    """Named spans of time, in the order they were taken."""

    def __init__(self) -> None:
        self.spans: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name the time since the last lap."""
        now = time.perf_counter()
        self.spans[name] = self.spans.get(name, 0.0) + now - self._last
        self._last = now

    def add(self, spans: dict[str, float]) -> None:
        """Take spans that somebody else measured for the time since the last lap."""
        self.spans |= spans
        self._last = time.perf_counter()

    def __str__(self) -> str:
        parts = [f"{name} {seconds:.2f} s" for name, seconds in self.spans.items()]
        if len(parts) > 1:
            parts[-1] += f"; together {sum(self.spans.values()):.2f} s"
        return ", ".join(parts)


class Bar:
    """Progress bar on stderr with the remaining time, for ``Pipeline.sample``'s callback."""

    def __init__(self, name: str, enabled: bool = True) -> None:
        self._name, self._enabled = name, enabled
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show how many solver steps are done."""
        if self._bar is None:
            from tqdm import tqdm

            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=progress.total,
                desc=self._name,
                unit="step",
                disable=not self._enabled,
                dynamic_ncols=True,
                # a log file gets a line now and then
                mininterval=0.1 if terminal else 10.0,
                miniters=1,
            )
        self._bar.update(progress.done - self._bar.n)
