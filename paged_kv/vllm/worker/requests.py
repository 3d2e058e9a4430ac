"""A row for every request that will soon compact, where its last queries are kept.

A window is needed only from its length before a request's first compaction on; the request then
holds about a budget. So the ring has as many rows as such requests fit into the pool, not one for
each request that might run. Others write to one row more, which nobody reads.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.core.schedule import Schedule
from paged_kv.policies.base import Int64s

logger = init_logger(f"vllm.{__name__}")

NOBODY = 0  # the row of those that need none


class RequestRows:
    """Rows by request, whose indices in vLLM's batch change (V1 runner).

    Args:
        runner: vLLM's model runner (V1 or V2).
        window: the last queries that are kept; 0 if none are.
    """

    def __init__(self, runner: Any, window: int) -> None:
        self.runner = runner
        self.window = window
        self.first_token = np.zeros(1, dtype=np.int64)  # whose query a row has, by row
        self._free: list[int] = []
        self._keys: dict[str, Any] = {}  # of each request: its name; in the V2 runner, its index
        self._rows: dict[Any, int] = {}  # by key
        self._fresh: dict[str, int] = {}
        self._resumed: dict[str, int] = {}  # requests: whose query their new row begins with

    @property
    def num_rows(self) -> int:
        """Rows, that of nobody included."""
        return len(self.first_token)

    def grow(self, num_rows: int) -> None:
        """Makes room for so many requests."""
        self._free += range(self.num_rows, num_rows + 1)
        self.first_token = np.pad(self.first_token, (0, num_rows + 1 - self.num_rows))

    def row_of(self, request: str) -> int | None:
        """The row of a request of this step or of the last one it ran in; None: it has none."""
        return self._rows.get(self._keys.get(request, request))

    def resume(self, request: str, first_token: int) -> None:
        """A request that is resumed in the coming step gets its old row's contents back.

        Args:
            request: its name.
            first_token: whose query the row begins with.
        """
        self._resumed[request] = first_token

    def begin_step(self, scheduler_output: Any) -> None:
        """Requests come and go."""
        gone = set(scheduler_output.finished_req_ids) | (
            scheduler_output.preempted_req_ids or set()
        )
        cached = scheduler_output.scheduled_cached_reqs
        keys = [self._keys.pop(request) for request in gone if request in self._keys]
        self._free += [self._rows.pop(key) for key in keys if key in self._rows]
        self._fresh = {
            new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
        }
        if cached.resumed_req_ids:
            computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            self._fresh |= {request: computed[request] for request in cached.resumed_req_ids}

    def begin_batch(self, metadata: CommonAttentionMetadata) -> dict[int, int]:
        """Learns the requests that are new in this step; resumed ones get their rows.

        Each layer group calls it, and the first one's call counts.

        Returns:
            the prefix hit in tokens of the new requests, by batch index.
        """
        places = self._batch_index(metadata)
        for request in self._resumed.keys() & self._fresh:
            # Now: all layer groups write this step's queries to it.
            self._take(self._keys[request], self._resumed.pop(request))
        return {places[request]: hit for request, hit in self._fresh.items()}

    def _batch_index(self, metadata: CommonAttentionMetadata) -> dict[str, int]:
        """Of the requests that are new in this step; notes their keys."""
        if metadata.req_idx is None:
            self._keys |= {request: request for request in self._fresh}
            index: dict[str, int] = self.runner.input_batch.req_id_to_index
            return index
        index = self.runner.req_states.req_id_to_index
        self._keys |= {request: index[request] for request in self._fresh}
        batch = np.asarray(metadata.req_idx)
        return {request: int(np.flatnonzero(batch == index[request])[0]) for request in self._fresh}

    def of_batch(
        self,
        metadata: CommonAttentionMetadata,
        schedule: Schedule,
        starts: Int64s,
        before: Int64s,
        after: Int64s,
    ) -> Int64s:
        """Row of each batch index; requests get one in the step that begins their first window.

        Args:
            metadata: of the batch.
            schedule: when the layer group compacts.
            starts: of each request.
            before: its length before this step.
            after: its length after this step.
        """
        soon = schedule.evicted(after + self.window - 1, starts) > 0
        return self.rows(metadata, soon & (self.window > 0), before)

    def rows(
        self, metadata: CommonAttentionMetadata, wanted: npt.NDArray[np.bool_], before: Int64s
    ) -> Int64s:
        """Row of each batch index; requests get one, if they have none, where it is wanted.

        Args:
            metadata: of the batch.
            wanted: bool [requests].
            before: see of_batch.
        """
        if metadata.req_idx is None:
            keys: list[Any] = self.runner.input_batch.req_ids[: metadata.num_reqs]
        else:
            keys = np.asarray(metadata.req_idx).tolist()
        rows = np.fromiter(map(self._rows.get, keys, repeat(NOBODY)), np.int64, len(keys))
        for index in np.flatnonzero((rows == NOBODY) & wanted):  # once per request
            rows[index] = self._take(keys[index], int(before[index]))
        return rows

    def _take(self, key: Any, first_token: int) -> int:
        if not self._free:
            logger.warning("more requests share their pages than expected: more memory for them")
            self.grow(2 * self.num_rows)
        row = self._rows[key] = self._free.pop()
        self.first_token[row] = first_token
        return row
