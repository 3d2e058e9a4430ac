"""Nobody waits for a GPU: steps of a worker and compactions, on a device that computes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"
OF_ATTENTION = {"rotate_kernel", "segment_kernel", "combine_kernel", "score_kernel", "kept_kernel"}
OF_ENTRIES = {"write_kernel", "store_kernel", "move_kernel", "gather_kernel"}
LAUNCHED = OF_ATTENTION | OF_ENTRIES | {"total_kernel", "mass_kernel"}


def test_no_policy_waits_in_a_step():
    """Block tables, side data, rings, scores, statistics, compactions of both engines, residuals,
    and what surrounds the launches of kernels; no spill."""
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
    told = json.loads(done.stdout)
    found = told["found"]
    assert len({name for name, *_ in found}) > 15
    assert set(told["launched"]) == LAUNCHED
    waits = [f"{name} {options}:\n{error}" for name, options, error in found if error]
    assert not waits, "\n".join(waits)
