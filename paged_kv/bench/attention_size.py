"""What attention over pages is timed with: random operands of a size."""

from __future__ import annotations

from typing import NamedTuple

import torch

PAGE_SIZE = 32
DTYPE = torch.bfloat16


class Size(NamedTuple):
    """Sequences of equal length; heads are query heads."""

    sequences: int
    entries: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def pages(self) -> int:
        """Of a sequence."""
        return -(-self.entries // PAGE_SIZE)

    def table(self, device: str = "cpu") -> torch.Tensor:
        """int32 [sequences, pages]: in any order."""
        order = torch.randperm(self.sequences * self.pages, device=device)
        return order.int().view(self.sequences, -1)

    def counts(self, device: str = "cpu") -> torch.Tensor:
        """int32 [sequences]: entries of each."""
        return torch.full((self.sequences,), self.entries, dtype=torch.int32, device=device)

    def starts(self, tokens: int = 1, device: str = "cpu") -> torch.Tensor:
        """int32 [sequences + 1]: where the queries of each begin, of so many tokens."""
        return torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * tokens

    def queries(self, tokens: int = 1, device: str = "cpu") -> torch.Tensor:
        """[sequences * tokens, heads, head_dim]."""
        shape = self.sequences * tokens, self.heads, self.head_dim
        return torch.randn(shape, device=device).to(DTYPE)

    def entries_of(self, count: int, device: str = "cpu") -> torch.Tensor:
        """[count, kv_heads, head_dim]: keys or values."""
        return torch.randn(count, self.kv_heads, self.head_dim, device=device).to(DTYPE)
