"""Logical slots of a batch: where they lie, and metadata without those that are freed."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.core.schedule import cdiv
from paged_kv.policies.base import Int64s
from paged_kv.store.ragged import to_device

Tensor = torch.Tensor


def physical(slots: Int64s, rows: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(page ids, offsets) of logical slots."""
    index = to_device(slots, table.device)
    return table[rows, index // block_size].long(), index % block_size


class RetainedTables:
    """Block tables and lengths of what is retained, at the same addresses in every step.

    A CUDA graph over the attention reads them where they were when it was captured. They are
    written in stream order, before the step that reads them; as large as vLLM's own, they are
    made with the first batch:

        vLLM's row       0      evicted                 length
                         | freed | a b c ............... |  what is not the row's
        the row here     | a b c ............... | of earlier steps: nobody reads it

    Args:
        max_num_rows: most rows of a batch, padding included.
    """

    def __init__(self, max_num_rows: int) -> None:
        self.max_num_rows = max_num_rows
        self._table: Tensor | None = None  # [max_num_rows, pages], page ids
        self._lens: Tensor | None = None  # [max_num_rows]

    def skip(
        self, metadata: CommonAttentionMetadata, evicted: Int64s, block_size: int
    ) -> CommonAttentionMetadata:
        """Hides the evicted slots of each row: its table starts later, its length is what is left.

        Never in place: vLLM's groups share one metadata. Rows that vLLM padded stay as they are:
        of length 0, or, in a capture, of what the backend wants.

        Args:
            metadata: of the batch.
            evicted: int64 [rows], a multiple of block_size for each; 0 for padding.
            block_size: of the kernel.
        """
        source = metadata.block_table_tensor[: metadata.num_reqs]
        table, lens = self._rows(source, metadata.seq_lens)
        if not evicted.any():
            width = cdiv(metadata.max_seq_len, block_size)  # in a capture all that there is
            table[:, :width].copy_(source[:, :width])
            lens.copy_(metadata.seq_lens)
            return metadata.replace(block_table_tensor=table, seq_lens=lens)
        retained = metadata.seq_lens_cpu_upper_bound.numpy() - evicted.astype(np.int32)
        max_len = int(retained.max())
        width = cdiv(max_len, block_size)
        shift = to_device(evicted, table.device)[:, None]
        columns = torch.arange(width, device=table.device) + shift // block_size
        columns.clamp_(max=source.shape[1] - 1)  # behind the end of shorter rows
        torch.gather(source, 1, columns, out=table[:, :width])
        torch.sub(metadata.seq_lens, shift[:, 0], out=lens)
        return metadata.replace(
            block_table_tensor=table,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=torch.from_numpy(retained),
            max_seq_len=max_len,
            _num_computed_tokens_cache=None,
        )

    def _rows(self, table: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """The memory for a batch like this one."""
        if self._table is None or self._lens is None:
            with torch.inference_mode(False):  # changed in both modes, like vLLM's
                self._table = table.new_zeros((self.max_num_rows, table.shape[1]))
                self._lens = lens.new_zeros(self.max_num_rows)
        return self._table[: len(table)], self._lens[: len(table)]
