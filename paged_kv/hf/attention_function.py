"""The attention function of layers whose keys are in pages.

There, Cache.update has returned a Handle instead of tensors; see dispatch for all other layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from paged_kv.hf.handle import Handle
from paged_kv.hf.masks import MaskSpec, bias_of
from paged_kv.kernels.operands import Terms

Tensor = torch.Tensor


@torch.compiler.disable
def paged_attention(
    module: Any,
    query: Tensor,
    key: Handle,
    value: Handle,
    attention_mask: MaskSpec | Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[rows, q, heads, size], of query [rows, heads, q, head_dim].

    Args:
        module: the attention layer.
        query: after RoPE.
        key: the layer's keys.
        value: its values.
        attention_mask: what our mask function gave, or a mask of the user's own.
        scaling: factor of the logits; None: head_dim ** -0.5.
        options: softcap, s_aux (sinks), position_bias; and what sdpa takes.

    Raises:
        ValueError: output_attentions is asked for; the model's attention implementation has no
            mask function; the mask is of a kind that we do not know; see PagedCache.attend.
    """
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions: a PagedCache never has the attention of all tokens; use a "
            "DynamicCache and attn_implementation='eager' for that"
        )
    _check_mask(module, attention_mask)
    heads = query.shape[1], key.key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = bias_of(attention_mask, options.get("position_bias"), heads)
    terms = Terms(scale, options.get("softcap") or 0.0, options.get("s_aux"))
    output = key.cache.attend(
        key.layer, module, query, key.key, key.value, attention_mask, terms, bias
    )
    return output.transpose(1, 2).contiguous(), None


def _check_mask(module: Any, mask: Any) -> None:
    """Raises ValueError: it says nothing that we understand.

    transformers makes no mask for an implementation that it knows no mask function of.
    """
    if isinstance(mask, MaskSpec | Tensor):
        return
    if mask is not None:
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}: a PagedCache takes a tensor, [rows, "
            "tokens] or [rows, heads, queries, tokens], or None"
        )
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is not None and name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation {name!r} has no mask function, so a PagedCache would not know "
            "what is padding: call AttentionMaskInterface.register, or "
            "model.set_attn_implementation('sdpa')"
        )
