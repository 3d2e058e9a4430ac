"""From how many tokens on each request of a batch is held to its budget, and its pages' new ids.

Where sequences shrink only under pressure, the scheduler says so, once for each request, with the
output of a step that comes before the start. Everywhere else a start is the prompt's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from typing import Any

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.core.schedule import NEVER
from paged_kv.policies.base import Int64s


class Starts:
    """The starts of a worker's requests.

    Args:
        runner: vLLM's model runner (V1 or V2).
        waits_for_pressure: as in CompressionConfig.
    """

    def __init__(self, runner: Any, waits_for_pressure: bool) -> None:
        self.runner = runner
        self.waits_for_pressure = waits_for_pressure
        self._starts: dict[str, int] = {}  # of those that have one; preempted ones keep theirs
        self._fresh: set[str] = set()  # of these, who has not been in a batch since
        self._of_step: tuple[Int64s, Int64s] | None = None

    def begin_step(self, scheduler_output: Any) -> None:
        """Starts come, and go with their requests; copied pages take the place of others."""
        self._of_step = None
        if not self.waits_for_pressure:
            return
        for request in scheduler_output.finished_req_ids:
            self._starts.pop(request, None)
            self._fresh.discard(request)
        starts: Mapping[str, int] = getattr(scheduler_output, "paged_kv_starts", {})
        self._fresh |= starts.keys()
        self._starts |= starts
        for request, pages in getattr(scheduler_output, "paged_kv_pages", {}).items():
            replace_pages(self.runner, request, pages)

    def of_batch(self, metadata: CommonAttentionMetadata) -> tuple[Int64s, Int64s]:
        """(start of each batch index, NEVER if there is none; indices that had none before).

        Each layer group asks, and the batch is the same.
        """
        if self._of_step is None:
            starts = self._told(metadata) if self.waits_for_pressure else self._prompts(metadata)
            fresh = np.zeros(0, dtype=np.int64)
            if self._fresh:
                names = self.names(metadata)
                fresh = np.flatnonzero([name in self._fresh for name in names])
                self._fresh.difference_update(names)
            self._of_step = starts, fresh
        return self._of_step

    def names(self, metadata: CommonAttentionMetadata) -> list[str]:
        """The requests of the batch."""
        if metadata.req_idx is None:
            names: list[str] = self.runner.input_batch.req_ids[: metadata.num_reqs]
            return names
        by_index = self.runner.req_states.index_to_req_id
        return [by_index[int(index)] for index in metadata.req_idx]

    def _told(self, metadata: CommonAttentionMetadata) -> Int64s:
        if not self._starts:
            return np.full(metadata.num_reqs, NEVER, dtype=np.int64)
        told = map(self._starts.get, self.names(metadata), repeat(NEVER))
        return np.fromiter(told, np.int64, metadata.num_reqs)

    def _prompts(self, metadata: CommonAttentionMetadata) -> Int64s:
        if metadata.req_idx is not None:  # V2 runner: rows are indices into its request table
            lens = self.runner.req_states.prompt_len.np[metadata.req_idx]
        else:
            lens = self.runner.input_batch.num_prompt_tokens[: metadata.num_reqs]
        lengths: Int64s = lens.astype(np.int64)
        return lengths


def replace_pages(runner: Any, request: str, pages: tuple[list[int], ...]) -> None:
    """A request that runs has other pages from now on, as many as before; in stream order.

    Args:
        runner: vLLM's model runner.
        request: its name.
        pages: ids of all its pages, of each of vLLM's layer groups.
    """
    if hasattr(runner, "block_tables"):  # V2
        runner.block_tables.append_block_ids(
            runner.req_states.req_id_to_index[request], pages, overwrite=True
        )
        return
    state = runner.requests[request]
    assert [*map(len, state.block_ids)] == [*map(len, pages)], "pages are replaced, none added"
    for old, new in zip(state.block_ids, pages, strict=True):
        old[:] = new
    row = runner.input_batch.req_id_to_index.get(request)
    if row is not None:
        runner.input_batch.block_table.add_row(pages, row)
