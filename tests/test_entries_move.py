"""Entries of 8 and 16 bits in real vLLM: a compaction moves them bit for bit."""

from __future__ import annotations

from typing import Any

import engines
import english
import pytest
import torch
from stores import CHUNKS, STORES, skip_without_fp8

pytestmark = [pytest.mark.vllm, pytest.mark.model]


class Ledger:
    """Follows the bits of every entry by its position, through all compactions of a worker.

    The model's arithmetic is out of it: what a compaction leaves must be, bit for bit, the entries
    of the sinks and of the newest positions, as they were first written.
    """

    def __init__(self, worker: Any, num_sinks: int) -> None:
        self.runner = worker.model_runner
        self.compactor = worker.compactor
        self.num_sinks = num_sinks
        self.num_checked = 0
        self.entries: dict[tuple[str, str], dict[int, bytes]] = {}  # (request, layer): position
        self.elements: dict[str, torch.Tensor] = {}  # bytes of each entry in a page
        self.compact = self.compactor._compact
        self.compactor._compact = self.checked

    def checked(self, pending: Any) -> None:
        for row, before, num_tokens in self.rows(pending, "evicted_before"):
            for name in pending.layer_names:
                known = self.entries.setdefault((self.runner.input_batch.req_ids[row], name), {})
                # What came since the last compaction lies where its position says.
                new = range(max(known, default=-1) + 1, num_tokens)
                assert new.start >= before
                slots = list(new)
                bits = self.read(name, pending, row, slots)
                known.update(zip(slots, bits, strict=True))
        self.compact(pending)
        for row, after, num_tokens in self.rows(pending, "evicted_after"):
            for name in pending.layer_names:
                self.check(name, pending, row, after, num_tokens)

    def check(self, name: str, pending: Any, row: int, evicted: int, num_tokens: int) -> None:
        known = self.entries[self.runner.input_batch.req_ids[row], name]
        newest = range(evicted + self.num_sinks, num_tokens)
        expected = {position: known[position] for position in [*range(self.num_sinks), *newest]}
        slots = list(range(evicted, num_tokens))
        found = self.read(name, pending, row, slots)
        assert sorted(found) == sorted(expected.values())
        self.entries[self.runner.input_batch.req_ids[row], name] = expected
        self.num_checked += 1

    def rows(self, pending: Any, which: str) -> list[tuple[int, int, int]]:
        events = pending.events
        columns = (pending.rows, getattr(events, which), events.num_tokens)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def read(self, name: str, pending: Any, row: int, slots: list[int]) -> list[bytes]:
        """The bits of the entries in these logical slots, all heads together."""
        layer, index = self.compactor.layers[name], torch.tensor(slots, dtype=torch.int64)
        if name not in self.elements:
            self.elements[name] = self.bytes_of(name, layer)
        page = pending.block_table[row, index // pending.block_size].long()
        elements = self.elements[name][index % pending.block_size]
        pages = layer.kv_cache.flatten(2).view(torch.uint8)
        entries = pages[page[:, None], :, elements]  # [slots, bytes, heads]
        return [entry.tobytes() for entry in entries.numpy()]

    def bytes_of(self, name: str, layer: Any) -> torch.Tensor:
        """int64 [page_size, bytes]: where in a page of a head the bytes of each entry lie."""
        from paged_kv.vllm.worker.layout import probe_elements

        if name in self.compactor.layouts:
            return self.compactor.layouts[name].elements
        size = layer.kv_cache.element_size()
        found = probe_elements(layer, layer.kv_cache)[..., None] * size
        return (found + torch.arange(size)).flatten(1)


@pytest.fixture(scope="module")
def text(smollm2_dir) -> list[int]:
    return english.encode(smollm2_dir)


def check_moves(store: str, smollm2_dir: Any, text: list[int]) -> None:
    config = {"policy": "pyramidal+streaming", "budget": 128, "recent_window": 16}
    settings = {"block_size": 32, **CHUNKS, **STORES[store]}
    with engines.engine(str(smollm2_dir), config, **settings) as llm:
        ledger = Ledger(engines.worker(llm), num_sinks=4)
        engines.generate(llm, english.cut(text, [60, 150, 301]), 100)
    # 30 layers: each request compacts at the end of its prompt or later, and every 32 tokens.
    assert ledger.num_checked >= 30 * 3 * 2


@pytest.mark.parametrize("store", ["bfloat16", "fp8"])
def test_entries_of_vllms_pages_are_moved_bit_for_bit(store, smollm2_dir, text, without_kernels):
    skip_without_fp8(store)
    check_moves(store, smollm2_dir, text)


def test_entries_of_packed_pages_are_moved_bit_for_bit(smollm2_dir, text):
    check_moves("int4", smollm2_dir, text)
