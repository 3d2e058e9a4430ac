"""The scripts in benchmarks/gpu in processes of their own, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent.parent.parent / "benchmarks" / "gpu"


def run(script: Path | str, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, after some code that breaks what it uses."""
    command = [sys.executable, str(script)]
    if code:
        setup = f"import runpy, sys; sys.path.insert(0, {str(SCRIPTS)!r}); import common; "
        start = f"sys.argv = [{str(script)!r}, *sys.argv[1:]]; "
        command = [sys.executable, "-c", f"{setup}{code}; {start}"
                   f"runpy.run_path({str(script)!r}, run_name='__main__')"]  # fmt: skip
    own = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own |= {"VLLM_NO_USAGE_STATS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=os.environ | own, check=False
    )


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
