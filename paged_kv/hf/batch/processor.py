"""transformers' scheduler and processor of batches, where they meet a BatchCache."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from paged_kv.hf.seams import ENGINE, Attends


class BatchScheduler(FIFOScheduler):
    """transformers' scheduler; steps end where a request may drop something.

    Below a share of free pages no request begins: with start=pressure others shrink before that.
    """

    def schedule_batch(self, *budgets: int) -> Any:
        """See FIFOScheduler."""
        has_place = len(self.active_requests) < self.max_requests_per_batch
        if self.waiting_requests and has_place and not self.block_new_requests:
            self.cache.keep_free(self.safety_margin)
        return super().schedule_batch(*budgets)

    def _schedule_request(
        self, state: Any, request_tokens: list[int], token_budget: int, removed: set[str]
    ) -> None:
        length = self.cache.step_length(state, min(token_budget, len(request_tokens)))
        super()._schedule_request(state, request_tokens, length, removed)


class BatchProcessor(ContinuousBatchProcessor):
    """transformers' processor; a forward pass is a step of our Sequences."""

    def _generation_step(self, model: Any) -> None:
        with self.cache.step(self.inputs_and_outputs.requests_in_batch):
            super()._generation_step(_Attended(model, self.cache))


class _Attended:
    """A model whose attention an engine computes, from what transformers prepared for its own."""

    def __init__(self, model: Any, engine: Attends) -> None:
        self._model, self._engine = model, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        del inputs["cache"]
        inputs[ENGINE] = [self._engine]
        # Of four dimensions, it is taken as it is: the model makes none.
        inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return self._model(**inputs)
