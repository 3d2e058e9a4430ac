"""The attention function that transformers calls in every layer, registered as "paged_kv".

For a layer whose keys are in pages, Cache.update has returned a Handle instead of tensors; all
other layers (sliding windows, cross-attention, models without our cache) get what sdpa gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paged_kv.hf.masks import NAME, MaskSpec, bias_of
from paged_kv.hf.paged_attention import Terms, mix, probabilities

if TYPE_CHECKING:
    from paged_kv.hf.cache import PagedCache

Tensor = torch.Tensor


class Handle:
    """Stands for the keys, or the values, of a layer: [rows, kv_heads, tokens so far, size].

    Args:
        cache: whose they are.
        layer: index in the model.
        key: the new keys, [rows, kv_heads, q, head_dim].
        value: the new values.
        is_key: which of them this stands for.
    """

    def __init__(
        self, cache: PagedCache, layer: int, key: Tensor, value: Tensor, is_key: bool
    ) -> None:
        self.cache, self.layer, self.key, self.value = cache, layer, key, value
        own = key if is_key else value
        total = cache.get_seq_length() + own.shape[2]
        self.shape = torch.Size((*own.shape[:2], total, own.shape[3]))
        self.dtype, self.device = own.dtype, own.device

    def size(self, dim: int | None = None) -> Any:
        """Like a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise _not_replaceable(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _not_replaceable(name)


def _not_replaceable(operation: str) -> ValueError:
    return ValueError(
        f"a PagedCache has no {operation}: its keys and values are in pages. Either it was made "
        "with another model's config, or this model computes with its cached keys itself "
        "instead of calling transformers' AttentionInterface; for that one use DynamicCache"
    )


def _refuse(name: str) -> Any:
    def refuse(*_: Any) -> NoReturn:
        raise _not_replaceable(name)

    return refuse


for _name in ("getitem", "matmul", "rmatmul", "add", "radd", "mul", "rmul", "sub", "truediv"):
    setattr(Handle, f"__{_name}__", _refuse(f"__{_name}__"))


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: MaskSpec | Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[rows, q, heads, size], of query [rows, heads, q, head_dim].

    Args:
        module: the attention layer.
        query: after RoPE.
        key: a Handle, or tensors of a layer that is not paged.
        value: like key.
        attention_mask: what our mask function gave, or a mask of the user's own.
        scaling: factor of the logits; None: head_dim ** -0.5.
        options: softcap, s_aux (sinks), position_bias; and what sdpa takes.

    Raises:
        ValueError: output_attentions is asked for; see PagedCache.attend.
    """
    if not isinstance(key, Handle):
        mask = attention_mask.dense() if isinstance(attention_mask, MaskSpec) else attention_mask
        if options.get("softcap") or options.get("s_aux") is not None:
            return _explicit(query, key, value, mask, _terms(query, scaling, options)), None
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions: a PagedCache never has the attention of all tokens; use a "
            "DynamicCache and attn_implementation='eager' for that"
        )
    heads = query.shape[1], key.key.shape[1]
    terms = _terms(query, scaling, options)
    terms = terms._replace(bias=bias_of(attention_mask, options.get("position_bias"), heads))
    output = key.cache.attend(key.layer, module, query, key.key, key.value, attention_mask, terms)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, paged_attention)


def _terms(query: Tensor, scaling: float | None, options: dict[str, Any]) -> Terms:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Terms(scale, options.get("softcap") or 0.0, options.get("s_aux"))


def _explicit(query: Tensor, keys: Any, values: Any, mask: Tensor | None, terms: Terms) -> Tensor:
    """Attention with a softcap or sinks, which sdpa does not know, over dense keys and values."""
    num_queries, num_entries = query.shape[2], keys.shape[2]
    outputs = []
    for row in range(len(query)):
        bias = None
        if mask is not None:
            own = mask[row if len(mask) > 1 else 0]
            bias = torch.where(own, 0.0, -torch.inf) if own.dtype == torch.bool else own.float()
        parts = probabilities(
            query[row : row + 1], keys[row : row + 1], [num_entries - num_queries], terms, bias
        )
        numbers = values[row : row + 1].float()
        outputs.append(torch.cat([mix(chances, numbers) for _, chances in parts], 2))
    return torch.cat(outputs).to(query.dtype).transpose(1, 2).contiguous()
