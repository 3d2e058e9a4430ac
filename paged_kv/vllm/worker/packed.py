"""Attention layers whose pages are ours: what is written, and how it is read.

vLLM allocates, shares and frees these pages like any others; it only has to know how many bytes a
token takes. Writing and attention are replaced in the layer's `impl`, metadata in its backend.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from paged_kv.core.page_formats import NATIVE
from paged_kv.core.schedule import cdiv
from paged_kv.kernels import ops
from paged_kv.kernels.operands import NO_SIDE, Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant import PAGE_SIZES, make_layout
from paged_kv.store.attention import attend
from paged_kv.store.residual_ring import Newest
from paged_kv.vllm.worker.layer_group import packed_view
from paged_kv.vllm.worker.metadata import retaining_builder
from paged_kv.vllm.worker.observer import Observer
from paged_kv.vllm.worker.residual import ResidualRings
from paged_kv.vllm.worker.step import Compactor

Tensor = torch.Tensor


@dataclass
class PackedMetadata:
    """What attention over packed pages needs to know of a batch.

    Args:
        num_actual_tokens: tokens of the batch, without padding.
        starts: int32 [rows + 1], see Queries.
        table: int32 [rows, pages], page ids of what each row holds.
        counts: int32 [rows], entries that each row holds after this step.
        newest: which of them are read from the residual; None for none.
    """

    num_actual_tokens: int
    starts: Tensor
    table: Tensor
    counts: Tensor
    newest: Newest | None = None


def layout_of(spec: FullAttentionSpec, page_format: str) -> PageLayout:
    """The packed pages of a layer with this spec. Raises ValueError: it cannot have them."""
    return make_layout(page_format, spec.dtype, spec.head_size, spec.head_size_v, spec.block_size)


def packed_spec(spec: FullAttentionSpec, page_format: str) -> FullAttentionSpec:
    """The spec of a layer with packed pages: vLLM counts their bytes."""
    if page_format == NATIVE:
        return spec
    num_bytes = layout_of(spec, page_format).entry_bytes
    return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=num_bytes)


def packed_backend(
    backend: type[AttentionBackend], compactor: Compactor | None, residual: ResidualRings | None
) -> type[AttentionBackend]:
    """A subclass of backend that makes PackedMetadata, of what compactions have left.

    Our attention is launched by Python, with plans for residuals and scores that change from step
    to step: it stays outside of CUDA graphs.
    """
    builder: Any = retaining_builder(backend.get_builder_cls(), compactor)

    class PackedMetadataBuilder(builder):
        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """Piecewise graphs only."""
            return AttentionCGSupport.NEVER

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> PackedMetadata:
            metadata = self.retained(common_attn_metadata)
            rows = metadata.num_reqs
            # Kernels split what a table has room for: nobody holds more than this.
            pages = cdiv(metadata.max_seq_len, self.kv_cache_spec.block_size)
            made = PackedMetadata(
                metadata.num_actual_tokens,
                metadata.query_start_loc[: rows + 1],
                metadata.block_table_tensor[:rows, :pages],
                metadata.seq_lens[:rows],
            )
            if residual is not None:
                made.newest = residual.newest(common_attn_metadata)
            return made

    overrides = {
        "get_builder_cls": lambda: PackedMetadataBuilder,
        "get_supported_kernel_block_sizes": lambda spec=None: [MultipleOf(PAGE_SIZES.step)],
    }
    return type(f"Packed{backend.__name__}", (backend,), overrides)


class PackedAttention:
    """Takes the place of what a layer's `impl` does.

    Args:
        name: of the layer.
        layer: vLLM's Attention layer.
        layout: of its pages.
        observer: may want attention summed up; None for none.
        residual: holds the newest pages in the model's dtype; None for none.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        layout: PageLayout,
        observer: Observer | None,
        residual: ResidualRings | None,
    ) -> None:
        self.name = name
        self.layer = layer
        self.layout = layout
        self.observer = observer
        self.residual = residual
        self._cache: Tensor | None = None
        self._blocks: Tensor | None = None
        layer.impl.forward = self.forward
        layer.impl.do_kv_cache_update = self.write

    def write(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        """vLLM's do_kv_cache_update: stores [tokens, kv_heads, size] in slots [tokens]."""
        key, value = key[: len(slots)], value[: len(slots)]
        ops.write(self._blocks_of(cache), self.layout, key, value, slots)
        if self.residual is not None:
            self.residual.write(self.name, key, value)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        metadata: PackedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """vLLM's forward: fills output [tokens, heads, size]."""
        assert output_scale is None
        assert output_block_scale is None
        if metadata is None:  # vLLM warms up
            return output
        pages = Segment(self._blocks_of(cache), self.layout, metadata.table, metadata.counts)
        newest = None
        if metadata.newest is not None:
            assert self.residual is not None
            newest = self.residual.segment(self.name, metadata.newest)
        tokens = metadata.num_actual_tokens
        queries = Queries(query[:tokens], metadata.starts)
        attend(output[:tokens], queries, pages, newest, self._terms_now(), self._side())
        return output

    def _terms_now(self) -> Terms:
        impl = self.layer.impl
        sinks = getattr(impl, "sinks", None)  # weights: they may be loaded anew
        softcap = float(getattr(impl, "logits_soft_cap", None) or 0.0)
        return Terms(float(impl.scale), softcap, None if sinks is None else sinks.float())

    def _side(self) -> Side:
        return NO_SIDE if self.observer is None else self.observer.side(self.name)

    def _blocks_of(self, cache: Tensor) -> Tensor:
        if self._cache is not cache or self._blocks is None:
            self._cache, self._blocks = cache, packed_view(cache)
        return self._blocks
