"""The vLLM versions we were tested with. What we rely on there is tested in tests/test_seams.py."""

from __future__ import annotations

import vllm

TESTED = "0.32"


def check_version() -> None:
    """Raises RuntimeError outside the tested range: our seams are internal to vLLM and move."""
    version = vllm.__version__
    if not version.startswith(f"{TESTED}."):
        raise RuntimeError(
            f"paged_kv works with vLLM {TESTED}.x, this is {version}. Uninstall paged-kv, or keep "
            "vLLM from loading it with VLLM_PLUGINS="
        )
