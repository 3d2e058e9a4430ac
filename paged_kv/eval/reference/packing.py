"""What the reference engine holds of a layer: numbers as they come back from pages of a format."""

from __future__ import annotations

import torch

from paged_kv.core.page_formats import NATIVE
from paged_kv.kernels.page_layout import Codec
from paged_kv.quant import make_layout

Tensor = torch.Tensor


class Packing:
    """A layer's page format, and its residual: the newest entries as they were.

    Args:
        page_format: of the layer.
        residual_pages: newest pages that attention reads as they were.
        page_size: tokens per page.
    """

    def __init__(
        self, page_format: str = NATIVE, residual_pages: int = 0, page_size: int = 1
    ) -> None:
        self.is_native = page_format == NATIVE
        self._format, self._page_size = page_format, page_size
        self._residual_pages = 0 if self.is_native else residual_pages
        self._codecs: dict[str, Codec] = {}
        self._newest: dict[str, Tensor] = {}  # [kv_heads, n, size]

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New entries [kv_heads, n, size] as they will be read. Raises ValueError: see quant."""
        if self.is_native:
            return keys, values
        if not self._codecs:
            sizes = keys.shape[-1], values.shape[-1]
            layout = make_layout(self._format, keys.dtype, *sizes, self._page_size)
            self._codecs = {"keys": layout.key, "values": layout.value}
        for name, new in (("keys", keys), ("values", values)) if self._residual_pages else ():
            known = torch.cat([self._newest.get(name, new[:, :0]), new], 1)
            self._newest[name] = known[:, -self._residual_pages * self._page_size :]
        return self.stored("keys", keys), self.stored("values", values)

    def stored(self, name: str, numbers: Tensor) -> Tensor:
        """Keys or values [..., size] as they come back from a page."""
        codec = self._codecs[name]
        return codec.decode(codec.encode(numbers.float())).to(numbers.dtype)

    def attended(self, name: str, entries: Tensor, num_tokens: int) -> Tensor:
        """Keys or values that attention reads, of the entries [kv_heads, m, size].

        The residual begins with a page, so that it is the same however tokens come.
        """
        if not self._residual_pages:
            return entries
        pages = -(-num_tokens // self._page_size) - self._residual_pages
        count = num_tokens - max(0, pages) * self._page_size
        newest = self._newest[name][:, -count:]
        return torch.cat([entries[:, : entries.shape[1] - count], newest], 1)

    def num_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of entries [kv_heads, m, size] as pages store them, residual included."""
        if self.is_native:
            return sum(tensor.numel() * tensor.element_size() for tensor in (keys, values))
        entry = sum(codec.num_bytes for codec in self._codecs.values())
        newest = sum(tensor.numel() * tensor.element_size() for tensor in self._newest.values())
        return keys.shape[0] * keys.shape[1] * entry + newest

    def copy(self) -> Packing:
        """One that goes on by itself."""
        other = Packing(self._format, self._residual_pages, self._page_size)
        other._codecs, other._newest = self._codecs, dict(self._newest)
        return other
