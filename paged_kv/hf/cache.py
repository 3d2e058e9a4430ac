"""PagedCache: a cache for transformers' generate() whose layers keep a budget of entries."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    get_layer_types_and_kwargs,
)

from paged_kv.config import CompressionConfig
from paged_kv.hf import dispatch, given, providers, seams
from paged_kv.hf.arena import Geometry
from paged_kv.hf.arguments import check_page_format, read_options, read_pool, settle
from paged_kv.hf.copies import Copyable
from paged_kv.hf.handle import Handle
from paged_kv.hf.masks import MaskSpec, counts_of
from paged_kv.hf.paged_attention import Bias
from paged_kv.hf.paged_layer import PagedLayer
from paged_kv.hf.pool import PagePool
from paged_kv.hf.rope import Rope, drops_caches
from paged_kv.hf.row_operations import RowOperations
from paged_kv.hf.saving import Saveable, recognizes
from paged_kv.hf.sequences import Sequences
from paged_kv.hf.stats import CacheStats
from paged_kv.hf.step import interrupted, skipped
from paged_kv.kernels.operands import Terms

Tensor = torch.Tensor


class PagedCache(Copyable, Saveable, RowOperations):
    """Keys and values in pages, a budget of entries per layer, survivors picked by a policy.

    For `model.generate(**inputs, past_key_values=PagedCache(model.config, ...))`. Positions stay
    true: `get_seq_length` counts processed tokens. Padding is not stored. Layers with a sliding
    window or linear attention keep transformers' own caches. The model and its attention
    implementation stay as they are: other calls of it compute what they always do.

    What is not given comes from the environment (PAGED_KV_POLICY, PAGED_KV_BUDGET,
    PAGED_KV_POLICY_CONFIG), then from CompressionConfig's defaults.

    Without compress_prefill nothing is dropped from a prompt before its end: while forward passes
    have several tokens; the first pass with a single token compacts.

    With start=pressure nothing is dropped while there are pages. When a PagePool(num_pages=...)
    runs out, sequences past their prompts shrink to their budgets, of all caches there, those with
    the largest surplus first and as few as will do, and are held to them from then on. A pool
    without a limit never runs out.

    Args:
        config: the model's, `model.config` itself.
        policy: a name, or a CompressionConfig.
        budget: entries kept per sequence and layer, or a fraction; see CompressionConfig.
        page_size: entries per page.
        page_format: how pages store numbers: native (the model's dtype), int8, int4, fp8, or a
            file that `paged-kv calibrate formats` wrote.
        pool: where pages come from, to share it or to limit it; None: memory of its own.
        attention: what computes steps of one token: sdpa; flex, compiled, which reads scattered
            pages in place; xformers, on GPUs.
        options: more of CompressionConfig's options, and those of the policy.

    Raises:
        ValueError: an unknown or wrong option; budgets or a page format that do not fit the model;
            a model whose cache cannot be paged.
    """

    def __init__(
        self,
        config: Any,
        policy: str | CompressionConfig | None = None,
        budget: int | float | None = None,
        page_size: int | None = None,
        page_format: str | None = None,
        pool: PagePool | None = None,
        attention: str = "sdpa",
        **options: Any,
    ) -> None:
        if page_format is not None:
            options["page_format"] = page_format
        compression = read_options(policy, budget, options)
        pool, is_private = read_pool(pool, page_size), pool is None
        provider = providers.create(attention, pool.page_size)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("an encoder-decoder model needs PagedEncoderDecoderCache(model, ...)")
        decoder = config.get_text_config(decoder=True)
        if getattr(decoder, "num_kv_shared_layers", 0):
            raise ValueError("a model whose layers share their KV cache is not supported")
        types, arguments = get_layer_types_and_kwargs(decoder)
        paged = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
        if not paged:
            raise ValueError(f"no layer of this model has full attention: {sorted(set(types))}")
        if compression.enabled:
            compression.check_page_size(pool.page_size)
        check_page_format(compression, decoder, pool.page_size, attention)
        compression = settle(compression, config)
        self.compression, self.pool = compression, pool
        self._config, self._attention = config, attention
        self.sequences = Sequences(compression, paged, len(types), pool, is_private, provider)
        self.progress = [0]
        self._paged = paged
        self._is_broken = False
        self._is_dropped_if_true = drops_caches(decoder)
        self.is_used = False  # by a forward pass, since somebody last looked: see given.py
        self._owner: Any = None  # config of the model whose entries these are
        self._padded_at = 0  # stream index behind the last padding
        super().__init__(
            layers=[
                PagedLayer(self.progress)
                if kind == "full_attention"
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**more)
                for kind, more in zip(types, arguments, strict=True)
            ]
        )
        dispatch.install()
        given.watch()
        if compression.waits_for_pressure:
            pool.join(self.sequences)
        self._close = weakref.finalize(self, self.sequences.release)

    def __bool__(self) -> bool:
        """Whether there is a cache: True; False for models that drop true ones: see rope.py.

        Where that would be right, when frequencies change, Rope refuses.
        """
        return not self._is_dropped_if_true

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Handles of a paged layer, for our attention function; tensors of any other."""
        self._check_open()
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache has {len(self.layers)} layers, and the model more: it was made with "
                "another model's config"
            )
        if not isinstance(self.layers[layer_idx], PagedLayer):
            self._check_length(layer_idx, key_states.shape[2])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        new = key_states, value_states
        return Handle(self, layer_idx, *new, is_key=True), Handle(
            self, layer_idx, *new, is_key=False
        )

    def attend(
        self,
        layer: int,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskSpec | Tensor | None,
        terms: Terms,
        bias: Bias | None = None,
    ) -> Tensor:
        """[rows, heads, q, size]: stores new entries of a layer, attends to all; 0 for padding.

        Args:
            layer: index in the model.
            module: the attention layer.
            query: [rows, heads, q, head_dim].
            key: [rows, kv_heads, q, head_dim].
            value: [rows, kv_heads, q, size].
            mask: what the layer was given.
            terms: how it computes attention.
            bias: what the mask and the layer add to the logits; see Sequences.attend.
        """
        self._check_open()
        if layer == self._paged[0]:
            self._begin(module, query, key, value, mask)
        elif self.sequences.step is None:
            raise skipped(self._paged[:1])
        real = mask.real if isinstance(mask, MaskSpec) else None
        if real is None:
            output = self.sequences.attend(layer, query, key, value, terms, bias)
        else:
            output = query.new_zeros(*query.shape[:3], value.shape[-1])
            tokens = [torch.from_numpy(row).to(query.device) for row in real]
            queries, keys, values = (
                [tensor[row][:, index] for row, index in enumerate(tokens)]
                for tensor in (query, key, value)
            )
            outputs = self.sequences.attend_ragged(layer, queries, keys, values, terms, bias)
            for row, index in enumerate(tokens):
                output[row][:, index] = outputs[row].to(output.dtype)  # autocast may differ
        if layer == self._paged[-1]:
            self._end(query.shape[2], real is not None)
        return output

    def _begin(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> None:
        rows = len(query)
        owner = getattr(module, "config", None)
        if self.progress[0] == 0 and self.sequences.step is None:  # nothing is held
            self._start(rows, owner, seams.rotary_of_layer(module, key.device))
        elif self._owner is None and recognizes(self, owner):
            self._owner = owner
            found = seams.rotary_of_layer(module, key.device)
            self.sequences.rotary = found.holding(self.sequences.rotary)
        if owner is not self._owner:
            raise ValueError(
                "this cache holds entries of another model: use a cache for each model, or call "
                "reset()"
            )
        if self.sequences.num_rows != rows:
            raise ValueError(
                f"this cache holds {self.sequences.num_rows} sequences, but the batch has {rows}: "
                "use a new cache, or call reset()"
            )
        geometry = Geometry(
            key.shape[1], key.shape[3], value.shape[3], key.dtype, value.dtype, key.device
        )
        try:
            counts = counts_of(mask, self.sequences.num_tokens, query.shape[2])
            rope = self.sequences.rope_after(int((self.sequences.num_tokens + counts).max()))
            self.sequences.begin(counts, geometry)  # compacts what was there before
        except BaseException as error:  # linear layers before have moved on
            is_clean = isinstance(error, ValueError) and not any(self.is_linear[: self._paged[0]])
            self._is_broken = not is_clean
            raise
        self.sequences.rotary = rope

    def _start(self, rows: int, owner: Any, rope: Rope) -> None:
        """A batch begins."""
        self.sequences.release()  # rows of a batch that was refused
        self._owner, self.sequences.rotary = owner, rope
        self.sequences.add_rows(rows)

    def _check_length(self, layer: int, num_queries: int) -> None:
        """A layer of transformers' own has seen what the others have; an error may come between."""
        before = self.progress[0] - (num_queries if layer > self._paged[-1] else 0)
        if self.layers[layer].get_seq_length() != before:
            raise interrupted()

    def _end(self, num_queries: int, has_padding: bool) -> None:
        self._is_broken = True  # until progress is that of the sequences
        self.sequences.end()
        self._is_broken = False
        self.is_used = True
        self.progress[0] += num_queries
        if has_padding:
            self._padded_at = self.progress[0]

    def _check_open(self) -> None:
        if not self._close.alive:
            raise ValueError("this PagedCache has been closed: make a new one")
        if self._is_broken or self.sequences.is_torn:
            raise interrupted()

    def stats(self) -> CacheStats:
        """What it holds, and what it has given up. Raises ValueError: it has been closed."""
        self._check_open()
        return self.sequences.stats()

    def close(self) -> None:
        """Gives all pages back."""
        self._close()
        self.progress[0] = 0

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forgets everything: the next batch may be another one, of another size."""
        self._is_broken = self.sequences.is_torn = False
        self._check_open()
        self.sequences.release()
        self.sequences.waits_for_crop, self.sequences.num_passes = False, 0
        self.progress[0] = self._padded_at = 0
        for layer in self._others():
            layer.reset()
            if hasattr(layer, "record_past"):
                layer.record_past = False
