"""Wraps whichever attention backend vLLM selected: it reads what is retained, and is observed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

if TYPE_CHECKING:
    from paged_kv.vllm.worker.step import Compactor


def wrap_backend(backend: type[AttentionBackend], compactor: Compactor) -> type[AttentionBackend]:
    """A subclass of backend whose metadata skips evicted slots; the kernels stay as they are."""
    builder: Any = backend.get_builder_cls()

    class PagedMetadataBuilder(builder):
        """Shifts the metadata, then builds as before."""

        # FlashAttention would take another group's metadata and put an unshifted table into it.
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """A graph over the attention would skip all of this: piecewise graphs only."""
            return AttentionCGSupport.NEVER

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            """Metadata of the retained entries."""
            shifted = compactor.shift(self.kv_cache_spec, self.layer_names, common_attn_metadata)
            return super().build(common_prefix_len, shifted, *args, **kwargs)

    return subclass_attention_backend("PagedKV", backend, PagedMetadataBuilder)


def observe_layer(layer: Any, name: str, compactor: Compactor) -> None:
    """Has a layer's attention show its queries. Outside of graphs: vLLM splits them here."""
    forward = layer.impl.forward

    @functools.wraps(forward)
    def observed(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> Any:
        output = forward(self, query, key, value, *args, **kw)
        compactor.observe(name, query)
        return output

    layer.impl.forward = observed
