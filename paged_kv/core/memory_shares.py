"""Of the memory for a worker's KV cache, what is left for pages: other things lie beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from paged_kv.core.schedule import Schedule, cdiv

Layer = TypeVar("Layer", bound=Hashable)  # its name, or its number


@dataclass(frozen=True)
class MemoryShares(Generic[Layer]):
    """Who takes what. All sizes are bytes, of one worker.

    Args:
        page_bytes: of a page of each layer, as it is stored.
        schedules: of the compressed layers.
        side_bytes: beside a page of each compressed layer; empty where nothing is.
        num_groups: KV cache groups of the compressed layers.
        layers_per_page: layers of a group at most.
        max_num_seqs: requests that may run at once.
        observation_window: last queries that are kept of a request; 0 for none.
        query_row_bytes: of these, for one request, in all compressed layers.
        residual_pages: native pages that are kept of a request; 0 for none.
        residual_row_bytes: of these, in all layers that have them.
    """

    page_bytes: Mapping[Layer, int]
    schedules: Mapping[Layer, Schedule]
    side_bytes: Mapping[Layer, int]
    num_groups: int
    layers_per_page: int
    max_num_seqs: int
    observation_window: int = 0
    query_row_bytes: int = 0
    residual_pages: int = 0
    residual_row_bytes: int = 0

    @property
    def pool_page_bytes(self) -> int:
        """Of a page of vLLM's pool: one page in each layer of a group."""
        sizes = list(self.page_bytes.values())
        if len(set(sizes)) > 1:  # in one group
            return sum(sizes)
        return sizes[0] * self.layers_per_page

    @property
    def beside_page_bytes(self) -> int:
        """What lies beside a page of the pool: that is one group's at a time, and so is this."""
        if not self.side_bytes:
            return 0
        return sum(self.side_bytes.values()) * self._side_layers() // len(self.side_bytes)

    def for_pages(self, memory: int) -> int:
        """Of so many bytes for the KV cache, those for keys and values.

        Raises:
            ValueError: nothing is left.
        """
        remainder = memory - self._residual(memory)
        if not self.side_bytes:
            return remainder
        ring = (self.query_rows(memory) + 1) * self.query_row_bytes
        stored = sum(self.page_bytes[layer] for layer in self.side_bytes) // self.num_groups
        remainder = (remainder - ring) * stored // (stored + self.beside_page_bytes)
        if remainder <= 0:
            raise ValueError(
                f"the queries that this kv-policy observes take {ring} bytes (observation_window "
                f"{self.observation_window}), more than the {memory} of the KV cache: lower "
                "observation_window, or give the KV cache more memory"
            )
        return remainder

    def query_rows(self, memory: int) -> int:
        """Requests with an observation window that fit: each holds about a budget in each layer."""
        if not self.observation_window:
            return 0
        remainder = memory - self._residual(memory)
        least = self.query_row_bytes
        for layer, schedule in self.schedules.items():
            tokens = schedule.minimum + schedule.page_size - self.observation_window
            pages = max(1, cdiv(tokens, schedule.page_size))
            least += pages * (self.page_bytes[layer] + self.side_bytes[layer])
        return min(self.max_num_seqs, max(1, remainder // least))

    def residual_rows(self, memory: int) -> int:
        """Requests with a residual that fit: each holds a page at least."""
        if not self.residual_pages:
            return 0
        rows = memory // (self.residual_row_bytes + sum(self.page_bytes.values()))
        return min(self.max_num_seqs, max(1, rows))

    def _residual(self, memory: int) -> int:
        if not self.residual_pages:
            return 0
        taken = (self.residual_rows(memory) + 1) * self.residual_row_bytes
        if taken >= memory:
            raise ValueError(
                f"residual_pages {self.residual_pages} takes {taken} bytes, more than the "
                f"{memory} of the KV cache: lower it, or give the KV cache more memory"
            )
        return taken

    def _side_layers(self) -> int:
        """Layers with side data of their own: groups of as many layers share it."""
        sizes = set()
        for count in Counter(self.schedules.values()).values():
            groups = cdiv(count, self.layers_per_page)  # as vLLM splits layers with equal specs
            sizes |= {count // groups, cdiv(count, groups)}
        return sum(sizes)
