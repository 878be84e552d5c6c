"""Writing measured launch parameters into the table of an architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastscore_kernels.gpu.launch import read_table

from fastscore.files import atomic_write

Table = dict[str, dict[str, dict[str, int]]]


def merged(table: Table, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """``table`` with what finished rows accepted; where the rule won, an older entry goes.

    Entries of problems that no row is about stay.
    """
    found = {op: dict(problems) for op, problems in table.items()}
    for row in rows.values():
        if "accepted" not in row:
            continue
        problems = found.setdefault(row["op"], {})
        problems.pop(row["key"], None)
        if row["accepted"] is not None:
            problems[row["key"]] = row["accepted"]
    return {op: dict(sorted(found[op].items())) for op in sorted(found) if found[op]}


def write(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Merge rows into the table at ``path``, whole or not at all; ValueError where it is none."""
    table = merged(read_table(path) if path.is_file() else {}, rows)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")
        # what kernels could not read does not take the old one's place
        read_table(temporary)
    return table
