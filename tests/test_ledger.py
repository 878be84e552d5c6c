"""The ledger of bits: a clip has one hash, however it is drawn, and today the one on record."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_bits_are_those_of_the_ledger():
    """Batches of 1 and 3 in every slot, eager and replayed, in two new processes."""
    ledger = ROOT / "bench" / "results" / "ledger.json"
    # as a user draws: not under the settings of these tests
    plain = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTSCORE_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "bench/ledger.py", "--check", str(ledger), "--batches", "1", "3"],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "no column" in done.stdout:
        pytest.skip(f"bits agree, but the ledger does not know {done.stdout.splitlines()[0]}")
    assert "the same bits as in" in done.stdout
