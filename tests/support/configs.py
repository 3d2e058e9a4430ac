"""vLLM's configuration of an engine that never starts: what its options come to, or are refused.

Tests that use it ask for the fixture in_process.
"""

from __future__ import annotations

from typing import Any

import engines  # noqa: F401  vLLM's environment


def engine_config(model: str, paged_kv: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    from vllm import EngineArgs

    additional = {"paged_kv": paged_kv} if paged_kv else {}
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, **kwargs}
    return EngineArgs(model=model, additional_config=additional, **settings).create_engine_config()
