"""What a function says when it refuses."""

from collections.abc import Callable
from typing import Any

import pytest


def sentence(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one sentence of the ValueError that a call ends with."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        function(*arguments, **named)
    said = str(refused.value)
    assert said
    assert "\n" not in said
    return said
