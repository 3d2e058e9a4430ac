"""What a network that predicts attention learns from: entries, and the attention they will get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.model_rules import full_attention_layers
from paged_kv.policies.learned import features

Tensor = torch.Tensor


class Sample(NamedTuple):
    """Entries of one context that a policy would have to choose from, oldest first.

    Args:
        features: float32 [layers, kv_heads, m, 5]; see paged_kv.policies.learned.features.
        attention: float32 [layers, kv_heads, m], what each gets from later queries: the mean over
            those after the cut and over the group.
    """

    features: Tensor
    attention: Tensor


@torch.inference_mode()
def collect(model: Any, tokens: Sequence[int], cut: int) -> Sample:
    """Runs a context with a full cache; looks at its entries after `cut` tokens, then ahead.

    What a policy never drops (sinks, the newest) is left out.

    Args:
        model: see paged_kv.hf.driver.loading.load_model.
        tokens: the context.
        cut: tokens before the queries whose attention is the label; below len(tokens).
    """
    budget = len(tokens) + DEFAULT_PAGE_SIZE
    config = CompressionConfig.from_dict({"policy": "h2o", "budget": budget})
    first, last = config.num_sink_tokens, cut - config.recent_window
    assert first + 1 < last, "the cut leaves no entries to choose from"
    engine = ReferenceEngine(model, config)  # h2o adds up what each entry gets
    engine.process(tokens[:cut], compact=False)
    text_config = model.config.get_text_config()
    num_layers = text_config.num_hidden_layers
    layers = [engine.layers[layer] for layer in full_attention_layers(text_config, num_layers)]
    region = engine.region(layers, 0, frozenset({"keys", "values"}))
    seen = features(region, num_layers)[:, 0]
    for layer in layers:
        layer.cache["scores"].zero_()
    engine.process(tokens[cut:], compact=False)
    scores = torch.stack([layer.cache["scores"] for layer in layers])
    group = text_config.num_attention_heads // scores.shape[1]
    attention = scores / ((len(tokens) - cut) * group)
    return Sample(seen[:, :, first:last].clone(), attention[:, :, first:last].clone())
