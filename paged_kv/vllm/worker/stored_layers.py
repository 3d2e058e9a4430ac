"""Which layers have pages whose entries can be moved and read, known when a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

Layers = Mapping[str, Any]
Specs = Mapping[str, KVCacheSpec]


def check_full(names: Iterable[str], layers: Layers, specs: Specs) -> None:
    """Refuses layers that are not plain full attention. Raises ValueError: names the layer."""
    for name in names:
        layer: Any = layers[name]
        spec: Any = specs.get(name)
        if getattr(layer.impl, "alibi_slopes", None) is not None:
            # Slots are not positions any more. Not every such model's config says so.
            raise ValueError(f"kv-policy does not support ALiBi position biases (layer {name})")
        if type(spec) is not FullAttentionSpec or not isinstance(layer, Attention):
            raise ValueError(f"kv-policy: layer {name} has no plain full attention: {spec}")


def check_alike(names: Iterable[str], specs: Specs) -> None:
    """Refuses layers whose entries differ in size, by which vLLM groups. Raises ValueError."""
    every: dict[str, Any] = {name: specs[name] for name in names}
    shapes = {n: (s.num_kv_heads, s.head_size, s.head_size_v) for n, s in every.items()}
    if len(set(shapes.values())) > 1:
        heads = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(f"kv-policy does not support layers whose KV heads differ ({heads})")


def check_scales(names: Iterable[str], layers: Layers) -> None:
    """Refuses fp8 caches with a scale for each head, to read. Raises ValueError: names a layer."""
    for name in names:
        for scale in ("_q_scale", "_k_scale", "_v_scale"):
            if getattr(layers[name], scale).numel() > 1:
                raise ValueError(
                    f"kv-policy: this policy reads the cache, and that of layer {name} has a scale "
                    "for each head: use streaming, window or random, or --kv-cache-dtype auto"
                )


def check_layouts(asked: str, names: Iterable[str], layers: Layers, specs: Specs) -> None:
    """Refuses pages that do not have one place for each KV head and token.

    ROCM_ATTN's interleave tokens: to move "an entry" would mix several.

    Args:
        asked: the option that moves or converts entries.
        names: of the layers whose entries these are.
        layers: all that the model has.
        specs: of those with a cache.

    Raises:
        ValueError: names the backend.
    """
    for name in names:
        spec: Any = specs[name]
        if spec.num_head_slots not in (None, spec.num_kv_heads) or spec.tokens_per_state != 1:
            raise ValueError(
                f"{asked}: attention backend {layers[name].attn_backend.get_name()} has pages of a "
                f"layout of its own (layer {name}): choose another one (--attention-backend)"
            )


def check_others(layers: Layers, specs: Specs) -> None:
    """Refuses caches beside attention (of indexers, summaries), which go by its pages.

    Raises:
        ValueError: names the layer.
    """
    for name, spec in specs.items():
        if not isinstance(layers[name], Attention):
            raise ValueError(
                f"kv-policy: layer {name} ({type(layers[name]).__name__}) has a cache of its own, "
                f"which would not follow what is dropped: {spec}"
            )
