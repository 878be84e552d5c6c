"""Scripts of this folder that are processes of their own, without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def answers(script: str, *arguments: str) -> Any:
    """What a script prints as JSON, where it ends well.

    The interpreter would stand in for what a GPU runs: other operators are registered under it.
    """
    run = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        cwd=HERE,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)
