"""A row for every running request, where its last queries are kept; batch indices change."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.policies.base import Int64s


class RequestRows:
    """Rows by request.

    The V2 runner has a table of its own, whose row numbers serve; the V1 runner moves requests
    about in its batch.

    Args:
        runner: vLLM's model runner (V1 or V2).
        num_rows: requests that can run at once.
    """

    def __init__(self, runner: Any, num_rows: int) -> None:
        self.runner = runner
        self.first_token = np.zeros(num_rows, dtype=np.int64)  # computed by this worker, by row
        self._free = list(range(num_rows))
        self._rows: dict[str, int] = {}
        self._fresh: dict[str, int] = {}

    def begin_step(self, scheduler_output: Any) -> None:
        """Requests come and go."""
        gone = set(scheduler_output.finished_req_ids) | (
            scheduler_output.preempted_req_ids or set()
        )
        cached = scheduler_output.scheduled_cached_reqs
        self._free += [self._rows.pop(request) for request in gone if request in self._rows]
        self._fresh = {
            new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
        }
        if cached.resumed_req_ids:
            computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            self._fresh |= {request: computed[request] for request in cached.resumed_req_ids}
        for request in self._fresh:
            if request not in self._rows:
                self._rows[request] = self._free.pop()

    def of_batch(self, metadata: CommonAttentionMetadata) -> tuple[Int64s, dict[int, int]]:
        """(row of each batch index, prefix hit in tokens by batch index of a fresh request)."""
        if metadata.req_idx is not None:
            rows = np.asarray(metadata.req_idx, dtype=np.int64)
            places = self.runner.req_states.req_id_to_index
            batch = {
                request: int(np.flatnonzero(rows == places[request])[0]) for request in self._fresh
            }
        else:
            ids = self.runner.input_batch.req_ids[: metadata.num_reqs]
            rows = np.fromiter(map(self._rows.__getitem__, ids), np.int64, len(ids))
            batch = {
                request: self.runner.input_batch.req_id_to_index[request] for request in self._fresh
            }
        hits = {batch[request]: hit for request, hit in self._fresh.items()}
        self.first_token[rows[list(hits)]] = list(hits.values())
        return rows, hits
