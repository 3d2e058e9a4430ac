"""Metadata builders that see what compactions have left of each sequence."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from paged_kv.vllm.worker.block_table import RetainedTables
from paged_kv.vllm.worker.step import Compactor


def retaining_builder(builder: Any, compactor: Compactor | None) -> Any:
    """A subclass of a builder that knows the retained entries; its own build has to use them.

    A graph may be captured over the attention if nothing in it is Python of ours: what is read is
    prepared here, before it, and compactions follow it. Policies to which the forward pass shows
    its queries (a ring of the last ones, scores, statistics that are gathered) note them in each
    layer, by plans that change from step to step: their attention stays outside of graphs.

    Args:
        builder: of the attention backend that vLLM selected.
        compactor: knows them; None: nothing is ever dropped in these layers.
    """

    class RetainingBuilder(builder):
        # FlashAttention would take another group's metadata and put an unshifted table into it.
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._tables = RetainedTables(self.vllm_config.scheduler_config.max_num_seqs)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """The backend's own, or, where queries are shown, piecewise graphs only."""
            if compactor is not None and compactor.observer.looks_at_queries:
                return AttentionCGSupport.NEVER
            support: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return support

        def retained(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
            """Metadata of the retained entries; the compactor notes who compacts afterwards."""
            if compactor is None:
                return metadata
            spec = self.kv_cache_spec
            evicted = compactor.begin_batch(spec, self.layer_names, metadata)
            if evicted.any() or self._in_graphs:
                return self._tables.skip(metadata, evicted, spec.block_size)
            return metadata

        @property
        def _in_graphs(self) -> bool:
            """Whether a graph may read the tables; known once vLLM has asked all builders."""
            mode = self.vllm_config.compilation_config.cudagraph_mode
            return mode is not None and mode.has_full_cudagraphs()

    return RetainingBuilder
