"""The compiled library of CPU kernels, loaded once through its plain C interface."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

# importing torch first puts its OpenMP into the global scope, which the library uses: two thread
# pools would spin against each other
import torch  # noqa: F401

ABI = 2
ERRORS = {
    1: "a size, stride or type that no tensor can have",
    2: "there is not enough memory",
    3: "an instruction set that this build or processor lacks",
}
REMEDY = (
    "install a C++17 compiler and reinstall fastscore from its folder "
    "(FASTSCORE_NATIVE=required pip install --force-reinstall --no-deps .), "
    "or use backend reference"
)

_P, _I, _INT, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_MAP4, _MAP3 = [_P, _I, _I, _I], [_P, _I, _I]
_NORM = [_P, _P, _INT, _P, _I, _INT]
SIGNATURES: dict[str, list] = {
    "fs_set_isa": [ctypes.c_char_p],
    "fs_norm_act": [*_MAP4 * 2, _INT, *_NORM, _P, _P, *[_I] * 4, _INT, _D],
    "fs_norm_act_backward": [*_MAP4 * 3, _INT, *_NORM, _P, _P, _P, *[_I] * 5, _INT],
    "fs_tap_norm": [*_MAP4 * 2, *_MAP3, _INT, *[_P] * 4, _INT, _P, _P, *[_I] * 4, _D],
    "fs_tap_fuse": [*_MAP3 * 4, _INT, _I, _I, _I, _I, _INT],
    "fs_tap_fuse_backward": [*_MAP3 * 7, _INT, _I, _I, _I, _I, _INT],
    "fs_tap_path": [*_MAP3 * 3, _INT, *[_P] * 14, _INT, _P, *[_I] * 6, _INT, _D],
    "fs_solver_step": [_P, _P, _P, _INT, _P, _P, _P, _P, _I, _P, _P, _I, _I],
    "fs_normals": [_P, _P, _P, _I, _P, _I, _I, _I],
    "fs_winograd_pack": [_P, _P, _I, _I],
    "fs_winograd": [_P, _P, _P, _P, *[_I] * 5],
    "fs_linear_pack": [_P, _I, _I, _P, _P, _I, _I],
    "fs_linear": [_P, _P, _P, _I, _I, _I],
}


def _file() -> Path:
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return Path(__file__).parent / "lib" / f"libfastscore_native.{suffix}"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it cannot be used."""
    path = _file()
    if not path.is_file():
        return None, f"the native kernels were not built when fastscore was installed; {REMEDY}"
    try:
        native = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the native kernels at {path} cannot be loaded ({error}); {REMEDY}"
    abi = native.fs_abi()
    if abi != ABI:
        return None, f"the native kernels at {path} have interface {abi}, not {ABI}; {REMEDY}"
    for name, arguments in SIGNATURES.items():
        function = getattr(native, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    native.fs_isa.restype = ctypes.c_char_p
    native.fs_set_threads.argtypes, native.fs_set_threads.restype = [ctypes.c_int], None
    return native, ""


def problem() -> str:
    """Why the native kernels cannot run here, and the remedy; "" if they can."""
    return _load()[1]


def native() -> ctypes.CDLL:
    """The library; ValueError where it is missing or does not fit."""
    found, why = _load()
    if found is None:
        raise ValueError(f"backend native cannot run here: {why}")
    return found


def instruction_set() -> str:
    """The instruction set in use: avx512, avx2, neon or portable."""
    return native().fs_isa().decode()


def raise_error(name: str, code: int) -> None:
    """Turn an error code of the library into an exception: MemoryError or ValueError."""
    if code == 2:
        raise MemoryError(f"{name}: {ERRORS[2]}")
    raise ValueError(f"{name}: {ERRORS.get(code, f'error {code}')}")
