"""The vLLM versions we were tested with; tests/test_vllm_*seams.py have what we rely on there."""

from __future__ import annotations

import vllm
from vllm.logger import init_logger

from paged_kv import versions

logger = init_logger(f"vllm.{__name__}")

TESTED = ("0.32", "0.33")


def check_version() -> None:
    """Raises ValueError for any other, unless the user allows it: our seams are internal."""
    hint = "; to use vLLM without paged_kv, uninstall paged-kv or set VLLM_PLUGINS="
    versions.check("vLLM", vllm.__version__, TESTED, logger, hint)
