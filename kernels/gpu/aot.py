"""Compile recorded launches for an architecture without a GPU, and look into the machine code.

``python -m fastscore_kernels.gpu.aot`` is a worker of ``fastscore_kernels.build``: it takes a
request as JSON on standard input and answers with one JSON object a line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from fastscore_kernels.gpu.cases import Case, cases
from fastscore_kernels.gpu.launch import DEVICES, Launch, early, record
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MEMORY = re.compile(r"(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|UTMA\w+)(\.|$)")
_WAIT = "ACQBULK"
_TENSOR = re.compile(r"(HMMA|HGMMA|IMMA|DMMA|QGMMA|UTC\w*MMA)")


@dataclass(frozen=True)
class Unit:
    """One distinct compilation: a kernel, what its arguments are known to be, and its options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    label: str

    @property
    def key(self) -> str:
        """What tells two compilations apart."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return repr((self.kernel.__name__, *(sorted(p.items(), key=repr) for p in parts)))


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs and is made of.

    spills counts instructions that store to or load from local memory; loads those from global
    memory, wide_loads those of 16 bytes; tensor the tensor-core instructions. shared is in bytes.
    unwaited counts accesses to memory ahead of the wait for the kernel before, where one is
    launched early; None where it is not.
    """

    kernel: str
    label: str
    arch: str
    warps: int
    registers: int
    spills: int
    shared: int
    tensor: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    fused_fp32: int
    fused_fp64: int
    instructions: int
    unwaited: int | None


def units(arch: str, chosen: Iterator[Case], launched_early: bool = False) -> list[Unit]:
    """Distinct compilations of the given cases, each once, in order."""
    found: dict[str, Unit] = {}
    for case in chosen:
        with record(DEVICES[arch]) as launches, early(launched_early):
            case.call()
        for launch in launches:
            unit = specialise(launch, arch, f"{case.op} {case.label}")
            found.setdefault(unit.key, unit)
    return list(found.values())


def specialise(launch: Launch, arch: str, label: str) -> Unit:
    """What Triton would compile for a launch, by its own rules."""
    backend = make_backend(_target(arch))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*launch.args, debug=False, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, None
    )
    return Unit(kernel, signature, constants, attributes, dict(options.__dict__), label)


def build(unit: Unit, arch: str, cache: Path) -> Report:
    """Compile one unit, or find it compiled in ``cache``, and report on it."""
    source = ASTSource(unit.kernel, unit.signature, unit.constants, unit.attributes)
    compiled = triton.compile(source, target=_target(arch), options=unit.options)
    kept = cache / f"report-{compiled.hash}.json"
    if kept.is_file():
        return Report(**{**json.loads(kept.read_text()), "label": unit.label})
    report = inspect(compiled, unit, arch)
    with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
        json.dump(asdict(report), file)
    os.replace(file.name, kept)
    return report


def inspect(compiled: Any, unit: Unit, arch: str) -> Report:
    """Registers from the binary's notes, everything else by counting its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    listing = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.M)
    names = Counter(listing)

    def count(*starts: str, wide: bool = False) -> int:
        return sum(
            n
            for name, n in names.items()
            if name.split(".")[0] in starts and (not wide or ".128" in name)
        )

    ptx = compiled.asm["ptx"]
    return Report(
        kernel=unit.kernel.__name__,
        label=unit.label,
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=int(registers.group(1)),
        spills=count("STL", "LDL"),
        shared=compiled.metadata.shared,
        tensor=sum(n for name, n in names.items() if _TENSOR.match(name)),
        loads=count("LDG", "LDGSTS"),
        wide_loads=count("LDG", "LDGSTS", wide=True),
        stores=count("STG"),
        wide_stores=count("STG", wide=True),
        fused_fp32=len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
        fused_fp64=len(re.findall(r"\bfma\.rn\.f64", ptx)),
        instructions=len(listing),
        unwaited=_unwaited(listing) if compiled.metadata.launch_pdl else None,
    )


def _unwaited(listing: list[str]) -> int:
    """Accesses to memory before the first wait for the kernel ahead, or of all if there is none."""
    waits = listing.index(_WAIT) if _WAIT in listing else len(listing)
    return sum(_MEMORY.match(name) is not None for name in listing[:waits])


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def work(request: dict[str, Any]) -> None:
    """Build this worker's share of the request, one line of JSON a kernel."""
    cache = Path(request["cache"])
    chosen = {name: tuple(request[name]) for name in ("ops", "presets", "dtypes", "batches")}
    everything = [
        (arch, unit)
        for arch in request["archs"]
        for unit in units(arch, cases(**chosen), request["early"])
    ]
    for arch, unit in everything[request["part"] :: request["parts"]]:
        try:
            answer = asdict(build(unit, arch, cache))
        except Exception as error:
            answer = {"kernel": unit.kernel.__name__, "label": unit.label, "arch": arch}
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    work(json.load(sys.stdin))
