"""Logical slots of a batch: where they lie, and metadata without those that are freed."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.policies.base import Int64s


def physical(
    slots: Int64s, rows: torch.Tensor, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(page ids, offsets) of logical slots."""
    index = torch.from_numpy(slots).to(table.device, non_blocking=True)
    return table[rows, index // block_size].long(), index % block_size


def skip(
    metadata: CommonAttentionMetadata, evicted: Int64s, block_size: int
) -> CommonAttentionMetadata:
    """Hides the evicted slots of each row: its table starts later, its length is what is retained.

    Never in place: the groups share one metadata.
    """
    shift = torch.from_numpy(evicted)
    lengths = metadata.seq_lens_cpu_upper_bound - shift.to(torch.int32)
    max_len = int(lengths.max())
    table = metadata.block_table_tensor
    width = -(-max_len // block_size)
    device_shift = shift.to(table.device, non_blocking=True)
    columns = torch.arange(width, device=table.device) + (device_shift // block_size)[:, None]
    return metadata.replace(
        block_table_tensor=table.gather(1, columns.clamp_(max=table.shape[1] - 1)),
        seq_lens=metadata.seq_lens - device_shift.to(metadata.seq_lens.dtype),
        seq_lens_cpu_upper_bound=lengths,
        max_seq_len=max_len,
        _num_computed_tokens_cache=None,
    )
