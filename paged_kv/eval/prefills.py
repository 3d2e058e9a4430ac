"""A context that the reference engine processes once, for all policies that compress it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.store import query_gathering
from paged_kv.store.query_gathering import SERVED_TOKENS, QueryGathering

Paging = tuple[str, int]  # page format, residual pages


class Prefill(NamedTuple):
    """A context as one chunk, of which nothing is dropped."""

    engine: ReferenceEngine
    hidden: torch.Tensor  # [1, hidden], the last state of the last token
    seconds: float


class Prefills:
    """One for each page format, made when it is asked for.

    Args:
        model: see load_model.
        context: tokens, at least one.
        configs: all that will compress it; settled.
        page_size: entries are dropped in multiples of it.
    """

    def __init__(
        self,
        model: Any,
        context: Sequence[int],
        configs: Sequence[CompressionConfig],
        page_size: int,
    ) -> None:
        self.model, self.context, self.page_size = model, context, page_size
        self._configs = configs
        self._made: dict[Paging, Prefill] = {}

    def of(self, config: CompressionConfig) -> Prefill:
        """What a config compresses."""
        paging = _paging(config)
        if paging not in self._made:
            self._made[paging] = self._make(paging)
        return self._made[paging]

    def _make(self, paging: Paging) -> Prefill:
        sharing = [config for config in self._configs if _paging(config) == paging]
        policies = [config.create_policy() for config in sharing if config.enabled]
        window = max((policy.observation_window for policy in policies), default=0)
        sources = map(query_gathering.source, policies)
        gathers = any(isinstance(source, QueryGathering) for source in sources)
        start = time.perf_counter()
        engine = ReferenceEngine(
            self.model,
            CompressionConfig(page_format=paging[0], residual_pages=paging[1]),
            self.page_size,
            observe=window,
            gathering=QueryGathering(SERVED_TOKENS) if gathers else None,
            scorers=[policy for policy in policies if "scores" in policy.reads],
        )
        hidden = engine.process(self.context, compact=False)[-1:].clone()
        return Prefill(engine, hidden, time.perf_counter() - start)

    def compressed(self, config: CompressionConfig) -> tuple[ReferenceEngine, float]:
        """An engine that goes on under the config, and seconds: of its prefill and compression."""
        prefill = self.of(config)
        start = time.perf_counter()
        engine = prefill.engine.fork(config)
        engine.compact()
        return engine, prefill.seconds + time.perf_counter() - start


def _paging(config: CompressionConfig) -> Paging:
    """What pages hold before anything is dropped."""
    return config.page_format, config.residual_pages
