"""The worker's side: what each step reads, and the compactions that follow it.

Per step and layer group: the metadata builder asks for shifted metadata (slots that earlier steps
emptied are skipped), the events of this step are noted, and after the forward pass the survivors
move.
All decisions are host arithmetic on numbers that vLLM keeps on the host: nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from paged_kv.kernels.reference import move_entries
from paged_kv.policies.base import Events, Int64s, Policy
from paged_kv.vllm.layout import probe_elements, stack_layers
from paged_kv.vllm.spec import PagedSpec


class _Pages(NamedTuple):
    """Pages of the layers of one builder: stacked views, and where an entry lies in a page."""

    stacks: list[torch.Tensor]
    elements: torch.Tensor | None


@dataclass
class _Pending:
    """Events of one builder in this step."""

    layer_names: tuple[str, ...]
    block_table: torch.Tensor  # [rows, kernel pages]
    block_size: int  # of the kernel
    rows: Int64s  # [num_events], row of each event in block_table
    events: Events


class Compactor:
    """Compacts the sequences of one worker.

    Args:
        runner: vLLM's model runner (V1 or V2).
        policy: picks the survivors.
        layers: Attention layers by name (vLLM's static forward context).
    """

    def __init__(self, runner: Any, policy: Policy, layers: dict[str, Any]) -> None:
        self.runner = runner
        self.policy = policy
        self.layers = layers
        self.num_events = 0
        self._in_step = False
        self._pending: list[_Pending] = []
        self._pages: dict[tuple[str, ...], _Pages] = {}

    def reset_pages(self) -> None:
        """Forgets the caches: they have been allocated anew."""
        self._pages.clear()

    @contextmanager
    def step(self, snapshots: Sequence[KVCacheBlockCopy] = ()) -> Iterator[None]:
        """Around the execution of a real step; compacts at its end. Dummy runs stay outside.

        Args:
            snapshots: pages to copy before the compaction, for the prefix cache.
        """
        self._in_step = True
        self._pending.clear()
        try:
            yield
            if snapshots:
                num_pages = self.runner.kv_cache_config.num_blocks
                copy_kv_cache_blocks_inplace(self.runner.kv_caches, num_pages, snapshots)
            for pending in self._pending:
                self._compact(pending)
        finally:
            self._in_step = False
            self._pending.clear()

    def shift(
        self, spec: PagedSpec, layer_names: list[str], metadata: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The metadata of what is left of each sequence; notes who compacts after this step."""
        if not self._in_step:
            return metadata
        after = metadata.seq_lens_cpu_upper_bound.numpy()[: metadata.num_reqs].astype(np.int64)
        starts = metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1].astype(np.int64)
        prompt_lens = self._prompt_lens(metadata)
        evicted = spec.schedule.evicted(after - np.diff(starts), prompt_lens)
        evicted_after = spec.schedule.evicted(after, prompt_lens)
        rows = np.flatnonzero(evicted_after > evicted)
        if rows.size:
            events = Events(evicted[rows], evicted_after[rows], after[rows])
            table = metadata.block_table_tensor
            names = tuple(layer_names)
            self._pending.append(_Pending(names, table, spec.block_size, rows, events))
        return _skip(metadata, evicted, spec.block_size) if evicted.any() else metadata

    def _prompt_lens(self, metadata: CommonAttentionMetadata) -> Int64s:
        if metadata.req_idx is not None:  # V2 runner: rows are indices into its request table
            lens = self.runner.req_states.prompt_len.np[metadata.req_idx]
        else:
            lens = self.runner.input_batch.num_prompt_tokens[: metadata.num_reqs]
        return lens.astype(np.int64)

    def _compact(self, pending: _Pending) -> None:
        moves = self.policy.moves(pending.events)
        self.num_events += len(pending.rows)
        table = pending.block_table
        rows = torch.from_numpy(pending.rows[moves.event]).to(table.device, non_blocking=True)
        source, target = (
            _physical(slots, rows, table, pending.block_size)
            for slots in (moves.source, moves.target)
        )
        pages = self._pages_of(pending.layer_names)
        for stack in pages.stacks:
            move_entries(stack, source, target, pages.elements)

    def _pages_of(self, layer_names: tuple[str, ...]) -> _Pages:
        if layer_names not in self._pages:
            layers = [self.layers[name] for name in layer_names]
            caches = [layer.kv_cache for layer in layers]
            elements = None
            if caches[0].device.type == "cpu":
                elements = probe_elements(layers[0], caches[0])
                caches = [cache.flatten(2) for cache in caches]
            self._pages[layer_names] = _Pages(stack_layers(caches), elements)
        return self._pages[layer_names]


def _physical(
    slots: Int64s, rows: torch.Tensor, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(page ids, offsets) of logical slots."""
    index = torch.from_numpy(slots).to(table.device, non_blocking=True)
    return table[rows, index // block_size].long(), index % block_size


def _skip(
    metadata: CommonAttentionMetadata, evicted: Int64s, block_size: int
) -> CommonAttentionMetadata:
    """Hides the evicted slots of each row: its table starts later, its length is what is retained.

    Never in place: the groups share one metadata.
    """
    shift = torch.from_numpy(evicted)
    left = metadata.seq_lens_cpu_upper_bound - shift.to(torch.int32)
    max_len = int(left.max())
    table = metadata.block_table_tensor
    width = -(-max_len // block_size)
    device_shift = shift.to(table.device, non_blocking=True)
    columns = torch.arange(width, device=table.device) + (device_shift // block_size)[:, None]
    return metadata.replace(
        block_table_tensor=table.gather(1, columns.clamp_(max=table.shape[1] - 1)),
        seq_lens=metadata.seq_lens - device_shift.to(metadata.seq_lens.dtype),
        seq_lens_cpu_upper_bound=left,
        max_seq_len=max_len,
        _num_computed_tokens_cache=None,
    )
