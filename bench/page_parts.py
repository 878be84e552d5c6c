"""Tables of the results page, and what stands under each: the command and the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NOT_HERE = "not measured"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' + '---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def source(part: dict[str, Any], timed: bool = True) -> str:
    """The command under a table and the machine that it ran on; of ``timed`` figures, warnings."""
    if not part:
        return ""
    p = part["provenance"]
    commit = (p["commit"]["id"] or "?")[:10] + (" with changes" if p["commit"]["dirty"] else "")
    device = (p.get("gpu") or {}).get("name") or (
        f"{p['processor']['model']}, {p['processor']['cores']} cores, "
        f"{p['threads']} thread{'s' if p['threads'] > 1 else ''}"
    )
    lines = [
        f"`{part['command']}`  ",
        f"{device}; torch {p['versions']['torch']}; commit {commit}.",
    ]
    if timed:
        lines[-1] += f" Load {p['load'][0]:.1f} at the start."
        lines += [f"Warning: {w}." for w in p.get("warnings", ())]
    return "\n".join(lines)
