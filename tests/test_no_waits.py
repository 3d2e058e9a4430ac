"""Nobody waits for a GPU: steps of a worker and compactions, on a device that computes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"


def test_no_policy_waits_in_a_step():
    """Block tables, side data, rings, scores, statistics, compactions of both engines; no spill."""
    others = os.environ.get("PYTHONPATH", "")  # tests with other versions have theirs there
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), others])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "waiting.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len({name for name, *_ in found}) > 15
    waits = [f"{name} {options}:\n{error}" for name, options, error in found if error]
    assert not waits, "\n".join(waits)
