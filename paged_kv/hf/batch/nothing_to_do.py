"""What transformers asks of its cache that ours has no use for."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


class NothingToDo:
    """Answers of a cache without prefix sharing, block tables and swap."""

    use_prefix_sharing = False
    allow_block_sharing = False
    max_blocks_per_request = 0
    max_decode_fast_path_length = 0
    bytes_per_sector = 1
    read_cache_limit = 0  # nothing is read through an index
    max_tokens_read = 1  # so the index needs no room

    def try_to_free_sectors(self) -> None:
        """Nothing to do: pages are free at once."""

    def evict_cached_blocks(self) -> bool:
        """No pages outlive their request."""
        return False

    # ---- what the preparation of a batch asks

    def count_new_complete_blocks(self, state: Any, request_len: int) -> dict[str, int]:
        """Only prefix sharing needs it."""
        return {}

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """Only prefix sharing needs it."""

    def extend_read_and_write_indices(self, *_: Any) -> None:
        """Sequences knows where entries are."""

    # ---- what models ask, from transformers 5.24 on

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new ones as they are: the attention function stores them, see attend."""
        return key, value

    def get_seq_length(self) -> int:
        """For models that would count positions themselves: all of them are given."""
        return 0
