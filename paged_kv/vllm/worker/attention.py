"""Wraps whichever attention backend vLLM selected: it reads what is retained, and is observed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from paged_kv.vllm.worker.metadata import retaining_builder
from paged_kv.vllm.worker.observer import Observer
from paged_kv.vllm.worker.step import Compactor


def wrap_backend(backend: type[AttentionBackend], compactor: Compactor) -> type[AttentionBackend]:
    """A subclass of backend whose metadata skips evicted slots; the kernels stay as they are."""
    builder: Any = retaining_builder(backend.get_builder_cls(), compactor)

    class PagedMetadataBuilder(builder):
        """Builds as before, of what is retained."""

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            """Metadata of the retained entries."""
            retained = self.retained(common_attn_metadata)
            return super().build(common_prefix_len, retained, *args, **kwargs)

    return subclass_attention_backend("PagedKV", backend, PagedMetadataBuilder)


def observe_layer(layer: Any, name: str, observer: Observer) -> None:
    """Has a layer's attention show queries and keys. Outside of graphs: vLLM splits them here."""
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
        observer.observe(name, query, key)
        return output

    layer.impl.forward = observed
