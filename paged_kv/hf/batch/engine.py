"""What stands between transformers' continuous batching and our pages.

transformers decides which requests run in a step (Scheduler), prepares the flat batch, samples
and hands out results. Where it would ask its own cache, it asks BatchCache, which only counts pages
(PageCounts) and lets the rows of our Sequences follow the requests:

    can_store_request_tokens   a request gets pages for its next step, or waits, or makes way
    step                       rows for new requests, none for finished ones; the forward pass
    attend                     in each layer: the flat batch by rows
    free_blocks                a request has finished or must be computed again later
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from paged_kv.hf.arena import Geometry
from paged_kv.hf.batch.nothing_to_do import NothingToDo
from paged_kv.hf.batch.page_counts import PageCounts
from paged_kv.hf.batch.starts import Starts
from paged_kv.hf.paged_attention import Bias
from paged_kv.hf.seams import Attends
from paged_kv.hf.sequences import Sequences
from paged_kv.kernels.operands import Terms

Tensor = torch.Tensor


class BatchCache(NothingToDo, Attends):
    """Stands in for transformers' PagedAttentionCache, of which it allocates nothing.

    Args:
        parts: hold some layers each; their rows are the running requests.
        page_counts: counts their pages.
        prompt_lens: tokens of each request's prompt.
        max_batch_tokens: most tokens in a step.
    """

    def __init__(
        self,
        parts: Sequence[Sequences],
        page_counts: PageCounts,
        prompt_lens: Mapping[str, int],
        max_batch_tokens: int,
    ) -> None:
        self.parts, self.page_counts = parts, page_counts
        self.prompt_lens = prompt_lens
        waits = any(part.compression.waits_for_pressure for part in parts)
        self.starts = Starts(page_counts, prompt_lens, waits)
        self._holder = {layer: part for part in parts for layer in part.index}
        self.max_batch_tokens = max_batch_tokens
        self.rows: list[str] = []  # whose row it is
        self._gone: set[str] = set()  # their rows are dropped before the next step
        self._lengths: list[int] = []  # new tokens of the batch's requests, in its order
        self._row_of: list[int] = []
        self._floor: dict[str, int] = {}  # pages promised to prompts that have begun
        self.cache_allocators = {"full_attention": _Allocator(self)}
        self.pool = self

    # ---- what the scheduler asks

    def step_length(self, state: Any, wanted: int) -> int:
        """Tokens of a request, of those wanted, that may be computed at once."""
        if wanted <= 1:
            return wanted
        start = self.starts.of(state.request_id)
        return min(wanted, self.page_counts.longest_step(state.position_offset, start))

    def pages_needed(self, request: str, num_tokens: int, num_new: int) -> int:
        """Pages of a request in its next step."""
        after = num_tokens + num_new
        needed = self.page_counts.during(num_tokens, after, self.starts.of(request))
        return max(needed, self._floor.get(request, 0))

    def can_store_request_tokens(self, state: Any, request_len: int) -> bool:
        """Whether there are pages for a request's next tokens; then it has them.

        One that begins gets what its prompt will need: two halves of prompts help nobody.
        """
        request = state.request_id
        if request not in self.page_counts.taken and request not in self._floor:
            total = state.position_offset + len(state.remaining_prefill_tokens)
            self._floor[request] = self.page_counts.peak(total, self.starts.of(request))
        num_new = self.step_length(state, request_len)

        def needed() -> int:
            return self.pages_needed(request, state.position_offset, num_new)

        counts = self.page_counts
        self.starts.make_room(
            request, lambda: needed() - counts.taken.get(request, 0) - counts.num_free
        )
        fits = counts.take(request, needed())
        if fits:
            self.starts.plan(request, num_new)
        return fits

    def keep_free(self, share: float) -> None:
        """Requests shrink until this share of all pages is free, if there are enough of them."""
        if (num_pages := self.page_counts.num_pages) is not None:
            wanted = share * num_pages
            self.starts.make_room(None, lambda: wanted - self.page_counts.num_free)

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """A request's pages are free; its row goes before the next step."""
        self.page_counts.give_back(request_id)
        self._floor.pop(request_id, None)
        self.starts.forget(request_id)
        if request_id in self.rows:
            self._gone.add(request_id)

    def count_storable_requests(self, list_blocks_needed: Sequence[Mapping[str, int]]) -> int:
        """How many of these requests, from the first on, there is room for."""
        more = np.cumsum([sum(needed.values()) for needed in list_blocks_needed])
        return int((more <= self.page_counts.num_free).sum())

    def compute_free_capacity(self) -> float:
        """Share of the pages that nobody has."""
        return self.page_counts.free_share

    # ---- steps

    @contextmanager
    def step(self, requests: Sequence[Any]) -> Iterator[None]:
        """The forward pass of these scheduled requests (FutureRequestState)."""
        self._drop_rows()
        self._shrink_rows()
        new = [r.state.request_id for r in requests if r.state.request_id not in self.rows]
        known = [self.prompt_lens[each] for each in new], [self.starts.of(each) for each in new]
        for part in self.parts:
            part.add_rows(len(new), *known)
        self.rows += new
        index = {request: row for row, request in enumerate(self.rows)}
        self._row_of = [index[request.state.request_id] for request in requests]
        self._lengths = [request.query_length for request in requests]
        yield
        for part in self.parts:
            if part.step is None:
                raise ValueError(
                    "the model does not compute its attention through transformers' "
                    "AttentionInterface: use generate()"
                )
            part.end()
        for request in requests:
            self._note(request)

    def _note(self, request: Any) -> None:
        """The pages that a request holds between steps."""
        state = request.state
        if not state.remaining_prefill_tokens:
            self._floor.pop(state.request_id, None)
            self.starts.note(state.request_id, state.position_offset)
        self.page_counts.taken[state.request_id] = self.pages_needed(
            state.request_id, state.position_offset, 0
        )

    def _drop_rows(self) -> None:
        if self._gone:
            kept = [row for row, request in enumerate(self.rows) if request not in self._gone]
            for part in self.parts:
                part.select_rows(kept)
            self.rows = [self.rows[row] for row in kept]
            self._gone.clear()

    def _shrink_rows(self) -> None:
        fresh = [row for row, request in enumerate(self.rows) if request in self.starts.fresh]
        for part in self.parts:
            if fresh and part.compression.waits_for_pressure:
                part.shrink(np.array(fresh))
        self.starts.fresh.clear()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        sliding_window: int | None,
    ) -> Tensor:
        """[heads, n, size] from [heads, n, head_dim] and [kv_heads, n, ...]: n tokens, flat."""
        part = self._holder[layer]
        rules = terms, _window(sliding_window) if sliding_window else None
        if part.step is None:
            counts = np.zeros(len(self.rows), dtype=np.int64)
            counts[self._row_of] = self._lengths
            part.begin(counts, _geometry(key, value))
        if self._row_of == list(range(len(self.rows))) and set(self._lengths) == {1}:
            # Flat tokens are rows of one token each: [rows, heads, 1, size].
            q, k, v = (x.transpose(0, 1)[:, :, None] for x in (query, key, value))
            return part.attend(layer, q, k, v, *rules)[:, :, 0].transpose(0, 1)
        queries, keys, values = (self._by_row(x) for x in (query, key, value))
        outputs = part.attend_ragged(layer, queries, keys, values, *rules)
        return torch.cat([outputs[row] for row in self._row_of], 1)

    def _by_row(self, flat: Tensor) -> list[Tensor]:
        parts = [flat[:, :0]] * len(self.rows)
        for row, part in zip(self._row_of, flat.split(self._lengths, 1), strict=True):
            parts[row] = part
        return parts


class _Allocator:
    """What transformers asks about a kind of layers. There is one kind."""

    index = 0
    read_trash_index = 0
    write_trash_index = 0

    def __init__(self, cache: BatchCache) -> None:
        self._cache = cache
        self.block_table: dict[str, list[int]] = {}

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Tokens that the new ones can look at, before compression."""
        return past_length + query_length

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        """Pages that a request's next step needs and it does not have."""
        needed = self._cache.pages_needed(request_id, past_length, query_length)
        return needed - self._cache.page_counts.taken.get(request_id, 0)


def _window(size: int) -> Bias:
    """Queries see the last `size` tokens, their own included."""

    def bias(row: int, queries: Tensor, entries: Tensor) -> Tensor:
        age = queries[:, None] - entries[:, None]
        return torch.where((age >= 0) & (age < size), 0.0, -torch.inf)

    return bias


def _geometry(key: Tensor, value: Tensor) -> Geometry:
    sizes = key.shape[-1], value.shape[-1]
    return Geometry(len(key), *sizes, key.dtype, value.dtype, key.device)
