"""Of the memory for the KV cache, what is left for pages: other things lie beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paged_kv.core.schedule import Schedule, cdiv
from paged_kv.store import side_data
from paged_kv.vllm.worker.layer_group import row_bytes
from paged_kv.vllm.worker.residual import ResidualRings
from paged_kv.vllm.worker.step import Compactor


@dataclass(frozen=True)
class Shares:
    """Who takes what of a worker's memory.

    Args:
        specs: of all layers, as their pages are stored.
        schedules: of the compressed layers.
        num_groups: KV cache groups of these.
        layers_per_page: layers of a group at most.
        max_num_seqs: requests that may run at once.
        compactor: has side data and a query ring; None without a policy.
        residual: has rings of native pages; None for none.
    """

    specs: Mapping[str, Any]
    schedules: Mapping[str, Schedule]
    num_groups: int
    layers_per_page: int
    max_num_seqs: int
    compactor: Compactor | None
    residual: ResidualRings | None

    def grow_rings(self, memory: int) -> None:
        """Makes room for the requests that fit into so many bytes."""
        if self.residual is not None:
            self.residual.requests.grow(self._residual_rows(memory))
        if self.compactor is not None:
            remainder = memory - self._residual_bytes(memory)
            self.compactor.requests.grow(self._query_rows(self.compactor, remainder))

    def for_pages(self, memory: int) -> int:
        """Of so many bytes for the KV cache, those for keys and values.

        Raises:
            ValueError: nothing is left.
        """
        remainder = memory - self._residual_bytes(memory)
        if self.compactor is None or self.compactor.positional:
            return remainder
        policy, layers = self.compactor.policy, list(self.compactor.layers.values())
        ring = (self._query_rows(self.compactor, remainder) + 1) * row_bytes(layers, policy)
        sizes = self._pages(self.compactor).values()
        stored, beside = (sum(parts) for parts in zip(*sizes, strict=True))
        # A page of the pool is one group's at a time, and so is what lies beside it.
        stored //= self.num_groups
        beside = beside * self._side_layers() // len(sizes)
        remainder = (remainder - ring) * stored // (stored + beside)
        if remainder <= 0:
            raise ValueError(
                f"the queries that this kv-policy observes take {ring} bytes (observation_window "
                f"{policy.observation_window}), more than the {memory} of the KV cache: lower "
                "observation_window, or give the KV cache more memory"
            )
        return int(remainder)

    def _side_layers(self) -> int:
        """Layers with side data of their own: groups of as many layers share it."""
        sizes = set()
        for count in Counter(self.schedules.values()).values():
            groups = cdiv(count, self.layers_per_page)  # as vLLM splits layers with equal specs
            sizes |= {count // groups, cdiv(count, groups)}
        return sum(sizes)

    def _query_rows(self, compactor: Compactor, memory: int) -> int:
        """Requests with an observation window that fit: each holds about a budget in each layer."""
        policy, layers = compactor.policy, list(compactor.layers.values())
        if not policy.observation_window:
            return 0
        least, pages = row_bytes(layers, policy), self._pages(compactor)
        for name, schedule in self.schedules.items():
            tokens = schedule.minimum + schedule.page_size - policy.observation_window
            least += max(1, cdiv(tokens, schedule.page_size)) * sum(pages[name])
        return min(self.max_num_seqs, max(1, memory // least))

    def _pages(self, compactor: Compactor) -> dict[str, tuple[int, int]]:
        """(bytes of a page, of its side data) of each compressed layer."""
        per_slot = side_data.bytes_per_slot(compactor.policy)
        specs = {name: self.specs[name] for name in compactor.layers}
        return {
            name: (spec.page_size_bytes, per_slot * spec.num_kv_heads * spec.block_size)
            for name, spec in specs.items()
        }

    def _residual_rows(self, memory: int) -> int:
        """Requests that fit: each holds a page at least."""
        assert self.residual is not None
        page = sum(spec.page_size_bytes for spec in self.specs.values())
        rows = memory // (self.residual.row_bytes + page)
        return min(self.max_num_seqs, max(1, rows))

    def _residual_bytes(self, memory: int) -> int:
        if self.residual is None:
            return 0
        taken = (self._residual_rows(memory) + 1) * self.residual.row_bytes
        if taken >= memory:
            raise ValueError(
                f"residual_pages {self.residual.num_pages} takes {taken} bytes, more than the "
                f"{memory} of the KV cache: lower it, or give the KV cache more memory"
            )
        return taken
