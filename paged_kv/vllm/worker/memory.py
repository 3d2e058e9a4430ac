"""What lies beside a worker's pages, as core.memory_shares wants it, and the rings that grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paged_kv.core.memory_shares import MemoryShares
from paged_kv.core.schedule import Schedule
from paged_kv.store import side_data
from paged_kv.vllm.plan import GroupedPlan
from paged_kv.vllm.worker.layer_group import row_bytes
from paged_kv.vllm.worker.residual import ResidualRings
from paged_kv.vllm.worker.step import Compactor


@dataclass(frozen=True)
class Shares:
    """Who takes what of a worker's memory.

    Args:
        specs: of all layers, as their pages are stored.
        schedules: of the compressed layers.
        plan: has the KV cache groups.
        max_num_seqs: requests that may run at once.
        compactor: has side data and a query ring; None without a policy.
        residual: has rings of native pages; None for none.
    """

    specs: Mapping[str, Any]
    schedules: Mapping[str, Schedule]
    plan: GroupedPlan
    max_num_seqs: int
    compactor: Compactor | None
    residual: ResidualRings | None

    def grow_rings(self, memory: int) -> None:
        """Makes room for the requests that fit into so many bytes."""
        if self.residual is not None:
            self.residual.requests.grow(self.memory.residual_rows(memory))
        if self.compactor is not None:
            self.compactor.requests.grow(self.memory.query_rows(memory))

    @cached_property
    def memory(self) -> MemoryShares[str]:
        """The sizes."""
        compactor, residual = self.compactor, self.residual
        window = ring = 0
        if compactor is not None:
            window = compactor.policy.observation_window
            ring = row_bytes(list(compactor.layers.values()), compactor.policy)
        return MemoryShares(
            page_bytes={name: spec.page_size_bytes for name, spec in self.specs.items()},
            schedules=self.schedules,
            side_bytes=self._side_bytes(),
            num_groups=self.plan.num_groups,
            layers_per_page=self.plan.layers_per_page,
            max_num_seqs=self.max_num_seqs,
            observation_window=window,
            query_row_bytes=ring,
            residual_pages=0 if residual is None else residual.num_pages,
            residual_row_bytes=0 if residual is None else residual.row_bytes,
        )

    def _side_bytes(self) -> dict[str, int]:
        """Of what lies beside a page of each compressed layer."""
        if self.compactor is None or self.compactor.positional:
            return {}
        per_slot = side_data.bytes_per_slot(self.compactor.policy)
        specs = ((name, self.specs[name]) for name in self.compactor.layers)
        return {name: per_slot * spec.num_kv_heads * spec.block_size for name, spec in specs}
