"""Metadata builders that see what compactions have left of each sequence."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from paged_kv.vllm.worker.step import Compactor


def retaining_builder(builder: Any, compactor: Compactor | None) -> Any:
    """A subclass of a builder that knows the retained entries; its own build has to use them.

    Args:
        builder: of the attention backend that vLLM selected.
        compactor: knows them; None: nothing is ever dropped in these layers.
    """

    class RetainingBuilder(builder):
        # FlashAttention would take another group's metadata and put an unshifted table into it.
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """A graph over the attention would skip all of this: piecewise graphs only."""
            return AttentionCGSupport.NEVER

        def retained(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
            """Metadata of the retained entries; the compactor notes who compacts afterwards."""
            if compactor is None:
                return metadata
            return compactor.shift(self.kv_cache_spec, self.layer_names, metadata)

    return RetainingBuilder
