"""What generate() does to the rows of a PagedCache between two forward passes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from paged_kv.hf.layer_state import crop_layers
from paged_kv.hf.marks import check_crop
from paged_kv.hf.paged_layer import PagedLayer
from paged_kv.hf.sequences import Sequences

Tensor = torch.Tensor


class RowOperations(Cache):
    """Of a PagedCache; layers that are not paged do the same by themselves."""

    sequences: Sequences
    progress: list[int]
    _padded_at: int
    _is_broken: bool
    _check_open: Any

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens: all is as it was before them.

        Args:
            tokens_to_remove: minus their number; positive (deprecated by transformers): how many
                tokens to keep.

        Raises:
            ValueError: some of them are padding, or not all can be as it was: a compaction has seen
                some of them, or what steps overwrite is not remembered there (see marks.py).
        """
        self._check_open()
        count = -tokens_to_remove
        if tokens_to_remove > 0:
            count = max(0, self.progress[0] - tokens_to_remove)
        if count > self.progress[0] - self._padded_at:
            raise ValueError(
                f"crop(-{count}): {self.progress[0] - self._padded_at} tokens were processed since "
                "the last padding, and no more can be removed"
            )
        check_crop(self.sequences, self.sequences.marks, count)
        if count or self.sequences.waits_for_crop:
            crop_layers(self._others(), count)
        try:
            self.sequences.crop(count)
        except BaseException as error:  # the other layers have gone back by now
            self._is_broken = bool(self._others()) or not isinstance(error, ValueError)
            raise
        self.progress[0] -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; rows that come from one share its pages."""
        self._select(beam_idx)
        for layer in self._others():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select(torch.arange(self.sequences.num_rows).repeat_interleave(repeats))
        for layer in self._others():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self._select(torch.arange(self.sequences.num_rows)[indices.cpu()])
        for layer in self._others():
            layer.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Nothing is dropped before crop has said which tokens are final."""
        self.sequences.waits_for_crop = True
        super().activate_past_recording()

    def _select(self, indices: Tensor) -> None:
        self._check_open()
        if self.sequences.num_rows:
            self.sequences.select_rows(indices.tolist())

    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PagedLayer)]
