"""How a model of transformers is entered: its attention function, its head, its RoPE.

Engines are given to the model's forward pass as one more argument, one for each row: models hand on
those that they do not know to the attention function.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions

from paged_kv.hf.rope import Rope, of_embedding
from paged_kv.kernels.operands import Terms

Tensor = torch.Tensor


ENGINE = "paged_kv_engine"  # the argument


class Attends(ABC):
    """What takes over a row's attention in a forward pass with it in the argument ENGINE."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        sliding_window: int | None,
    ) -> Tensor:
        """[heads, n, head_dim] from query of that shape and [kv_heads, n, head_dim] key, value.

        Args:
            layer: index in the model.
            query: after RoPE.
            key: the new keys.
            value: the new values.
            terms: of the layer.
            sliding_window: how many of the last tokens a query sees, its own included; None: all.
        """


def engine_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[rows, n, heads, head_dim], of query [rows, heads, n, head_dim]; engines know their masks."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.float()
    terms = Terms(scale, softcap or 0.0, sinks)
    engines: Sequence[Attends] = options[ENGINE]
    outputs = [
        engine.attend(module.layer_idx, q, k, v, terms, sliding_window)
        for engine, q, k, v in zip(engines, query, key, value, strict=True)
    ]
    return torch.stack(outputs).transpose(1, 2).contiguous(), None


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """[n, vocabulary] of the last hidden states [n, hidden]: the model's own forward pass.

    Whatever it does besides the head (scales, softcaps) is done too.
    """
    output = MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])
    base = model.get_decoder()  # OPT's head takes no detour over its base_model
    base.forward = lambda *_, **__: output
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del base.forward  # the class's again


def rotary_of(model: Any) -> Rope:
    """RoPE of a model; see Rope, whose tables it makes when they are asked for."""

    def find() -> Any:
        return copy.deepcopy(getattr(model.base_model, "rotary_emb", None))

    return of_embedding(find, model.config.get_text_config(), model.device)


def rotary_of_layer(module: Any, device: torch.device) -> Rope:
    """RoPE of an attention layer, from the classes in its own file; see rotary_of.

    Args:
        module: the layer.
        device: of its keys. Its weights may be buffers, or elsewhere.
    """
    modeling = sys.modules[type(module).__module__]
    config = getattr(module, "config", None)

    def find() -> Any:
        names = [name for name in vars(modeling) if name.endswith("RotaryEmbedding")]
        if config is None or len(names) != 1:
            raise ValueError(
                f"this policy needs the model's rotary position embeddings, and "
                f"{type(module).__name__} has none that we know"
            )
        return getattr(modeling, names[0])(config=config)

    return of_embedding(find, config, device)
