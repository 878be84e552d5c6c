"""One correction of Triton 3.6's interpreter, made when kernels are interpreted at all."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def read_bounds_with_numpy_2_4() -> None:
    """Let loops run to a bound known at run time.

    The interpreter keeps scalars as arrays of one element, and NumPy 2.4 no longer converts those
    to numbers (triton-lang/triton issue 9171, corrected after 3.6).
    """
    original = interpreter._patch_lang_tensor
    if getattr(original, "reads_bounds", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.reads_bounds = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
