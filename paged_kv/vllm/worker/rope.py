"""What vLLM's attention layers turn keys and queries by.

vLLM decides when a model is loaded, also for longrope and dynamic NTK: one table for every request,
rounded to the model's dtype. Its frequencies are read from the same table before rounding, which
the layer computes once more, and hold past its end, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from paged_kv.kernels.rotary import Rotary, from_tables

_EACH = 1024  # a power of two: the first rows of a table are read, and of the rest one in so many


def find_rotary(model: torch.nn.Module, names: list[str]) -> Rotary:
    """The RoPE of attention layers.

    Args:
        model: that vLLM has loaded.
        names: of the layers, at least one.

    Raises:
        ValueError: the layers have no rotary embedding of the plain kind, or not all the same.
    """
    ropes = [_rope_of(model, name) for name in names]
    device = _table(ropes[0]).device
    by_rope = {id(rope): _read(rope, name) for rope, name in zip(ropes, names, strict=True)}
    first, *rotaries = by_rope.values()
    for rotary in rotaries:
        if not _equal(first, rotary):
            raise ValueError(
                "this kv-policy needs to undo RoPE, but the layers that it compresses have "
                f"different ones ({names[0]}, ...): take a policy that reads no RoPE (snapkv, ...)"
            )
    return replace(first, frequencies=first.frequencies.to(device))


def _equal(rotary: Rotary, other: Rotary) -> bool:
    same = (rotary.scale, rotary.neox) == (other.scale, other.neox)
    return same and torch.equal(rotary.frequencies, other.frequencies)


def _rope_of(model: torch.nn.Module, name: str) -> Any:
    """The rotary embedding of a layer. Raises ValueError: none, or none that a layer uses."""
    module: Any = model.get_submodule(name.rpartition(".")[0])
    rope: Any = getattr(module, "rotary_emb", None)
    if _table(rope) is None or hasattr(rope, "mrope_section") or not _is_used(module):
        raise ValueError(
            f"this kv-policy needs to undo RoPE, but layer {name} has no plain rotary embedding "
            f"({type(rope).__name__}): take a policy that reads no RoPE (snapkv, streaming, ...)"
        )
    return rope


def _is_used(module: Any) -> bool:
    """Whether the layer turns anything: some models do only in layers with a sliding window."""
    if getattr(module, "is_local_attention", True) is False:  # Afmoe
        return False
    if hasattr(module, "apply_rope_all_layers"):  # EXAONE 4
        return bool(module.apply_rope_all_layers or module.sliding_window)
    if hasattr(module, "v1") and hasattr(module, "sliding_window"):  # Command R
        return bool(module.v1 or module.sliding_window)
    return True


def _table(rope: Any) -> Any:
    table = getattr(rope, "cos_sin_cache", None)
    return getattr(rope, "long_short_cos_sin_cache", None) if table is None else table


def _read(rope: Any, name: str) -> Rotary:
    """On the CPU. Raises ValueError: see from_tables; or the layer's table is another one."""
    used = _table(rope)
    if hasattr(rope, "use_long_rope"):  # Phi-3: two tables, one after the other
        switch = rope.original_max_position_embeddings
        used = used[switch:] if rope.use_long_rope else used[:switch]
        arguments = (
            (rope.max_position_embeddings, rope.long_factor, rope.long_mscale)
            if rope.use_long_rope
            else (switch, rope.short_factor, rope.short_mscale)
        )
        table = rope._compute_cos_sin_cache(*arguments)
    else:
        table = rope._compute_cos_sin_cache()
    table = table.float().cpu()
    rows = {*range(min(len(table), _EACH)), *range(0, len(table), _EACH)}
    positions = torch.tensor(sorted(rows), device="cpu")
    # Once, when the model is loaded: later nothing is read back from a device. On a GPU the last
    # digits of frequencies differ, which far from 0 is much, so only the first rows are compared.
    used_head, table_head = used[:_EACH].float().cpu(), table[:_EACH].to(used.dtype).float()
    if used.shape != table.shape or not torch.allclose(used_head, table_head, atol=2e-2):
        raise ValueError(f"this kv-policy needs to undo RoPE, and {name} has a table of its own")
    cos, sin = table[positions].chunk(2, -1)
    try:
        return from_tables(positions, cos, sin, bool(getattr(rope, "is_neox_style", True)))
    except ValueError as error:
        raise ValueError(f"{error}: {name}, {type(rope).__name__}") from None
