"""Errors in the middle of a forward pass, and what a small context is made of."""

from __future__ import annotations

import itertools
from typing import Any

from hf_models import prompt
from hf_pressure import feed

from paged_kv.hf import PagedCache

TOKENS = prompt(160)
READ = 120  # of them: a prompt
EARLY: dict[str, Any] = {"policy": "snapkv", "budget": 80, "compress_prefill": True}
PAGES: dict[str, Any] = {"page_size": 16}


def begin(model: Any, cache: PagedCache) -> None:
    """A prompt, and the first single token."""
    feed(model, cache, TOKENS[:READ])
    feed(model, cache, TOKENS[READ : READ + 1])


def fails_once(monkeypatch: Any, owner: Any, name: str, error: BaseException, at: int = 0) -> None:
    """A method raises in one of its next calls, counted from 0."""
    calls, original = itertools.count(), getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
